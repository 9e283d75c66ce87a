"""Glow (Kingma & Dhariwal 2018): the normalizing flow that serves as the image prior."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from flowlib.files import as_json
from flowlib.fused import Fused, fuse
from flowlib.images import Size, floating, height_and_width, standard_normal
from flowlib.layers import FlowStep, LogDet, Mapped, Split, Squeeze
from flowlib.precision import sum_dtype, without_autocast
from flowlib.reversible import run_chain

Latents = Sequence[Tensor]  # one for each level
FusedLevels = list[list[Fused] | None] | None  # for each level, the weights of its steps


class Glow(nn.Module):
    """Multi-scale flow f between images x (B, in_channels, H, W) and latents z ~ N(0, I), equations (4)-(6).

    Each of the num_levels levels squeezes, applies num_steps flow steps and, but for the last, splits half of
    the channels off as a latent. The last has last_level_steps (one, as in the reference code: 4 levels, 18
    steps and 512 hidden_channels then give the paper's 25.77 M parameters). num_steps (the last level's too),
    hidden_channels, scale_bias and contiguous_squeeze (see Squeeze) may be one number for each level, from
    fine to coarse. scale: the rule "tanh", "sigmoid" or "exp", and its max_log_scale, scale_bias: see
    AffineCoupling. max_log_scale None is 2 / steps of the level: its scales multiply to e^-2 to e^2.

    Raises ValueError where there are not as many numbers as levels; its methods, where x is not (B,
    in_channels, H, W) with H and W divisible by 2^num_levels."""

    def __init__(
        self,
        in_channels: int = 3,
        num_levels: int = 4,
        num_steps: int | Sequence[int] = 18,
        hidden_channels: int | Sequence[int] = 512,
        last_level_steps: int = 1,
        scale: str = "tanh",
        max_log_scale: float | None = None,
        scale_bias: float | Sequence[float] = 0.0,
        contiguous_squeeze: bool | Sequence[bool] = False,
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self.config, self.memory = as_json(arguments), "plain"
        num_levels, channels = self.config["num_levels"], self.config["in_channels"]
        if not 1 <= num_levels <= 16:
            raise ValueError(f"num_levels is {num_levels}: each halves the image, choose from 1 to 16")
        self.squeezes, self.split = nn.ModuleList(map(Squeeze, self._each("contiguous_squeeze"))), Split()
        self.levels = nn.ModuleList()
        names = ("num_steps", "hidden_channels", "scale_bias")
        for steps, hidden, bias in zip(*map(self._each, names)):
            channels *= 4
            rule = dict(scale=scale, max_log_scale=max_log_scale or 2 / steps, scale_bias=bias)
            self.levels.append(nn.ModuleList(FlowStep(channels, hidden, **rule) for _ in range(steps)))
            channels //= 2

    def _each(self, name):
        """The argument of this name at each level."""
        value, num_levels = self.config[name], self.config["num_levels"]
        values = value if isinstance(value, list) else [value] * num_levels
        if len(values) != num_levels:
            raise ValueError(f"{name} {value}: give one number for each level ({num_levels}), or for all")
        if name == "num_steps" and not isinstance(value, list):
            values[-1] = self.config["last_level_steps"]
        return values

    def latent_shapes(self, image_size: Size) -> list[tuple[int, int, int]]:
        """Shapes (C, H, W) of the latents of an image of size image_size (one number, or (H, W))."""
        height, width = height_and_width(image_size)
        channels, n = self.config["in_channels"], self.config["num_levels"]
        if height % 2**n or width % 2**n:
            what = f"height {height} and width {width} must both be divisible by 2^num_levels = {2**n}"
            raise ValueError(f"{what}: crop or pad the image, or build a Glow with fewer levels")
        levels = range(1, n + 1)  # the last keeps the channels that others split off
        return [(channels * 2 ** (i + (i == n)), height // 2**i, width // 2**i) for i in levels]

    def _weight(self):
        """One of the weights, whose type and device all images and latents have."""
        weight = next(self.parameters(), None)
        if weight is None:
            raise RuntimeError("replicas of nn.DataParallel have no parameters: use DistributedDataParallel")
        return weight

    def _checked(self, x):
        """The images in the weights' type."""
        x, channels = floating(x, self._weight().dtype), self.config["in_channels"]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"expected images (B, {channels}, H, W), got shape {tuple(x.shape)}")
        self.latent_shapes(tuple(x.shape[2:]))
        return x

    def fuse(self, **which: bool) -> FusedLevels:
        """The fused weights of all steps, for several calls of forward and inverse. which: see fused.fuse.
        None for each level in the memory modes that do not keep them."""
        if self.memory != "plain" and torch.is_grad_enabled():
            return [None] * len(self.levels)
        with without_autocast(self._weight()):  # which would round the affine maps to 16 bits
            return [fuse(list(level), **which) for level in self.levels]

    def forward(self, x: Tensor, fused: FusedLevels = None, log_det: bool = True) -> tuple[Latents, LogDet]:
        """z = f(x), equation (4): images (B, C, H, W) -> (latents, one tensor a level; log_det (B,) in nats).
        fused: from fuse(), where it serves several calls. log_det=False returns None for it."""
        x = self._checked(x)
        fused = fused or self.fuse(inverse=False, log_det=log_det)
        latents, total = [], x.new_zeros(x.shape[0]) if log_det else None
        for squeeze, level, weights in zip(self.squeezes, self.levels, fused):
            x, level_log_det = run_chain(level, squeeze(x), False, self.memory, weights, log_det)
            total = total + level_log_det if log_det else None
            if level is not self.levels[-1]:
                x, latent = self.split(x)
                latents.append(latent)
        return (*latents, x), total

    def inverse(self, latents: Latents, fused: FusedLevels = None, log_det: bool = True) -> Mapped:
        """x = g(z), equation (5): latents as forward returns them -> (images (B, C, H, W); log_det (B,) in
        nats). fused, log_det: as in forward. Raises ValueError for another number of latents."""
        if len(latents) != len(self.levels):
            raise ValueError(f"expected {len(self.levels)} latents, one for each level, got {len(latents)}")
        latents = [floating(z, self._weight().dtype) for z in latents]
        fused = fused or self.fuse(forward=False, log_det=log_det)
        x, total = latents[-1], latents[-1].new_zeros(latents[-1].shape[0]) if log_det else None
        for i in reversed(range(len(latents))):
            if i < len(latents) - 1:
                x = self.split.inverse(x, latents[i])
            x, level_log_det = run_chain(self.levels[i], x, True, self.memory, fused[i], log_det)
            total = total + level_log_det if log_det else None
            x = self.squeezes[i].inverse(x)
        return x, total

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = log p(f(x)) + ``log |det Df(x)|``, equation (6): (B,) in nats."""
        latents, log_det = self.forward(x)
        return standard_normal_log_prob(latents) + log_det

    def bits_per_dim(self, x: Tensor, num_bins: int = 256) -> Tensor:
        """-log2 p(x) per dimension, in bits (B,), of images with num_bins grey levels in an interval of 1."""
        return (-self.log_prob(x) / x.shape[1:].numel() + math.log(num_bins)) / math.log(2)

    def sample(
        self, num_samples: int, image_size: Size, temperature: float = 1.0, generator: Generator | None = None
    ) -> Tensor:
        """Images (num_samples, C, H, W) = g(temperature * z), z ~ N(0, I) drawn with the generator."""
        weight, shapes = self._weight(), self.latent_shapes(image_size)
        noise = (standard_normal((num_samples, *shape), weight, generator) for shape in shapes)
        return self.inverse([temperature * z for z in noise])[0]

    def decode_zero(self, image_size: Size) -> Tensor:
        """g(0), the paper's initial guess x_0: (1, C, H, W). Zero is the mode of the latents' density; g(0)
        is not the mode of p(x), equation (6), which has another factor."""
        zeros = [self._weight().new_zeros(1, *shape) for shape in self.latent_shapes(image_size)]
        return self.inverse(zeros)[0]

    mode = decode_zero  # its name in the paper's words, "the most likely image"

    @property
    def initialized(self) -> bool:
        """Whether `initialize` was done, here or before the flow was saved."""
        return bool(self.levels[0][0].actnorm.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets every ActNorm from a batch of images (B, C, H, W), once, before training. Raises RuntimeError
        where it was done before; ValueError where a channel is constant: the flow is then as it was."""
        x = self._checked(x)
        if self.initialized:
            raise RuntimeError("this Glow is initialised already; initialise a new one, or train on without")
        trial = copy.deepcopy(self)
        with without_autocast(x):
            for squeeze, level in zip(trial.squeezes, trial.levels):
                x = squeeze(x)
                for step in level:
                    x = step.initialize(x)
                x, _ = self.split(x)
        self.load_state_dict(trial.state_dict())


def standard_normal_log_prob(latents: Sequence[Tensor]) -> Tensor:
    """log N(z; 0, I) summed over all latents: (B,) in nats."""
    squares = (z.to(sum_dtype(z)).square() for z in latents)
    return sum(-0.5 * (s + math.log(2 * math.pi)).sum(dim=(1, 2, 3)) for s in squares)


MEMORY_MODES = ("plain", "reversible", "checkpoint")


def set_memory(model: nn.Module, mode: str) -> None:
    """How every Glow in the model backpropagates: "plain" keeps all activations; "reversible" keeps one
    tensor a level and recomputes the rest by inversion; "checkpoint" keeps each step's input, where the
    inverse is not trusted. Raises ValueError for another mode."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"unknown memory mode {mode!r}; choose one of {', '.join(MEMORY_MODES)}")
    for module in model.modules():
        if isinstance(module, Glow):
            module.memory = mode
