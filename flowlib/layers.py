"""The invertible layers of Glow. Each maps x -> (y, log_det) by `forward` and y -> (x, log_det) by `inverse`,
with log_det[b] = log |det ∂output/∂input| of image b, in nats."""

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

    The inverse and log |det W| are computed in float64, then cast, and kept for as long as W does not change. A change is
    seen by W's version counter, which only writes through W.data escape: use torch.no_grad() and copy_ instead."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self._kept = {}

    def _cached(self, name, compute):
        """compute(W in float64), from the cache where no gradient is asked for."""
        weight = self.weight
        if (torch.is_grad_enabled() and weight.requires_grad) or weight.is_inference():
            return compute(weight.double()).to(weight.dtype)
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._kept.get(name, (None,))[0] != state:
            with torch.no_grad():
                # With an alias of W, so that no other tensor can come to lie at its address.
                self._kept[name] = state, compute(weight.double()).to(weight.dtype), weight.detach()
        return self._kept[name][1]

    def inverse_weight(self):
        return self._cached("inverse", lambda weight: torch.linalg.inv_ex(weight).inverse)  # inv would wait for a GPU

    def log_abs_det(self):
        return self._cached("log_abs_det", lambda weight: torch.linalg.slogdet(weight).logabsdet)

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None]), self.log_abs_det() * x[0, 0].numel() * x.new_ones(len(x))

    def inverse(self, y):
        x = F.conv2d(y, self.inverse_weight()[:, :, None, None])
        return x, -self.log_abs_det() * y[0, 0].numel() * y.new_ones(len(y))


class CouplingNet(nn.Module):
    """NN of the affine coupling: conv 3x3, conv 1x1, conv 3x3, with an ActNorm and a ReLU after the first two.

    (B, in, H, W) -> (B, out, H, W). The ActNorms are folded into their convolutions, so a forward is three
    convolutions; the last is multiplied by exp(3 log_scale) and starts at zero, which makes a fresh flow linear.
    `compute_dtype` (None: that of the input) may be torch.bfloat16: weights stay as they are and are cast here."""

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
        dtype = self.compute_dtype or x.dtype
        h = x.to(dtype, memory_format=torch.channels_last)
        h = _conv(h, self.conv1, self.actnorm1.log_scale.exp(), self.actnorm1.bias, relu=True)
        h = _conv(h, self.conv2, self.actnorm2.log_scale.exp(), self.actnorm2.bias, relu=True)
        return _conv(h, self.conv3, (3 * self.log_scale).exp(), 0).to(x.dtype)


def _conv(h, conv, scale, shift, relu=False):
    """scale * (conv(h) + shift), folded into one convolution, then perhaps a ReLU."""
    weight = (conv.weight * scale[:, None, None, None]).to(h.dtype)
    bias = ((conv.bias + shift) * scale).to(h.dtype)
    fused = (
        h.device.type == "cpu" and h.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
    )
    if relu and fused and not torch.is_grad_enabled():
        # The ReLU is done while the result is still in the cache: a quarter of the time in bfloat16.
        rest = (conv.padding, conv.stride, conv.dilation, 1, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise(h, weight, bias, *rest)
    h = F.conv2d(h, weight, bias, padding=conv.padding)
    return h.relu_() if relu else h


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

    def log_scale_and_shift(self, x_b):
        """(log s, t), each (B, C/2, H, W), of the half that passes unchanged."""
        raw, t = self.net(x_b).unflatten(1, (-1, 2)).unbind(2)
        if self.scale == "tanh":
            return self.max_log_scale * torch.tanh(raw / self.max_log_scale), t
        return (F.logsigmoid(raw + 2) if self.scale == "sigmoid" else raw), t

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        log_s, t = self.log_scale_and_shift(x_b)
        return torch.cat([x_a * log_s.exp() + t, x_b], dim=1), log_s.sum(dim=(1, 2, 3))

    def inverse(self, y):
        y_a, y_b = y.chunk(2, dim=1)
        log_s, t = self.log_scale_and_shift(y_b)
        return torch.cat([(y_a - t) * (-log_s).exp(), y_b], dim=1), -log_s.sum(dim=(1, 2, 3))


class FlowStep(nn.Module):
    """One step of Glow: ActNorm, invertible 1x1 convolution, affine coupling; (B, C, H, W) -> (B, C, H, W).

    The first two are applied as one 1x1 convolution."""

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

    def linear(self):
        """ActNorm and 1x1 convolution as one: (weight (C, C), bias (C,))."""
        weight = self.invconv.weight * self.actnorm.log_scale.exp()
        return weight, weight @ self.actnorm.bias

    def inverse_linear(self):
        """Their inverse, likewise."""
        return self.invconv.inverse_weight() * (-self.actnorm.log_scale).exp()[:, None], -self.actnorm.bias

    def linear_log_det(self, x):
        """Their log_det, the same for all images of x's size."""
        return (self.actnorm.log_scale.sum() + self.invconv.log_abs_det()) * x[0, 0].numel()

    def forward(self, x):
        weight, bias = self.linear()
        y, log_det = self.coupling(F.conv2d(x, weight[:, :, None, None], bias))
        return y, log_det + self.linear_log_det(x)

    def inverse(self, y):
        h, log_det = self.coupling.inverse(y)
        weight, bias = self.inverse_linear()
        return F.conv2d(h, weight[:, :, None, None], bias), log_det - self.linear_log_det(y)
