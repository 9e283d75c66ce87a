"""Maximum a posteriori estimation over the latent codes of a flow: reconstruction without training."""

import math

import torch
from torch import Tensor

from flowlib.glow import Glow
from flowlib.images import floating
from flowlib.operators import LinearOperator
from flowlib.precision import sum_dtype


@torch.no_grad()
def map_estimate(
    flow: Glow,
    operator: LinearOperator,
    y: Tensor,
    weight: float,
    start: Tensor | None = None,
    num_steps: int = 100,
    lr: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """x_hat = g(ẑ) with ẑ = argmin_z ‖y - A g(z)‖² + weight ‖z‖², equation (7), by Adam.

    Measurements y (B, C, H, W) -> (x_hat (B, C, H, W); the objective (num_steps + 1, B): before each step and
    at x_hat). weight: the paper's λ, σ² for noise N(0, σ² I). start: images (B or 1, C, H, W) whose codes
    f(start) are the first ones; None is z = 0. lr: Adam's rate at the start; it falls to zero as a cosine.
    The flow is not changed; no image depends on its batch. The answer depends on the start, as the problem is
    not convex. Where numbers overflow, an image and its objective are NaN.

    Raises ValueError where y or start is not finite or does not fit the flow or the operator, for a negative
    weight, and for num_steps or lr that are not positive."""
    if not (0 <= weight < math.inf and 0 < lr < math.inf and num_steps >= 1):
        raise ValueError(f"weight must be >= 0, lr and num_steps > 0: got {weight}, {lr} and {num_steps}")
    first = next(flow.parameters())
    y = _finite(y, first, "y")
    like = operator.A_adjoint(y) if start is None else _finite(start, first, "start")
    if len(like) not in (1, len(y)) or operator.A(like).shape[1:] != y.shape[1:]:
        raise ValueError(f"y {tuple(y.shape)} does not fit A x or start, x being {tuple(like.shape)}")
    latents, _ = flow(like[:1] if start is None else like, log_det=False)  # refuses images that do not fit
    latents = [torch.zeros_like(z) if start is None else z for z in latents]
    latents = [z.expand(len(y), -1, -1, -1).clone().requires_grad_() for z in latents]
    fused = flow.fuse(forward=False, log_det=False)  # once, and without a graph: weights get no gradient

    def objective():
        x, _ = flow.inverse(latents, fused, log_det=False)
        terms = [y - operator.A(x), *(math.sqrt(weight) * z for z in latents)]
        return x, sum(term.to(sum_dtype(term)).square().flatten(1).sum(1) for term in terms)

    optimizer, values = torch.optim.Adam(latents, lr), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        with torch.enable_grad():
            value = objective()[1]
            gradients = torch.autograd.grad(value.sum(), latents)
        values.append(value.detach())
        for z, gradient in zip(latents, gradients):
            z.grad = gradient
        optimizer.step()
        schedule.step()
    x_hat, value = objective()
    return x_hat, torch.stack([*values, value])


def _finite(images, first, name):
    images = floating(images, first.dtype).to(first.device)
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite: what made it broke down")
    return images
