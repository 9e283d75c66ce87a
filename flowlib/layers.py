"""The invertible layers of Glow, maps of images (B, C, H, W) with known log-determinants."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlib.fused import Convs, conv1x1, conv_relu, fuse, fuse_nets, inverse_matrix, log_abs_det, transformed
from flowlib.precision import sum_dtype, without_autocast
from flowlib.products import METHODS

LogDet = Tensor | None  # None where it is not asked for
Mapped = tuple[Tensor, LogDet]


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
    """Passes on the first half of the channels and keeps the second half as a latent."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (next level's input, latent), (B, C/2, H, W) both."""
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
        """y -> (x, log_det of the inverse map)."""
        with without_autocast(y):
            return self._map(y, True, *args, **options)


def _over_pixels(log_det, x, inverse):
    return (log_det * ((-1 if inverse else 1) * x.shape[2:].numel())).repeat(x.shape[0])


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
    channels) starts as a random rotation; its inverse and determinant are computed in float64."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0].contiguous())

    def _map(self, x, inverse):
        weight = inverse_matrix(self.weight) if inverse else self.weight
        y = conv1x1(x, weight, x.new_zeros(len(weight), 1))
        return y, _over_pixels(log_abs_det(self.weight), x, inverse)


class CouplingNet(nn.Module):
    """NN of the affine coupling: convolutions 3x3, 1x1, 3x3 from in_channels over hidden_channels to
    out_channels; an ActNorm and a ReLU after the first two. The last is multiplied by exp(3 log_scale) and
    starts at zero: a fresh flow is linear. divisor (out_channels,): divides the outputs. `compute_dtype`
    (None: the weights' type) may be torch.bfloat16; `coupling_method`: see set_coupling."""

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

    def forward(self, x: Tensor, convs: Convs | None = None) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W). convs: this net's, from fuse_nets."""
        first, second, (weight, bias) = convs or fuse_nets([self])[0]
        if self.coupling_method != "plain" and not transformed(x) and not transformed(first[0]):
            return METHODS[self.coupling_method](x, *first, *second, weight, bias)
        h = conv_relu(x, *first, padding=1)
        h = conv_relu(h, *second)
        h = F.conv2d(h, weight, bias, padding=1)
        return h.to(x.dtype).contiguous()  # affine maps are faster channel by channel


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
        # tanh takes raw / c: the net divides every other output.
        divisor = torch.tensor([max_log_scale, 1.0]).repeat(channels // 2) if scale == "tanh" else None
        self.net = CouplingNet(channels // 2, hidden_channels, channels, divisor)

    def log_scale_and_shift(self, x_b: Tensor, convs: Convs | None = None) -> tuple[Tensor, Tensor]:
        """(log s, t), each (B, C/2, H, W), from the half that passes unchanged. convs: see CouplingNet."""
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


class FlowStep(Bijection):
    """One step of Glow: ActNorm, invertible 1x1 convolution, affine coupling. channels, hidden_channels,
    rule: the arguments of AffineCoupling. Options of forward and inverse: fused, the step's weights from
    fuse(), where they serve several calls; log_det=False returns None for it."""

    def __init__(self, channels: int, hidden_channels: int, **rule: str | float) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.invconv = InvConv1x1(channels)
        self.coupling = AffineCoupling(channels, hidden_channels, **rule)

    def initialize(self, x: Tensor) -> Tensor:
        """Sets the ActNorms from a batch x (B, C, H, W); returns the step's output for it."""
        self.actnorm.initialize(x)
        h = self.invconv(self.actnorm(x)[0])[0]
        self.coupling.net.initialize(h.chunk(2, dim=1)[1])
        return self.coupling(h)[0]

    def _map(self, x, inverse, fused=None, log_det=True):
        fused = fused or fuse([self], not inverse, inverse, log_det)[0]
        if inverse:
            x, total = self.coupling.inverse(x, fused.convs, log_det)
            x = conv1x1(x, *fused.inverse_affine)
        else:
            x, total = self.coupling(conv1x1(x, *fused.affine), fused.convs, log_det)
        return x, total + _over_pixels(fused.log_det, x, inverse) if log_det else None
