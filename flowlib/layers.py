"""The invertible layers of Glow. Each maps x -> (y, log_det) by `forward` and y -> (x, log_det) by `inverse`,
with log_det[b] = log |det ∂output/∂input| of image b, in nats."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Squeeze(nn.Module):
    """Moves each 2x2 block of pixels into channels: (B, C, H, W) -> (B, 4C, H/2, W/2), order (c, row, column)."""

    def forward(self, x):
        return F.pixel_unshuffle(x, 2)

    def inverse(self, y):
        return F.pixel_shuffle(y, 2)


class Split(nn.Module):
    """Sends the first half of the channels on and keeps the second half as a latent."""

    def forward(self, x):
        return x.chunk(2, dim=1)

    def inverse(self, x, latent):
        return torch.cat([x, latent], dim=1)


class ActNorm(nn.Module):
    """Affine map per channel, y = (x + bias) exp(log_scale) (Kingma & Dhariwal 2018, section 3.1).

    `initialize(x)` sets it so that the batch x (B, C, H, W) leaves with mean 0 and variance 1 per channel;
    nothing else ever does. Raises ValueError where a channel of x is constant or not finite."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x):
        std, mean = torch.std_mean(x, dim=(0, 2, 3))
        if not bool(torch.isfinite(std).all()) or float(std.min()) < 1e-6:
            raise ValueError(
                f"ActNorm cannot be initialised: channel {int(torch.nan_to_num(std, nan=-1.0).argmin())} of this batch of "
                f"{x.shape[0]} has standard deviation {float(std.min()):.3g}; pass a larger batch of varied, finite images"
            )
        self.bias.copy_(-mean)
        self.log_scale.copy_(-std.log())
        self.initialized.fill_(True)

    def forward(self, x):
        y = (x + self.bias[:, None, None]) * self.log_scale.exp()[:, None, None]
        return y, self.log_scale.sum() * x[0, 0].numel() * x.new_ones(len(x))

    def inverse(self, y):
        x = y * (-self.log_scale).exp()[:, None, None] - self.bias[:, None, None]
        return x, -self.log_scale.sum() * y[0, 0].numel() * y.new_ones(len(y))


