"""The unfolded proximal gradient solver, the paper's algorithm."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowlib.folds import Fold, describe_fold
from flowlib.operators import LinearOperator
from flowlib.precision import without_autocast


class UnfoldedPGD(nn.Module):
    """K folds of x̃_k = x_{k-1} + μ_k Aᵀ(y - A x_{k-1}), x_k = prox_k(x̃_k, λ_k), equations (8)-(11).

    proxes: one a fold (see Prox). x0: the initial guess (1, C, H, W), the paper's g(0). step_size (μ),
    shrinkage (λ): start values of the trainable scalars, one number or one a fold; λ only where a prox uses
    it. μ should start near 1 / ‖A‖², `1 / operator.norm_squared(x0)`; 0.5 suits operators of norm 1. The
    estimate is x_K; with literal_last_fold it is x̃_K, equation (12) taken literally: the last
    prox then has no effect and gets no gradient. Raises ValueError without a prox."""

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
        self._check(y)
        x, folds = self.x0.expand(y.shape[0], -1, -1, -1), []
        for prox, mu, lam, op in self._folds(operator):
            with without_autocast(x):
                x_tilde = self._typed(x + mu * op.A_adjoint(y - op.A(x)))
            x = prox(x_tilde, lam).to(x_tilde.dtype)  # as autocast may give 16 bits
            if return_folds:
                folds.append(describe_fold(prox, lam, x_tilde, x))
        x_hat = x_tilde if self.literal_last_fold else x
        return (x_hat, folds) if return_folds else x_hat

    def _folds(self, operator):
        """(prox, μ, λ, operator) of each fold."""
        several = isinstance(operator, (list, tuple, nn.ModuleList))
        operators = operator if several else [operator] * self.num_folds
        return zip(self.proxes, self.step_size, self.shrinkage, operators, strict=True)

    def _check(self, y):
        if y.shape[1:] != self.x0.shape[1:]:
            raise ValueError(f"measurements {tuple(y.shape)} do not fit x0 of shape {tuple(self.x0.shape)}")
        dtype = self.x0.dtype
        inexact = y.is_floating_point() or y.is_complex()  # as in MRI; its Aᵀ gives real images
        if not inexact or torch.promote_types(y.dtype.to_real(), dtype) != dtype:
            types = f"{y.dtype} do not fit a solver of {dtype}"
            raise ValueError(f"measurements of {types}: see flowlib.images.to_tensor, or y.to({dtype})")

    def _typed(self, x):
        if x.dtype != self.x0.dtype:
            raise ValueError(
                f"A_adjoint gave {x.dtype}, the solver is of {self.x0.dtype}: operator.to({self.x0.dtype})"
            )
        return x
