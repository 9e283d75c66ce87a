"""flowlib and deepinv in each other's place, on small random images: what book/use.md shows, what
tests/test_deepinv.py asserts, and what results/benchmarks/deepinv.json records.

Run, where deepinv 0.5 is installed: python book/examples/deepinv_both_ways.py"""

import torch

from flowlib import Blur, Glow, GlowProx, Inpainting, UnfoldedPGD
from flowlib.operators import LinearOperator

try:
    import torchvision  # noqa: F401  deepinv asks for it
except RuntimeError:
    # Its wheel on PyPI is for CUDA builds of torch. Beside a CPU build its compiled operators are missing,
    # and its import stops at two of them; deepinv uses neither.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float limit) -> Tensor")
import deepinv


# [theirs here]
class FromDeepinv(LinearOperator):
    """A linear physics of deepinv as a flowlib operator; measure() draws the physics' own noise."""

    def __init__(self, physics):
        super().__init__()
        self.physics = physics  # a module, so that .to(device) reaches its buffers

    def A(self, x):
        return self.physics.A(x)

    def A_adjoint(self, y):
        return self.physics.A_adjoint(y)

    def measure(self, x, generator=None):
        return self.physics(x)


# [ours there]
class ToDeepinv(deepinv.physics.LinearPhysics):
    """A flowlib operator as a physics of deepinv."""

    def __init__(self, operator):
        noise = deepinv.physics.GaussianNoise(operator.sigma) if operator.sigma else None
        super().__init__(
            A=lambda x, **kwargs: operator.A(x),
            A_adjoint=lambda y, **kwargs: operator.A_adjoint(y),
            noise_model=noise or deepinv.physics.ZeroNoise(),
        )
        self.operator = operator


class FlowDenoiser(torch.nn.Module):
    """A flow as the denoiser of deepinv's plug-and-play prior; what deepinv calls sigma is our λ."""

    def __init__(self, glow):
        super().__init__()
        self.prox = GlowProx(glow)

    def forward(self, x, sigma, **kwargs):
        return self.prox(x, sigma)


class FlowReconstructor(deepinv.models.Reconstructor):
    """A whole solver of ours as a model of deepinv, for its trainer and its metrics."""

    def __init__(self, solver):
        super().__init__()
        self.solver = solver

    def forward(self, y, physics, **kwargs):
        return self.solver(y, FromDeepinv(physics))


# [both]
@torch.no_grad()
def differences():
    """{what is compared: largest difference}: each time the same computation, once in either package."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64) - 0.5
    glow = Glow(num_levels=3, num_steps=2, hidden_channels=16)
    glow.initialize(x)
    start = glow.mode(64)
    solver = UnfoldedPGD([GlowProx(glow)] * 3, start, step_size=0.5, shrinkage=0.1)
    blur, hole = Blur(sigma_b=5.0, kernel_size=3), Inpainting(mask_size=19)

    # Their physics here. Their default padding is "valid", which makes measurements smaller than images.
    kernel = torch.outer(blur.kernel, blur.kernel)[None, None].float()
    their_blur = deepinv.physics.Blur(filter=kernel, padding="circular")
    their_hole = deepinv.physics.Inpainting(img_size=(3, 64, 64), mask=hole.mask.expand(3, -1, -1))
    found = {}
    for name, ours, theirs in (("blur", blur, their_blur), ("hole", hole, their_hole)):
        y = ours.measure(x)
        found[f"measurement, {name}"] = y - FromDeepinv(theirs).measure(x)
        found[f"our solver with their {name}"] = solver(y, ours) - solver(y, FromDeepinv(theirs))

    # Our operator, and our flow, there: three iterations of their proximal gradient descent.
    pgd = deepinv.optim.PGD(
        prior=deepinv.optim.PnP(FlowDenoiser(glow)),
        data_fidelity=deepinv.optim.L2(),
        stepsize=0.5,
        g_param=0.1,
        max_iter=3,
        custom_init=lambda y, physics: start.expand_as(y),
    )
    y = blur.measure(x)
    found["their PGD with our flow and blur"] = solver(y, blur) - pgd(y, ToDeepinv(blur))
    found["our solver as their model"] = solver(y, blur) - FlowReconstructor(solver)(y, ToDeepinv(blur))
    return {name: difference.abs().max().item() for name, difference in found.items()}


# [end]
def main():
    from companion.files import write_json
    from companion.paths import RESULTS
    from companion.provenance import provenance

    record = {"deepinv": deepinv.__version__, "differences": differences(), **provenance()}
    write_json(RESULTS / "benchmarks/deepinv.json", record)
    print(record)


if __name__ == "__main__":
    main()