class InvConv1x1(nn.Module):
    """Invertible 1x1 convolution y = W x at every pixel; W (C, C) starts as a random rotation.

    The inverse and log |det W| are computed in float64, then cast; nothing is kept, so nothing can go stale."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0].contiguous())

    def forward(self, x):
        y = pixelwise(x, self.weight, x.new_zeros(len(self.weight), 1))
        return y, log_abs_det(self.weight) * x[0, 0].numel() * x.new_ones(len(x))

    def inverse(self, y):
        x = pixelwise(y, inverse_matrix(self.weight), y.new_zeros(len(self.weight), 1))
        return x, -log_abs_det(self.weight) * y[0, 0].numel() * y.new_ones(len(y))


def inverse_matrix(weight):
    return torch.linalg.inv_ex(weight.double()).inverse.to(weight.dtype)  # inv would wait for a GPU


def log_abs_det(weight):
    return torch.linalg.slogdet(weight.double()).logabsdet.to(weight.dtype)


def pixelwise(x, weight, bias):
    """weight (C, C) x + bias (C, 1) at every pixel, (B, C, H, W) twice: a 1x1 convolution as a matrix product, which is faster
    with few channels."""
    return torch.baddbmm(bias, weight.expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])


class CouplingNet(nn.Module):
    """NN of the affine coupling: conv 3x3, conv 1x1, conv 3x3, with an ActNorm and a ReLU after the first two.

    (B, in, H, W) -> (B, out, H, W). The ActNorms are folded into their convolutions, so a forward is three
    convolutions; the last is multiplied by exp(3 log_scale) and starts at zero, which makes a fresh flow linear.
    `compute_dtype` (None: that of the weights) may be torch.bfloat16: weights stay as they are and are cast here."""

    def __init__(self, in_channels, hidden_channels, out_channels):
        super().__init__()
        self.compute_dtype = None
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.actnorm1 = ActNorm(hidden_channels)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.actnorm2 = ActNorm(hidden_channels)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.05)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)

    def initialize(self, x):
        h = self.conv1(x)
        self.actnorm1.initialize(h)
        h = self.conv2(self.actnorm1(h)[0].relu())
        self.actnorm2.initialize(h)

    def forward(self, x):
        return convolve(x, fold_nets([self])[0])


def fold_nets(nets, divisor=None):
    """For each of these CouplingNets of one shape, (weight, bias) of its three convolutions with the ActNorms and the last
    one's scale folded in, as they are computed with. divisor (out,): what the outputs are to be divided by.

    What is small is folded for all nets at once: with few channels, the number of operations is what costs."""
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
            scale = scale if divisor is None else scale / divisor
        weights = [(conv.weight * s[:, None, None, None]).to(dtype, memory_format=torch.channels_last) for conv, s in zip(convs, scale)]
        folded.append(zip(weights, (bias * scale).to(dtype).unbind()))
    return list(zip(*folded))


def convolve(x, convs):
    """What a CouplingNet computes, from its folded convolutions."""
    (weight1, bias1), (weight2, bias2), (weight3, bias3) = convs
    h = x.to(weight1.dtype, memory_format=torch.channels_last)
    h = _conv_relu(h, weight1, bias1, padding=1)
    h = _conv_relu(h, weight2, bias2, padding=0)
    h = F.conv2d(h, weight3, bias3, padding=1)
    return h.to(x.dtype, memory_format=torch.contiguous_format)  # affine maps are faster channel by channel


def _conv_relu(h, weight, bias, padding):
    if _fused_relu_serves(h):
        # The ReLU is done while the result is still in the cache: a quarter of the time in bfloat16.
        rest = ([padding] * 2, [1, 1], [1, 1], 1, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise(h, weight, bias, *rest)
    return F.conv2d(h, weight, bias, padding=padding).relu_()


def _fused_relu_serves(h):
    """Whether PyTorch's private fused operation is there and may be used: it has no derivative and no batching rule."""
    return (
        not torch.is_grad_enabled()
        and h.device.type == "cpu"
        and h.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad.unpack_dual(h).tangent is None
    )


SCALE_RULES = ("tanh", "sigmoid", "exp")


