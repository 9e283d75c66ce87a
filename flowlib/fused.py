"""Flow steps as they are computed: the weights of ActNorms and scales are fused into the convolutions beside
them, and a product or a single operation stands for several where that is faster."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowlib.precision import as_double, bf16_pays, sum_dtype

if TYPE_CHECKING:
    from flowlib.layers import CouplingNet, FlowStep

Convs = tuple[tuple[Tensor, Tensor], ...]  # (weight, bias) of the three convolutions of a coupling net


class Fused(NamedTuple):
    """The fused weights of a FlowStep: ActNorm and 1x1 convolution as one affine map (weight, bias), its
    inverse, and its log_det a pixel (each None if not asked for); and the coupling net's convolutions."""

    affine: tuple[Tensor, Tensor] | None
    inverse_affine: tuple[Tensor, Tensor] | None
    log_det: Tensor | None
    convs: Convs


def fuse(
    steps: list["FlowStep"], forward: bool = True, inverse: bool = True, log_det: bool = True
) -> list[Fused]:
    """One Fused for each of a chain of FlowSteps of one shape. Not cached: call once, reuse the result."""
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    weight = torch.stack([step.invconv.weight for step in steps])
    affine = inverse_affine = log_dets = [None] * len(steps)
    if forward:
        scaled = weight * log_scale.exp()[:, None, :]
        affine = zip(scaled.unbind(), (scaled @ bias[:, :, None]).unbind())
    if inverse:
        scaled = inverse_matrix(weight) * (-log_scale).exp()[:, :, None]
        inverse_affine = zip(scaled.unbind(), (-bias[:, :, None]).unbind())
    if log_det:
        log_dets = (log_scale.sum(1, dtype=sum_dtype(weight)) + log_abs_det(weight)).unbind()
    convs = fuse_nets([step.coupling.net for step in steps])
    return list(map(Fused, affine, inverse_affine, log_dets, convs))


def fuse_nets(nets: list["CouplingNet"]) -> list[Convs]:
    """The convolutions of each of these nets of one shape, with ActNorms, scale and divisor fused in. Small
    tensors of all nets are fused at once: with few channels, the number of operations costs most."""
    dtype = nets[0].compute_dtype or nets[0].log_scale.dtype
    fused = []
    for i in (1, 2, 3):
        convs = [getattr(net, f"conv{i}") for net in nets]
        bias = torch.stack([conv.bias for conv in convs])
        if i < 3:
            norms = [getattr(net, f"actnorm{i}") for net in nets]
            scale = torch.stack([norm.log_scale for norm in norms]).exp()
            bias = bias + torch.stack([norm.bias for norm in norms])
        else:
            scale = (3 * torch.stack([net.log_scale for net in nets])).exp()
            scale = scale if nets[0].divisor is None else scale / nets[0].divisor
        weights = (channels_last(c.weight * s[:, None, None, None], dtype) for c, s in zip(convs, scale))
        fused.append(zip(weights, (bias * scale).to(dtype).unbind()))
    return list(zip(*fused))


def inverse_matrix(weight: Tensor) -> Tensor:
    """The inverse of matrices (..., C, C). On a CPU, warns where it may be off by a tenth of its input."""
    inverse = _of_matrices(lambda w: torch.linalg.inv_ex(w).inverse, weight)  # inv would wait for a GPU
    if has_values(weight):
        sizes = [torch.linalg.matrix_norm(m.detach()) for m in (weight.to(inverse), inverse)]
        if not bool((sizes[0] * sizes[1] < 0.1 / torch.finfo(sum_dtype(weight)).eps).all()):
            warnings.warn("a 1x1 convolution is nearly singular: what it inverts is noise", stacklevel=2)
    return inverse.to(weight.dtype)


def log_abs_det(weight: Tensor) -> Tensor:
    """``log |det|`` of matrices (..., C, C)."""
    return _of_matrices(lambda w: torch.linalg.slogdet(w).logabsdet, weight).to(sum_dtype(weight))


def _of_matrices(function: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """function(weight) in float64; a constant in ONNX, which has neither inverse nor determinant."""
    trace = torch._C._get_tracing_state()
    if not (trace and torch.onnx.is_in_onnx_export()):
        return function(as_double(weight))
    torch._C._set_tracing_state(None)
    try:
        return function(as_double(weight.detach()))
    finally:
        torch._C._set_tracing_state(trace)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight (C, C) x + bias (C, 1) at every pixel: a matrix product is faster here than a convolution."""
    return torch.baddbmm(bias, weight.expand(x.shape[0], -1, -1), x.flatten(2)).reshape(x.shape)


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """The ReLU of a convolution of x, in the weight's type. On CPUs it is one operation if no gradient is
    wanted, as the result is then still in the cache: a quarter of the time in bfloat16."""
    x = channels_last(x, weight.dtype)
    fast = x.dtype == torch.float32 or x.dtype == torch.bfloat16 and bf16_pays()
    fast = fast and has_values(x) and not torch.is_grad_enabled()
    if fast and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        rest = ([padding] * 2, [1, 1], [1, 1], 1, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *rest)
    return F.conv2d(x, weight, bias, padding=padding).relu_()


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, in the layout in which convolutions are fastest; vmap does not know that layout."""
    return x.to(dtype) if transformed(x) else x.to(dtype, memory_format=torch.channels_last)


def has_values(x: Tensor) -> bool:
    """Whether a condition on x costs nothing and has a meaning: on a CPU, and not transformed."""
    return x.device.type == "cpu" and not transformed(x)


def transformed(x: Tensor) -> bool:
    """Whether an export, torch.func or forward-mode differentiation is at work: some operations then fail."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent
    return tangent is not None or torch._C._functorch.peek_interpreter_stack() is not None
