"""Muon (Jordan et al. 2024), the optimizer with which flows learnt fastest (the book's page "recipe")."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.AdamW):
    """AdamW, except that kernels of convolutions, as matrices (out, in x taps), move along the orthogonal
    matrix nearest to their momentum.

    A step is 0.2 sqrt(max(out, in x taps)) times the rate long, which makes its entries about as large as
    Adam's (Liu et al. 2025), so that both share one rate. torch.optim.Muon takes only matrices, and computes
    in bfloat16, which is slow on most processors."""

    @torch.no_grad()
    def step(self, closure=None):
        kernels = defaultdict(list)  # of one shape together: many small products are slow
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 4 and p.grad is not None:
                    kernels[p.shape, p.dtype, p.device, group["lr"]].append(p)
        for (shape, *_, lr), params in kernels.items():
            for p in params:
                if not self.state[p]:  # AdamW wants a "step" of every state that it loads
                    self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            momenta = [self.state[p]["momentum"] for p in params]
            gradients = [p.grad for p in params]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            ahead = torch._foreach_lerp(gradients, momenta, 0.95)  # Nesterov's
            updates = nearest_orthogonal(torch.stack([m.flatten(1) for m in ahead]))
            updates = updates * (lr * 0.2 * math.sqrt(max(updates.shape[1:])))
            for p, update in zip(params, updates):
                p.sub_(update.reshape(shape))
                p.grad = None  # AdamW skips parameters without a gradient
        super().step(closure)


def nearest_orthogonal(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """U Vᵀ of each of the matrices U S Vᵀ (B, m, n), about: by Newton-Schulz iterations of fifth order, after
    which singular values lie between 0.7 and 1.2."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)
    for _ in range(num_iterations):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x
