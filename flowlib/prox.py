"""Proximal mappings: networks that map an image to a more plausible one, prox(x, shrinkage) -> image, (B, C, H, W) both."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from flowlib.glow import Glow


class GlowProx(nn.Module):
    """Shrinkage in the latent space of a flow: x -> f^-1(f(x) / (1 + shrinkage)), equations (9)-(11)."""

    uses_shrinkage = True

    def __init__(self, glow):
        super().__init__()
        self.glow = glow
        self.config = glow.config

    @classmethod
    def from_config(cls, config):
        return cls(Glow(**config))

    def forward(self, x, shrinkage):
        folded = self.glow.fold(log_det=False)
        latents, _ = self.glow(x, folded, log_det=False)
        return self.glow.inverse([z / (1 + shrinkage) for z in latents], folded, log_det=False)[0]


class _ImageNet(nn.Module):
    """What U-Net and ResNet share: no shrinkage, and an optional lower precision (`compute_dtype`)."""

    uses_shrinkage = False

    def __init__(self, **config):
        super().__init__()
        self.config = config
        self.compute_dtype = None

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def forward(self, x, shrinkage=None):
        cast = torch.autocast(x.device.type, self.compute_dtype) if self.compute_dtype else contextlib.nullcontext()
        with cast:
            y = self._net(x.contiguous(memory_format=torch.channels_last))
        return y.to(x.dtype)


def _conv_bn_relu(in_channels, out_channels, bias):
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class UNetProx(_ImageNet):
    """The standard U-Net (Ronneberger et al. 2015): width, 2, 4, 8, 16 x width channels over four down-samplings.

    width 64 has 31,037,763 parameters, the paper's 31.04 M. H and W must be divisible by 16 (ValueError)."""

    def __init__(self, width=64, in_channels=3):
        super().__init__(width=width, in_channels=in_channels)
        widths = [width * 2**i for i in range(5)]

        def double(i, o):
            return nn.Sequential(*_conv_bn_relu(i, o, bias=False), *_conv_bn_relu(o, o, bias=False))

        self.down = nn.ModuleList(double(i, o) for i, o in zip([in_channels, *widths], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(double(2 * w, w) for w in reversed(widths[:-1]))
        self.out = nn.Conv2d(width, in_channels, 1)
        self.to(memory_format=torch.channels_last)

    def _net(self, x):
        if x.shape[-2] % 16 or x.shape[-1] % 16:
            raise ValueError(
                f"height {x.shape[-2]} and width {x.shape[-1]} must both be divisible by 16: crop or pad the image"
            )
        skips = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        x = skips.pop()
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.out(x)


class ResNetProx(_ImageNet):
    """The residual network of Mardani et al. (2018): num_blocks blocks of two 3x3 convolutions of `width` feature maps,
    each with batch normalisation and ReLU, then three 1x1 convolutions; a 1x1 convolution lifts the image to width."""

    def __init__(self, width=128, num_blocks=2, in_channels=3):
        super().__init__(width=width, num_blocks=num_blocks, in_channels=in_channels)
        self.lift = nn.Conv2d(in_channels, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*_conv_bn_relu(width, width, bias=True), *_conv_bn_relu(width, width, bias=True))
            for _ in range(num_blocks)
        )
        self.tail = nn.Sequential(
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, in_channels, 1),
        )
        self.to(memory_format=torch.channels_last)

    def _net(self, x):
        x = self.lift(x)
        for block in self.blocks:
            x = x + block(x)
        return self.tail(x)


PROXES = {"glow": GlowProx, "unet": UNetProx, "resnet": ResNetProx}
