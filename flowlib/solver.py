"""The unfolded proximal gradient solver, the paper's algorithm."""

from typing import NamedTuple

import torch
from torch import nn

from flowlib.glow import standard_normal_log_prob


class Fold(NamedTuple):
    """What one fold did, detached: x_tilde, x (B, C, H, W); for flow proxes also the latents' norm ||f(x_tilde)|| and
    ||z|| after shrinkage, and log p_k(x_tilde), log p_k(x) in nats under this fold's flow, each (B,), else None."""

    x_tilde: torch.Tensor
    x: torch.Tensor
    latent_norm_tilde: torch.Tensor | None = None
    latent_norm: torch.Tensor | None = None
    log_prob_tilde: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None


class UnfoldedPGD(nn.Module):
    """K folds of x̃_k = x_{k-1} + μ_k Aᵀ(y - A x_{k-1}), x_k = prox_k(x̃_k, λ_k), equations (8)-(11).

    proxes: one a fold (untied). x0: the initial guess (1, C, H, W), the paper's g(0). step_size (μ), shrinkage (λ):
    start values of the trainable scalars of each fold, one number or one a fold; λ only where the proxes use it.
    The estimate is x_K; with literal_last_fold it is x̃_K, which is what equation (12) says if taken at its word:
    the last prox is then without effect and gets no gradient."""

    def __init__(self, proxes, x0, step_size=0.5, shrinkage=0.1, literal_last_fold=False):
        super().__init__()
        self.proxes = nn.ModuleList(proxes)
        self.literal_last_fold = literal_last_fold
        self.register_buffer("x0", x0.detach().clone())
        num_folds = len(self.proxes)
        self.step_size = nn.Parameter(torch.as_tensor(step_size, dtype=x0.dtype).expand(num_folds).clone())
        if self.proxes[0].uses_shrinkage:
            self.shrinkage = nn.Parameter(torch.as_tensor(shrinkage, dtype=x0.dtype).expand(num_folds).clone())
        else:
            self.shrinkage = [None] * num_folds

    @property
    def num_folds(self):
        return len(self.proxes)

    def forward(self, y, operator, return_folds=False):
        """Measurements y (B, C, H, W) and the operator that made them -> x_hat (B, C, H, W).

        operator: one for all folds, or a list of K. With return_folds: (x_hat, list of K Fold)."""
        if y.shape[1:] != self.x0.shape[1:]:
            raise ValueError(f"measurements of shape {tuple(y.shape)} do not fit x0 of shape {tuple(self.x0.shape)}")
        operators = operator if isinstance(operator, (list, tuple)) else [operator] * self.num_folds
        x, folds = self.x0.expand(len(y), -1, -1, -1), []
        for prox, step_size, shrinkage, operator in zip(
            self.proxes, self.step_size, self.shrinkage, operators, strict=True
        ):
            x_tilde = x + step_size * operator.A_adjoint(y - operator.A(x))
            x = prox(x_tilde, shrinkage)
            if return_folds:
                folds.append(describe_fold(prox, shrinkage, x_tilde, x))
        x_hat = x_tilde if self.literal_last_fold else x
        return (x_hat, folds) if return_folds else x_hat


@torch.no_grad()
def describe_fold(prox, shrinkage, x_tilde, x):
    if not prox.uses_shrinkage:
        return Fold(x_tilde.detach(), x.detach())
    latents, log_det = prox.glow(x_tilde)
    norm = sum(z.square().sum(dim=(1, 2, 3)) for z in latents).sqrt()
    log_prob_tilde = standard_normal_log_prob(latents) + log_det
    return Fold(x_tilde.detach(), x.detach(), norm, norm / (1 + shrinkage), log_prob_tilde, prox.glow.log_prob(x))


def find_nonfinite_fold(folds):
    """Where a reconstruction first stopped being finite, as text, e.g. "fold 2: the proximal mapping"; None if nowhere."""
    for k, fold in enumerate(folds, start=1):
        if not bool(torch.isfinite(fold.x_tilde).all()):
            return f"fold {k}: the data-consistency step"
        if not bool(torch.isfinite(fold.x).all()):
            return f"fold {k}: the proximal mapping"
    return None