class AffineCoupling(nn.Module):
    """y_a = s x_a + t, y_b = x_b with (log s, t) = NN(x_b), equation (13); log_det = Σ log s.

    scale: "tanh", log s = c tanh(raw / c) with c = max_log_scale, bounded so that inverting stays well conditioned far from
    the data; "exp", log s = raw, as the paper prints it; "sigmoid", s = sigmoid(raw + 2), as the reference code has it."""

    def __init__(self, channels, hidden_channels, scale="tanh", max_log_scale=1.0):
        super().__init__()
        if scale not in SCALE_RULES:
            raise ValueError(f"unknown scale rule {scale!r}; choose one of {', '.join(SCALE_RULES)}")
        self.scale, self.max_log_scale = scale, max_log_scale
        self.net = CouplingNet(channels // 2, hidden_channels, channels)
        # tanh wants its argument divided by the bound: every other output of the net.
        divisor = torch.tensor([max_log_scale, 1.0]).repeat(channels // 2) if scale == "tanh" else None
        self.register_buffer("divisor", divisor, persistent=False)

    def log_scale_and_shift(self, x_b, convs=None):
        """(log s, t), each (B, C/2, H, W), of the half that passes unchanged. convs: the net's, folded (fold_nets)."""
        convs = convs or fold_nets([self.net], self.divisor)[0]
        raw, t = convolve(x_b, convs).unflatten(1, (-1, 2)).unbind(2)
        if self.scale == "tanh":
            return self.max_log_scale * raw.tanh(), t
        return (F.logsigmoid(raw + 2) if self.scale == "sigmoid" else raw), t

    def forward(self, x, convs=None, log_det=True):
        x_a, x_b = x.chunk(2, dim=1)
        log_s, t = self.log_scale_and_shift(x_b, convs)
        y = torch.cat([x_a * log_s.exp() + t, x_b], dim=1)
        return y, log_s.sum(dim=(1, 2, 3)) if log_det else None

    def inverse(self, y, convs=None, log_det=True):
        y_a, y_b = y.chunk(2, dim=1)
        log_s, t = self.log_scale_and_shift(y_b, convs)
        x = torch.cat([(y_a - t) * (-log_s).exp(), y_b], dim=1)
        return x, -log_s.sum(dim=(1, 2, 3)) if log_det else None


class Folded(NamedTuple):
    """A FlowStep as it is computed with: the ActNorm and the 1x1 convolution as one affine map of the channels, `linear`, its
    inverse and its log_det a pixel (each None where it is not asked for), and the coupling net's convolutions."""

    linear: tuple | None
    inverse_linear: tuple | None
    log_det: torch.Tensor | None
    convs: tuple


def fold(steps, forward=True, inverse=True, log_det=True):
    """[Folded] of a chain of FlowSteps of one shape. Nothing is kept from one call to the next, so nothing goes stale: who
    runs a chain several times with the same weights folds once and passes it on."""
    log_scale = torch.stack([step.actnorm.log_scale for step in steps])
    bias = torch.stack([step.actnorm.bias for step in steps])
    weight = torch.stack([step.invconv.weight for step in steps])
    absent = [None] * len(steps)
    linear, inverse_linear, log_dets = absent, absent, absent
    if forward:
        scaled = weight * log_scale.exp()[:, None, :]
        linear = zip(scaled.unbind(), (scaled @ bias[:, :, None]).unbind())
    if inverse:
        scaled = inverse_matrix(weight) * (-log_scale).exp()[:, :, None]
        inverse_linear = zip(scaled.unbind(), (-bias[:, :, None]).unbind())
    if log_det:
        log_dets = (log_scale.sum(1) + log_abs_det(weight)).unbind()
    convs = fold_nets([step.coupling.net for step in steps], steps[0].coupling.divisor)
    return list(map(Folded, linear, inverse_linear, log_dets, convs))


class FlowStep(nn.Module):
    """One step of Glow: ActNorm, invertible 1x1 convolution, affine coupling; (B, C, H, W) -> (B, C, H, W).

    The first two are applied as one. folded: what fold() made of this step, where it serves several calls; without log_det,
    None stands for it: solvers do not need it."""

    def __init__(self, channels, hidden_channels, scale="tanh", max_log_scale=1.0):
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv = InvConv1x1(channels)
        self.coupling = AffineCoupling(channels, hidden_channels, scale, max_log_scale)

    def initialize(self, x):
        self.actnorm.initialize(x)
        h = self.invconv(self.actnorm(x)[0])[0]
        self.coupling.net.initialize(h.chunk(2, dim=1)[1])
        return self.coupling(h)[0]

    def forward(self, x, folded=None, log_det=True):
        folded = folded or fold([self], inverse=False, log_det=log_det)[0]
        y, coupling_log_det = self.coupling(pixelwise(x, *folded.linear), folded.convs, log_det)
        return y, coupling_log_det + folded.log_det * x[0, 0].numel() if log_det else None

    def inverse(self, y, folded=None, log_det=True):
        folded = folded or fold([self], forward=False, log_det=log_det)[0]
        h, coupling_log_det = self.coupling.inverse(y, folded.convs, log_det)
        x = pixelwise(h, *folded.inverse_linear)
        return x, coupling_log_det - folded.log_det * y[0, 0].numel() if log_det else None
