"""The invertible layers of Glow, maps of images (B, C, H, W) with known log-determinants."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlib.precision import bf16_pays
from flowlib.products import METHODS

LogDet = Tensor | None  # None where it is not asked for
Mapped = tuple[Tensor, LogDet]


def sum_dtype(x: Tensor) -> torch.dtype:
    """What is summed over pixels in: float32, as 16 bits overflow, or float64 where x has that."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which torch.autocast leaves alone what is linear, and must fit its inverse or adjoint."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


class Squeeze(nn.Module):
    """Moves each 2x2 block of pixels into channels, in the order (c, row, column); contiguous: cuts each
    channel into four bands of rows instead, an option of GlowIP."""

    def __init__(self, contiguous: bool = False) -> None:
        super().__init__()
        self.contiguous = contiguous

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4C, H/2, W/2)."""
        b, c, h, w = x.shape
        bands = self.contiguous or not b  # pixel_unshuffle leaves an empty batch as it is
        return x.reshape(b, 4 * c, h // 2, w // 2) if bands else F.pixel_unshuffle(x, 2)

    def inverse(self, y: Tensor) -> Tensor:
        """(B, 4C, H/2, W/2) -> (B, C, H, W)."""
        b, c, h, w = y.shape
        bands = self.contiguous or not b
        return y.reshape(b, c // 4, 2 * h, 2 * w) if bands else F.pixel_shuffle(y, 2)


class Split(nn.Module):
    """Sends the first half of the channels on and keeps the second half as a latent."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> what goes on and the latent, (B, C/2, H, W) both."""
        return x.chunk(2, dim=1)

    def inverse(self, x: Tensor, latent: Tensor) -> Tensor:
        """The two halves joined again."""
        return torch.cat([x, latent], dim=1)


class Bijection(nn.Module):
    """Base of the layers with a log-determinant: subclasses give `_map(x, inverse, *options)`.

    log_det (B,) is ``log |det ∂output/∂input|`` of each image in nats, summed in float32 at least."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Mapped:
        """x -> (y, log_det), both images (B, C, H, W)."""
        with without_autocast(x):
            return self._map(x, False, *args, **options)

    def inverse(self, y: Tensor, *args: Any, **options: Any) -> Mapped:
        """y -> (x, log_det), log_det being that of the inverse."""
        with without_autocast(y):
            return self._map(y, True, *args, **options)


class ActNorm(Bijection):
    """Affine map of each of the channels, y = (x + bias) exp(log_scale) (Kingma & Dhariwal 2018, 3.1). It
    starts as the identity; only `initialize` sets it from data."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Makes the batch x (B, C, H, W) leave with mean 0 and variance 1 per channel.

        Raises ValueError where a channel of x is constant or not finite."""
        std, mean = torch.std_mean(x, dim=(0, 2, 3))
        worst = int(torch.nan_to_num(std, nan=-1.0, posinf=-1.0).argmin())
        if not 1e-6 <= float(std[worst]) < float("inf"):
            what = f"channel {worst} of a batch of {len(x)} has standard deviation {float(std[worst]):.3g}"
            raise ValueError(f"ActNorm cannot be set from this: {what}; pass a larger batch of varied images")
        self.bias.copy_(-mean)
        self.log_scale.copy_(-std.log())
        self.initialized.fill_(True)

    def _map(self, x, inverse):
        bias, log_scale = self.bias[:, None, None], self.log_scale[:, None, None]
        y = x * (-log_scale).exp() - bias if inverse else (x + bias) * log_scale.exp()
        return y, _over_pixels(self.log_scale.sum(dtype=sum_dtype(x)), x, inverse)


class InvConv1x1(Bijection):
    """Invertible 1x1 convolution y = W x at every pixel (Kingma & Dhariwal 2018, 3.2). W (channels,
    channels) starts as a random rotation; float64 serves its inverse and determinant."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0].contiguous())

    def _map(self, x, inverse):
        weight = inverse_matrix(self.weight) if inverse else self.weight
        y = pixelwise(x, weight, x.new_zeros(len(weight), 1))
        return y, _over_pixels(log_abs_det(self.weight), x, inverse)


def _over_pixels(log_det, x, inverse):
    return (log_det * ((-1 if inverse else 1) * x.shape[2:].numel())).repeat(x.shape[0])


def as_double(x: Tensor) -> Tensor:
    """x in float64, or in float32 on a device that has no float64."""
    try:
        return x.double()
    except (TypeError, RuntimeError):
        return x.float()


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


def pixelwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight (C, C) x + bias (C, 1) at every pixel: a matrix product is faster here than a convolution."""
    return torch.baddbmm(bias, weight.expand(x.shape[0], -1, -1), x.flatten(2)).reshape(x.shape)


class CouplingNet(nn.Module):
    """NN of the affine coupling: convolutions 3x3, 1x1, 3x3 from in_channels over hidden_channels to
    out_channels; an ActNorm and a ReLU after the first two. The last is multiplied by exp(3 log_scale) and
    starts at zero: a fresh flow is linear. divisor (out_channels,): what the outputs are divided by.
    `compute_dtype` (None: the weights') may be torch.bfloat16; `coupling_method`: see set_coupling."""

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, divisor: Tensor | None = None
    ) -> None:
        super().__init__()
        self.compute_dtype, self.coupling_method = None, "plain"
        self.register_buffer("divisor", divisor, persistent=False)
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.actnorm1 = ActNorm(hidden_channels)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.actnorm2 = ActNorm(hidden_channels)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.05)
        for zero in (self.conv1.bias, self.conv2.bias, self.conv3.weight, self.conv3.bias):
            nn.init.zeros_(zero)

    def initialize(self, x: Tensor) -> None:
        """Sets both ActNorms from a batch (B, in_channels, H, W)."""
        h = self.conv1(x)
        self.actnorm1.initialize(h)
        self.actnorm2.initialize(self.conv2(self.actnorm1(h)[0].relu()))

    def forward(self, x: Tensor, convs: tuple | None = None) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W). convs: one of what fold_nets gives."""
        convs = convs or fold_nets([self])[0]
        if self.coupling_method != "plain" and not _transformed(x) and not _transformed(convs[0][0]):
            return METHODS[self.coupling_method](x, *(tensor for conv in convs for tensor in conv))
        *first, (weight, bias) = convs
        h = _channels_last(x, weight.dtype)
        fused = has_values(h) and not torch.is_grad_enabled()
        fused = fused and (h.dtype == torch.float32 or h.dtype == torch.bfloat16 and bf16_pays())
        fused = fused and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        for layer, padding in zip(first, (1, 0)):
            if fused:
                # The ReLU is done while the result is still in the cache: a quarter of the time in bfloat16.
                rest = ([padding] * 2, [1, 1], [1, 1], 1, "relu", [], "")
                h = torch.ops.mkldnn._convolution_pointwise(h, *layer, *rest)
            else:
                h = F.conv2d(h, *layer, padding=padding).relu_()
        h = F.conv2d(h, weight, bias, padding=1)
        return h.to(x.dtype).contiguous()  # affine maps are faster channel by channel


def fold_nets(nets: list[CouplingNet]) -> list[tuple]:
    """For each of these nets of one shape, (weight, bias) of its three convolutions, with the ActNorms, scale
    and divisor folded in. What is small is folded for all nets at once: with few channels, the number of
    operations is what costs."""
    dtype = nets[0].compute_dtype or nets[0].log_scale.dtype
    folded = []
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
        weights = (_channels_last(c.weight * s[:, None, None, None], dtype) for c, s in zip(convs, scale))
        folded.append(zip(weights, (bias * scale).to(dtype).unbind()))
    return list(zip(*folded))


def _channels_last(x, dtype):
    """As convolutions are fastest; vmap knows no such layout."""
    return x.to(dtype) if _transformed(x) else x.to(dtype, memory_format=torch.channels_last)


def has_values(x: Tensor) -> bool:
    """Whether a condition on x costs nothing and means anything: on a CPU, and computed as it stands."""
    return x.device.type == "cpu" and not _transformed(x)


def _transformed(x):
    """Whether an export, torch.func or forward-mode differentiation is at work: not all operations serve."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent
    return tangent is not None or torch._C._functorch.peek_interpreter_stack() is not None


SCALE_RULES = ("tanh", "sigmoid", "exp")


