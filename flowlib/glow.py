"""Glow (Kingma & Dhariwal 2018): the normalizing flow that serves as the image prior."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowlib.layers import FlowStep, Split, Squeeze, fold
from flowlib.reversible import run_chain


class Glow(nn.Module):
    """Multi-scale flow f between images x (B, in_channels, H, W) and latents z ~ N(0, I), equations (4)-(6).

    Each of the num_levels levels squeezes, applies num_steps flow steps and, but for the last, splits half of
    the channels off as a latent. The last level has last_level_steps steps (one, as the reference code builds
    it: with num_levels 4, num_steps 18 and 512 hidden channels that gives the paper's 25.77 M parameters).
    num_steps and hidden_channels may also be one number for each level, from fine to coarse; num_steps then gives the
    last level's too. scale: the coupling's scale rule, "tanh" | "sigmoid" | "exp", see AffineCoupling. max_log_scale: bound
    of "tanh"; None is 2 / steps of the level, so that the scales of its couplings multiply to between e^-2 and e^2.

    Raises ValueError where x is not (B, in_channels, H, W) with H and W divisible by 2^num_levels, and where there are
    not as many numbers as levels."""

    def __init__(
        self,
        in_channels=3,
        num_levels=4,
        num_steps=18,
        hidden_channels=512,
        last_level_steps=1,
        scale="tanh",
        max_log_scale=None,
    ):
        super().__init__()
        self.config = dict(
            in_channels=in_channels,
            num_levels=num_levels,
            num_steps=num_steps,
            hidden_channels=hidden_channels,
            last_level_steps=last_level_steps,
            scale=scale,
            max_log_scale=max_log_scale,
        )
        self.memory = "plain"
        self.squeeze, self.split = Squeeze(), Split()
        self.levels = nn.ModuleList()
        steps = num_steps if not isinstance(num_steps, int) else [num_steps] * (num_levels - 1) + [last_level_steps]
        hidden = hidden_channels if not isinstance(hidden_channels, int) else [hidden_channels] * num_levels
        if len(steps) != num_levels or len(hidden) != num_levels:
            raise ValueError(
                f"num_levels is {num_levels}, but num_steps {num_steps} and hidden_channels {hidden_channels}: give one number "
                "for each level, or one for all"
            )
        channels = in_channels
        for level_steps, level_hidden in zip(steps, hidden):
            channels *= 4
            bound = max_log_scale or 2 / level_steps
            self.levels.append(
                nn.ModuleList(FlowStep(channels, level_hidden, scale, bound) for _ in range(level_steps))
            )
            channels //= 2

    def latent_shapes(self, image_size):
        """Shapes (C, H, W) of the latents of an image of size image_size (one number, or (H, W))."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        channels, num_levels = self.config["in_channels"], self.config["num_levels"]
        if height % 2**num_levels or width % 2**num_levels:
            raise ValueError(
                f"height {height} and width {width} must both be divisible by 2^num_levels = {2**num_levels}: "
                "crop or pad the image, or build a Glow with fewer levels"
            )
        shapes = []
        for level in range(1, num_levels + 1):
            channels = channels * 4 if level == num_levels else channels * 2
            shapes.append((channels, height // 2**level, width // 2**level))
        return shapes

    def _check(self, x):
        if x.ndim != 4 or x.shape[1] != self.config["in_channels"]:
            raise ValueError(f"expected images (B, {self.config['in_channels']}, H, W), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(
                f"expected floating-point images in [-0.5, 0.5], got {x.dtype}: see flowlib.images.to_tensor"
            )
        self.latent_shapes(tuple(x.shape[2:]))

    def fold(self, **which):
        """What the steps compute with, from their parameters (layers.fold): pass it to forward and inverse where both are
        called, so that it is made once. None in the memory modes that do not keep it."""
        if self.memory != "plain" and torch.is_grad_enabled():
            return None
        return [fold(list(level), **which) for level in self.levels]

    def _run(self, level, x, inverse, folded, log_det):
        """A level's steps, or their inverses in reverse, in the chosen memory mode."""
        steps = self.levels[level]
        if self.memory == "reversible" and torch.is_grad_enabled():
            return run_chain(steps, x, inverse)
        total = x.new_zeros(len(x)) if log_det else None
        for i in reversed(range(len(steps))) if inverse else range(len(steps)):
            run = steps[i].inverse if inverse else steps[i]
            if folded is None:
                x, step_log_det = checkpoint(run, x, None, log_det, use_reentrant=False)
            else:
                x, step_log_det = run(x, folded[level][i], log_det)
            total = total + step_log_det if log_det else None
        return x, total

    def forward(self, x, folded=None, log_det=True):
        """z = f(x): images (B, C, H, W) -> (latents, one tensor a level; log_det (B,) in nats).

        folded: what fold() gave, if it serves several calls. Without log_det, it is not computed, and of no use."""
        self._check(x)
        folded = folded or self.fold(inverse=False, log_det=log_det)
        latents, total = [], x.new_zeros(len(x))
        for i in range(len(self.levels)):
            x = self.squeeze(x)
            x, level_log_det = self._run(i, x, False, folded, log_det)
            total = total + level_log_det if log_det else None
            if i < len(self.levels) - 1:
                x, latent = self.split(x)
                latents.append(latent)
        return (*latents, x), total

    def inverse(self, latents, folded=None, log_det=True):
        """x = g(z): latents as forward returns them -> (images (B, C, H, W); log_det (B,) of g, in nats).

        folded, log_det: as in forward."""
        expected = len(self.levels)
        if len(latents) != expected:
            raise ValueError(f"expected {expected} latents, one for each level, got {len(latents)}")
        folded = folded or self.fold(forward=False, log_det=log_det)
        x, total = latents[-1], latents[-1].new_zeros(len(latents[-1]))
        for i in reversed(range(expected)):
            if i < expected - 1:
                x = self.split.inverse(x, latents[i])
            x, level_log_det = self._run(i, x, True, folded, log_det)
            total = total + level_log_det if log_det else None
            x = self.squeeze.inverse(x)
        return x, total

    def log_prob(self, x):
        """log p(x) = log p(f(x)) + log |det Df(x)|, equation (6): (B,) in nats."""
        latents, log_det = self.forward(x)
        return standard_normal_log_prob(latents) + log_det

    def bits_per_dim(self, x, num_bins=256):
        """-log2 p(x) per dimension, in bits (B,), of dequantised images whose num_bins grey levels fill an interval of 1."""
        num_dims = x[0].numel()
        return (-self.log_prob(x) / num_dims + math.log(num_bins)) / math.log(2)

    def sample(self, num_samples, image_size, temperature=1.0, generator=None):
        """Images (num_samples, C, H, W) = g(temperature * z), z ~ N(0, I) drawn with the generator."""
        weight = next(self.parameters())
        shapes = self.latent_shapes(image_size)
        latents = [temperature * torch.randn(num_samples, *s, generator=generator).to(weight) for s in shapes]
        return self.inverse(latents)[0]

    def mode(self, image_size):
        """g(0), the paper's initial guess x_0: (1, C, H, W)."""
        weight = next(self.parameters())
        return self.inverse([weight.new_zeros(1, *s) for s in self.latent_shapes(image_size)])[0]

    @property
    def initialized(self):
        return bool(self.levels[0][0].actnorm.initialized)

    @torch.no_grad()
    def initialize(self, x):
        """Sets every ActNorm from a batch of images (B, C, H, W), once, before training.

        Raises RuntimeError where it was done before (a loaded or trained flow)."""
        self._check(x)
        if self.initialized:
            raise RuntimeError("this Glow is initialised already; initialise a new one, or train on without")
        for i, level in enumerate(self.levels):
            x = self.squeeze(x)
            for step in level:
                x = step.initialize(x)
            if i < len(self.levels) - 1:
                x, _ = self.split(x)


def standard_normal_log_prob(latents):
    """log N(z; 0, I) summed over all latents: (B,) in nats."""
    return sum(-0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2, 3)) for z in latents)


def set_compute_dtype(model, dtype):
    """Lets every coupling net, U-Net and ResNet in the model compute in dtype (torch.bfloat16; None: as the input).

    Weights, affine maps and log-determinants keep their precision."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype


MEMORY_MODES = ("plain", "reversible", "checkpoint")


def set_memory(model, mode):
    """How every Glow in the model backpropagates: "plain" keeps all activations; "reversible" keeps one tensor a level
    and recomputes the rest from it by inversion; "checkpoint" keeps each step's input, where the inverse is not trusted."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"unknown memory mode {mode!r}; choose one of {', '.join(MEMORY_MODES)}")
    for module in model.modules():
        if isinstance(module, Glow):
            module.memory = mode
