"""Flows and solvers with an operator of one's own, written by PyTorch's own exporters, compute the same."""

import onnxruntime
import pytest
import torch

from flowlib import Blur, Glow, GlowProx, Inpainting, LinearOperator, ResNetProx, UnfoldedPGD
from tests.test_flow import randomize


class Mean(LinearOperator):
    """Of a pixel and its neighbour."""

    def A(self, x):
        return (x + x.roll(1, dims=-1)) / 2

    def A_adjoint(self, y):
        return (y + y.roll(-1, dims=-1)) / 2


class Solve(torch.nn.Module):
    """A solver with its operator: one tensor in, one out."""

    def __init__(self, prox, operator, num_folds=2):
        super().__init__()
        self.solver = UnfoldedPGD([prox] * num_folds, torch.zeros(1, 3, 8, 8))
        self.operator = operator

    def forward(self, y):
        return self.solver(y, self.operator)


class Back(torch.nn.Module):
    def __init__(self, glow):
        super().__init__()
        self.glow = glow

    def forward(self, x):
        latents, log_det = self.glow(x)
        return self.glow.inverse(latents)[0], self.glow.log_prob(x) + log_det


def flow(**options):
    return randomize(Glow(num_levels=2, num_steps=2, hidden_channels=8, **options), scale=0.1)


MODELS = {
    "flow": flow,
    "sigmoid flow": lambda: flow(scale="sigmoid", scale_bias=0.1, contiguous_squeeze=True),
    "inverse": lambda: Back(flow()),
    "own operator": lambda: Solve(ResNetProx(4), Mean()),
    "composition, flow": lambda: Solve(GlowProx(flow()), Inpainting(3, 8) @ Mean(), 1),
}


def outputs(result):
    """A tuple of tensors, whatever is nested in it."""
    return (result,) if isinstance(result, torch.Tensor) else sum(map(outputs, result), ())


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def images(num):
    return torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(num)) - 0.5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, tmp_path):
    """For batches of any size. ONNX knows no inverse of a matrix."""
    model = made(name)
    axes = {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
    torch.onnx.export(model, (images(2),), tmp_path / "m.onnx", dynamo=False, **axes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for num in (2, 3):
        found = session.run(None, {"x": images(num).numpy()})
        for ours, theirs in zip(outputs(model(images(num))), found, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=1e-5)


def test_onnx_of_a_blur(tmp_path):
    model = Solve(ResNetProx(4), Blur()).eval()
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(model, (images(2),), tmp_path / "m.onnx", dynamo=False, input_names=["x"])
    [found] = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": images(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, gradients", [("flow", True), ("inverse", False), ("composition, flow", False)]
)
def test_torch_export(name, gradients):
    model, shapes = made(name), ({0: torch.export.Dim("batch", max=64)},)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (images(2),), dynamic_shapes=shapes)
    assert "mkldnn" not in str(program.graph)  # which only this processor has
    for num in (2, 3):
        for ours, theirs in zip(outputs(model(images(num))), outputs(program.module()(images(num)))):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