class AffineCoupling(Bijection):
    """y_a = s x_a + t, y_b = x_b with (log s, t) = NN(x_b), equation (13); log_det = Σ log s.

    channels: of x; hidden_channels: of NN. scale: "tanh", log s = c tanh(raw / c) with c = max_log_scale,
    bounded so that inverting stays well conditioned far from the data; "exp", log s = raw, as the paper
    prints it; "sigmoid", s = sigmoid(raw + 2) + scale_bias, as the reference code has it. Else ValueError."""

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        scale: str = "tanh",
        max_log_scale: float = 1.0,
        scale_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if scale not in SCALE_RULES:
            raise ValueError(f"unknown scale rule {scale!r}; choose one of {', '.join(SCALE_RULES)}")
        if scale_bias and scale != "sigmoid":
            raise ValueError(f"scale_bias goes with sigmoid, not with {scale!r}")
        self.scale, self.max_log_scale, self.scale_bias = scale, max_log_scale, scale_bias
        # tanh wants its argument divided by the bound: every other output of the net.
        divisor = torch.tensor([max_log_scale, 1.0]).repeat(channels // 2) if scale == "tanh" else None
        self.net = CouplingNet(channels // 2, hidden_channels, channels, divisor)

    def log_scale_and_shift(self, x_b: Tensor, convs: tuple | None = None) -> tuple[Tensor, Tensor]:
        """(log s, t), each (B, C/2, H, W), of the half that passes unchanged. convs: the net's, folded."""
        raw, t = self.net(x_b, convs).reshape(*x_b.shape[:2], 2, *x_b.shape[2:]).unbind(2)
        if self.scale == "tanh":
            return self.max_log_scale * raw.tanh(), t
        if self.scale == "sigmoid":
            raw = (raw.add(2).sigmoid() + self.scale_bias).log() if self.scale_bias else F.logsigmoid(raw + 2)
        return raw, t

    def _map(self, x, inverse, convs=None, log_det=True):
        x_a, x_b = x.chunk(2, dim=1)
        log_s, t = self.log_scale_and_shift(x_b, convs)
        y_a = (x_a - t) * (-log_s).exp() if inverse else x_a * log_s.exp() + t
        total = log_s.sum(dim=(1, 2, 3), dtype=sum_dtype(x)) if log_det else None
        return torch.cat([y_a, x_b], dim=1), -total if log_det and inverse else total


class Folded(NamedTuple):
    """A FlowStep as it is computed with: ActNorm and 1x1 convolution as one affine map, its inverse, its
    log_det a pixel (each None where it is not asked for), and the coupling net's convolutions."""

    linear: tuple | None
    inverse_linear: tuple | None
    log_det: Tensor | None
    convs: tuple


class FlowStep(Bijection):
    """One step of Glow: ActNorm, invertible 1x1 convolution, affine coupling. channels, hidden_channels,
    rule: the arguments of AffineCoupling. Options of forward and inverse: folded, what fold() made of the
    step, where that serves several calls; log_det: without it, None stands for it."""

    def __init__(self, channels: int, hidden_channels: int, **rule: str | float) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv = InvConv1x1(channels)
        self.coupling = AffineCoupling(channels, hidden_channels, **rule)

    def initialize(self, x: Tensor) -> Tensor:
        """Sets the ActNorms from a batch x (B, C, H, W); returns what the step makes of it."""
        self.actnorm.initialize(x)
        h = self.invconv(self.actnorm(x)[0])[0]
        self.coupling.net.initialize(h.chunk(2, dim=1)[1])
        return self.coupling(h)[0]

    def _map(self, x, inverse, folded=None, log_det=True):
        folded = folded or fold([self], not inverse, inverse, log_det)[0]
        x = x if inverse else pixelwise(x, *folded.linear)
        x, total = (self.coupling.inverse if inverse else self.coupling)(x, folded.convs, log_det)
        x = pixelwise(x, *folded.inverse_linear) if inverse else x
        return x, total + _over_pixels(folded.log_det, x, inverse) if log_det else None


def fold(
    steps: list[FlowStep], forward: bool = True, inverse: bool = True, log_det: bool = True
) -> list[Folded]:
    """One Folded for each of a chain of FlowSteps of one shape. Nothing is kept from one call to the next:
    who runs a chain several times with the same weights folds once and passes it on."""
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    weight = torch.stack([step.invconv.weight for step in steps])
    linear = inverse_linear = log_dets = [None] * len(steps)
    if forward:
        scaled = weight * log_scale.exp()[:, None, :]
        linear = zip(scaled.unbind(), (scaled @ bias[:, :, None]).unbind())
    if inverse:
        scaled = inverse_matrix(weight) * (-log_scale).exp()[:, :, None]
        inverse_linear = zip(scaled.unbind(), (-bias[:, :, None]).unbind())
    if log_det:
        log_dets = (log_scale.sum(1, dtype=sum_dtype(weight)) + log_abs_det(weight)).unbind()
    convs = fold_nets([step.coupling.net for step in steps])
    return list(map(Folded, linear, inverse_linear, log_dets, convs))
