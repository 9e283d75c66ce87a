"""What each fold of a solver did, for plots and to find where it broke down."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowlib.glow import Glow, standard_normal_log_prob
from flowlib.precision import sum_dtype


class Fold(NamedTuple):
    """The result of one fold, detached: x_tilde, x (B, C, H, W). For flow proxes, else None, also (B,): the
    norms ``‖f(x_tilde)‖`` and ``‖z‖`` after shrinkage, and log p_k(x_tilde), log p_k(x) in nats."""

    x_tilde: Tensor
    x: Tensor
    latent_norm_tilde: Tensor | None = None
    latent_norm: Tensor | None = None
    log_prob_tilde: Tensor | None = None
    log_prob: Tensor | None = None


@torch.no_grad()
def describe_fold(prox: nn.Module, shrinkage: Tensor | None, x_tilde: Tensor, x: Tensor) -> Fold:
    """The Fold of x = prox(x_tilde, shrinkage)."""
    glow = getattr(prox, "glow", None)
    if not isinstance(glow, Glow) or shrinkage is None:
        return Fold(x_tilde.detach(), x.detach())
    latents, log_det = glow(torch.cat([x_tilde, x]))  # one pass for both, as weights are fused for each
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
