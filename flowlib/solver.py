"""The unfolded proximal gradient solver, the paper's algorithm."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowlib.glow import Glow, standard_normal_log_prob
from flowlib.layers import sum_dtype, without_autocast
from flowlib.operators import LinearOperator


class Fold(NamedTuple):
    """What one fold did, detached: x_tilde, x (B, C, H, W); for flow proxes also (B,), else None, the norms
    ``‖f(x_tilde)‖`` and ``‖z‖`` after shrinkage, and log p_k(x_tilde), log p_k(x) in nats."""

    x_tilde: Tensor
    x: Tensor
    latent_norm_tilde: Tensor | None = None
    latent_norm: Tensor | None = None
    log_prob_tilde: Tensor | None = None
    log_prob: Tensor | None = None


class UnfoldedPGD(nn.Module):
    """K folds of x̃_k = x_{k-1} + μ_k Aᵀ(y - A x_{k-1}), x_k = prox_k(x̃_k, λ_k), equations (8)-(11).

    proxes: one a fold (see Prox). x0: the initial guess (1, C, H, W), the paper's g(0). step_size (μ),
    shrinkage (λ): start values of the trainable scalars, one number or one a fold; λ only where a prox uses
    it. μ should start near 1 / ‖A‖², `1 / operator.norm_squared(x0)`; 0.5 suits operators of norm 1. The
    estimate is x_K; with literal_last_fold it is x̃_K, which is what equation (12) says if taken at its
    word: the last prox is then without effect and gets no gradient. Raises ValueError without a prox."""

    def __init__(
        self,
        proxes: Sequence[nn.Module],
        x0: Tensor,
        step_size: float | Sequence[float] = 0.5,
        shrinkage: float | Sequence[float] = 0.1,
        literal_last_fold: bool = False,
    ) -> None:
        super().__init__()
        self.proxes, num_folds = nn.ModuleList(proxes), len(proxes)
        if not num_folds:
            raise ValueError("a solver needs one prox for each of its folds, at least one")
        if not bool((torch.as_tensor(shrinkage, device="cpu") > -1).all()):
            raise ValueError(f"shrinkage must be > -1, as latents are divided by 1 + shrinkage: {shrinkage}")
        self.literal_last_fold = literal_last_fold
        self.register_buffer("x0", x0.detach().clone())
        like = dict(dtype=self.x0.dtype, device=self.x0.device)
        start = torch.as_tensor(step_size, **like)
        self.step_size = nn.Parameter(start.expand(num_folds).clone())
        self.shrinkage = [None] * num_folds
        if any(getattr(prox, "uses_shrinkage", False) for prox in proxes):
            start = torch.as_tensor(shrinkage, **like)
            self.shrinkage = nn.Parameter(start.expand(num_folds).clone())

    @property
    def num_folds(self) -> int:
        """K."""
        return len(self.proxes)

    def forward(
        self, y: Tensor, operator: LinearOperator | Sequence[LinearOperator], return_folds: bool = False
    ) -> Tensor | tuple[Tensor, list[Fold]]:
        """Measurements y (B, C, H, W) and the operator that made them, or a list of K -> x_hat (B, C, H, W);
        with return_folds: (x_hat, list of K Fold). Raises ValueError where y does not fit x0, or there are
        not as many operators as folds."""
        if y.shape[1:] != self.x0.shape[1:]:
            raise ValueError(f"measurements {tuple(y.shape)} do not fit x0 of shape {tuple(self.x0.shape)}")
        dtype = self.x0.dtype
        inexact = y.is_floating_point() or y.is_complex()  # as in MRI; its Aᵀ gives real images
        if not inexact or torch.promote_types(y.dtype.to_real(), dtype) != dtype:
            types = f"{y.dtype} do not fit a solver of {dtype}"
            raise ValueError(f"measurements of {types}: see flowlib.images.to_tensor, or y.to({dtype})")
        several = isinstance(operator, (list, tuple, nn.ModuleList))
        operators = operator if several else [operator] * self.num_folds
        x, folds = self.x0.expand(y.shape[0], -1, -1, -1), []
        for prox, mu, lam, op in zip(self.proxes, self.step_size, self.shrinkage, operators, strict=True):
            with without_autocast(x):
                x_tilde = x + mu * op.A_adjoint(y - op.A(x))
            if x_tilde.dtype != dtype:
                raise ValueError(
                    f"A_adjoint gave {x_tilde.dtype}, the solver is of {dtype}: operator.to({dtype})"
                )
            x = prox(x_tilde, lam).to(dtype)  # which autocast may have made 16 bits wide
            if return_folds:
                folds.append(describe_fold(prox, lam, x_tilde, x))
        x_hat = x_tilde if self.literal_last_fold else x
        return (x_hat, folds) if return_folds else x_hat


@torch.no_grad()
def describe_fold(prox: nn.Module, shrinkage: Tensor | None, x_tilde: Tensor, x: Tensor) -> Fold:
    """The Fold of x = prox(x_tilde, shrinkage)."""
    glow = getattr(prox, "glow", None)
    if not isinstance(glow, Glow) or shrinkage is None:
        return Fold(x_tilde.detach(), x.detach())
    latents, log_det = glow(torch.cat([x_tilde, x]))  # one pass for both, as weights are folded for each
    norm = sum(z.to(sum_dtype(z)).square().sum(dim=(1, 2, 3)) for z in latents).sqrt()[: len(x)]
    log_probs = (standard_normal_log_prob(latents) + log_det).chunk(2)
    return Fold(x_tilde.detach(), x.detach(), norm, norm / (1 + shrinkage), *log_probs)


def find_nonfinite_fold(folds: Sequence[Fold]) -> str | None:
    """Where a reconstruction first stopped being finite, e.g. "fold 2: the proximal mapping", or None."""
    for k, fold in enumerate(folds, start=1):
        for values, what in ((fold.x_tilde, "data-consistency step"), (fold.x, "proximal mapping")):
            if not bool(torch.isfinite(values).all()):
                return f"fold {k}: the {what}"
    return None
