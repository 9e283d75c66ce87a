"""Proximal mappings: networks that map an image to a more plausible one, (B, C, H, W) both."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlib.fused import has_values
from flowlib.glow import Glow
from flowlib.images import floating


class Prox(nn.Module):
    """The interface of a proximal mapping. A solver takes any module with such a `forward`; to be saved, the
    module also needs `config`, a JSON-able dict of its arguments, and `from_config`, and a class that can be
    imported. uses_shrinkage: whether the solver learns a λ for it; else `forward` gets None."""

    uses_shrinkage: bool = False

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Prox":
        """A new prox with the arguments in config."""
        return cls(**config)

    def forward(self, x: Tensor, shrinkage: Tensor | None = None) -> Tensor:
        """An image more plausible than x, (B, C, H, W) both; shrinkage: the fold's λ."""
        raise NotImplementedError


class GlowProx(Prox):
    """Shrinkage in the latent space of a flow: x -> glow.inverse(glow(x) / (1 + shrinkage)), (9)-(11)."""

    uses_shrinkage = True

    def __init__(self, glow: Glow) -> None:
        super().__init__(**glow.config)
        self.glow = glow

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GlowProx":
        return cls(Glow(**config))

    def forward(self, x: Tensor, shrinkage: Tensor | float) -> Tensor:
        learnt = isinstance(shrinkage, Tensor) and (shrinkage.requires_grad or not has_values(shrinkage))
        if not learnt and not bool((torch.as_tensor(shrinkage, device="cpu") > -1).all()):
            raise ValueError(f"shrinkage must be > -1, as latents are divided by 1 + shrinkage: {shrinkage}")
        fused = self.glow.fuse(log_det=False)
        latents, _ = self.glow(x, fused, log_det=False)
        return self.glow.inverse([z / (1 + shrinkage) for z in latents], fused, log_det=False)[0]


class _ImageNet(Prox):
    """Base of U-Net and ResNet: no shrinkage, and an optional lower precision (`compute_dtype`)."""

    compute_dtype = None

    def forward(self, x: Tensor, shrinkage: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, self.compute_dtype) if self.compute_dtype else nullcontext():
            return self._net(x.contiguous(memory_format=torch.channels_last)).to(x.dtype)


def _double_conv(in_channels, out_channels, bias):
    """Twice a 3x3 convolution, batch normalisation and a ReLU."""
    layers = []
    for channels in (in_channels, out_channels):
        conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNetProx(_ImageNet):
    """The standard U-Net (Ronneberger et al. 2015): width to 16 x width channels over four down-samplings; 64
    with in_channels 3 has the paper's 31.04 M parameters. ValueError where 16 does not divide H and W."""

    def __init__(self, width: int = 64, in_channels: int = 3) -> None:
        super().__init__(width=int(width), in_channels=int(in_channels))
        widths = [width * 2**i for i in range(5)]
        fine = widths[:-1]
        self.down = nn.ModuleList(_double_conv(i, o, False) for i, o in zip([in_channels, *fine], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(fine))
        self.merge = nn.ModuleList(_double_conv(2 * w, w, False) for w in reversed(fine))
        self.out = nn.Conv2d(width, in_channels, 1)

    def _net(self, x):
        height, width = x.shape[-2:]
        if height % 16 or width % 16:
            raise ValueError(f"height {height} and width {width} must both be divisible by 16: crop or pad")
        x, skips = floating(x, self.out.weight.dtype), []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        x = skips.pop()
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.out(x)


class ResNetProx(_ImageNet):
    """The residual network of Mardani et al. (2018): num_blocks blocks of two 3x3 convolutions of `width`
    feature maps, each with batch normalisation and ReLU, then three 1x1; another lifts in_channels."""

    def __init__(self, width: int = 128, num_blocks: int = 2, in_channels: int = 3) -> None:
        super().__init__(width=int(width), num_blocks=int(num_blocks), in_channels=int(in_channels))
        self.lift = nn.Conv2d(in_channels, width, 1)
        self.blocks = nn.ModuleList(_double_conv(width, width, True) for _ in range(num_blocks))
        first, second, last = (nn.Conv2d(width, out, 1) for out in (width, width, in_channels))
        self.tail = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def _net(self, x):
        x = self.lift(floating(x, self.lift.weight.dtype))
        for block in self.blocks:
            x = x + block(x)
        return self.tail(x)


PROXES = {"glow": GlowProx, "unet": UNetProx, "resnet": ResNetProx}
