"""The coupling net of a flow as matrix products, for GPUs, where its convolutions spend most of their time on
gradients of biases, ReLUs and copies.

Pixels are the rows of all matrices. The first convolution multiplies the 3x3 windows of the image, the second
is a product already, and the third multiplies each pixel by all nine taps, then sums these, each shifted."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def set_coupling(model: nn.Module, method: str) -> None:
    """Selects how every coupling net in the model is computed: "plain", by convolutions, as on CPUs;
    "products" (see flowlib.products), "products-again" (backward recomputes the first layer),
    "products-fused" (sums are compiled) or "compiled" (torch.compile of the convolutions). ValueError for
    another. benchmarks/card.py measures which is fastest on a GPU."""
    if method not in METHODS:
        raise ValueError(f"unknown coupling method {method!r}; choose one of {', '.join(METHODS)}")
    for module in model.modules():
        if hasattr(module, "coupling_method"):
            module.coupling_method = method


class _Products(torch.autograd.Function):
    """x (B, C, H, W) and the fused weights and biases of the three convolutions -> (B, out, H, W)."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, w3, b3, keep, back_through_relu):
        (b, c, height, width), num_out = x.shape, len(w3)
        with torch.autocast(x.device.type, enabled=False):
            windows = _windows(x, w1.dtype)
            first = F.pad(w1.flatten(1), (0, _num_columns(c) - 9 * c))
            last = w3.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)  # rotated by 180°
            last = F.pad(last, (0, 0, 0, _num_columns(num_out) - 9 * num_out))
            second, h1 = w2.flatten(1), _linear_relu(windows, first, b1)
            h2 = _linear_relu(h1, second, b2)
            y = _shifted_sum(last[: 9 * num_out], h2, (b, height, width)) + b3[:, None, None]
        ctx.back_through_relu, ctx.num_out = back_through_relu, num_out
        ctx.save_for_backward(x, h1 if keep else None, h2, first, b1, second, last)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("'products' has no second derivatives: use set_coupling(model, 'plain')")
        x, h1, h2, first, b1, second, last = ctx.saved_tensors
        (b, c, height, width), num_out, dtype = x.shape, ctx.num_out, first.dtype
        wants = dict(zip(("x", "w1", "b1", "w2", "b2", "w3", "b3"), ctx.needs_input_grad))
        found, windows, taps = dict.fromkeys(wants), _windows(x, dtype), _windows(grad, dtype)
        if wants["b3"]:
            found["b3"] = grad.sum(dim=(0, 2, 3)).to(dtype)
        if wants["w3"]:
            by_tap = (taps.T @ h2)[: 9 * num_out].unflatten(0, (num_out, 3, 3))
            found["w3"] = by_tap.permute(0, 3, 1, 2).flip(2, 3)
        if any(wants[name] for name in ("x", "w1", "b1", "w2", "b2")):
            grad, found["b2"] = ctx.back_through_relu(taps @ last, h2)
            h1 = _linear_relu(windows, first, b1) if h1 is None else h1
        if wants["w2"]:
            found["w2"] = (grad.T @ h1)[:, :, None, None]
        if any(wants[name] for name in ("x", "w1", "b1")):
            grad = torch.ops.aten.threshold_backward(grad @ second, h1, 0)
        if wants["w1"] or wants["b1"]:
            product = grad.T @ windows  # b1 has the column of ones
            found["w1"], found["b1"] = product[:, : 9 * c].unflatten(1, (c, 3, 3)), product[:, 9 * c]
        if wants["x"]:
            found["x"] = _shifted_sum(first[:, : 9 * c].T, grad, (b, height, width)).to(x.dtype)
        return *(found[name] if wanted else None for name, wanted in wants.items()), None, None


def _num_columns(channels):
    return -(-(9 * channels + 1) // 8) * 8  # matrix units want multiples of 8


def _windows(x, dtype):
    """(B, C, H, W) -> (B H W, 9 C, a one, zeros): the 3x3 window around each pixel."""
    b, c, height, width = x.shape
    rows = x.new_zeros(b, height, width, _num_columns(c), dtype=dtype)
    rows[..., 9 * c] = 1
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    rows[..., : 9 * c].unflatten(3, (c, 3, 3)).copy_(windows.permute(0, 2, 3, 1, 4, 5))
    return rows.flatten(0, 2)


def _shifted_sum(weight, rows, shape):
    """The reverse of _windows, of rows (B H W, n) times weight (9 C, n): summed where windows overlap."""
    b, height, width = shape
    products = torch.bmm(weight.expand(b, -1, -1), rows.view(b, height * width, weight.shape[1]).mT)
    return F.fold(products, (height, width), 3, padding=1)


def _linear_relu(rows, weight, bias):
    if rows.is_cuda:  # bias and ReLU while the product is still in registers
        return torch._addmm_activation(bias, rows, weight.T)
    return torch.addmm(bias, rows, weight.T).relu_()


def _back_through_relu(grad, h):
    """The gradient before the ReLU that gave h, and its sum over pixels, the bias's gradient."""
    grad = torch.ops.aten.threshold_backward(grad, h, 0)
    return grad, grad.sum(0)


def _convolutions(x, w1, b1, w2, b2, w3, b3):
    h = F.conv2d(x.to(w1.dtype, memory_format=torch.channels_last), w1, b1, padding=1).relu()
    h = F.conv2d(F.conv2d(h, w2, b2).relu(), w3, b3, padding=1)
    return h.to(x.dtype).contiguous()


COMPILER = {"dynamic": False, "options": {"conv_1x1_as_mm": True}}


@functools.cache
def _compiled(function):
    import torch._dynamo  # here, as these imports take seconds
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = 64  # one for each level, size of batch and mode
    torch._functorch.config.donated_buffer = False  # 'reversible' retains the graph
    return torch.compile(function, **COMPILER)


METHODS = {  # of (x, *weights and biases)
    "plain": None,
    "products": lambda *inputs: _Products.apply(*inputs, True, _back_through_relu),
    "products-again": lambda *inputs: _Products.apply(*inputs, False, _back_through_relu),
    "products-fused": lambda *inputs: _Products.apply(*inputs, True, _compiled(_back_through_relu)),
    "compiled": lambda *inputs: _compiled(_convolutions)(*inputs),
}
