"""Export of a flow solver to ONNX, to run it where there is no PyTorch: in a browser, in another program. The
graph is written node by node, because tracing one of this many small layers takes minutes."""

import copy
import functools
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from flowlib.files import write_atomically
from flowlib.layers import fold
from flowlib.prox import GlowProx
from flowlib.solver import UnfoldedPGD


class _Graph:
    """An ONNX graph in the making; calling it adds a node and returns the name of its output."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def __call__(self, operation, *inputs, outputs=None, **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs or 1)]
        self.nodes.append(helper.make_node(operation, inputs, names, **attributes))
        return names if outputs else names[0]

    def constant(self, values, exact=False):
        """A constant; large ones, but for exact ones, as 16-bit integers with a scale for each row, which
        costs about 1e-4."""
        values = values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if not np.isfinite(values).all():
            raise ValueError("the solver has weights that are not finite: train it again")
        if values.dtype == np.float32 and values.size >= 256 and not exact:
            rows = np.abs(values).reshape(len(values), -1).max(axis=1).reshape(-1, *[1] * (values.ndim - 1))
            scale = np.maximum(rows, 1e-30) / 32767
            whole = self.constant(np.round(values / scale).astype(np.int16))
            whole = self("Cast", whole, to=TensorProto.FLOAT)
            return self("Mul", whole, self.constant(scale.astype(np.float32)))
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def split(self, x, parts=2, axis=1):
        return self("Split", x, outputs=parts, axis=axis, num_outputs=parts)

    def conv(self, x, weight_and_bias, size=1):
        return self("Conv", x, *weight_and_bias, kernel_shape=[size, size], pads=[size // 2] * 4)


class _Step:
    """A FlowStep with its ActNorms folded into the convolutions and its 1x1 matrix inverted."""

    def __init__(self, graph, step):
        [folded] = fold([step])

        def kept(weight, bias):
            # The affine maps are small, and every error in them is passed on through all steps.
            affine = weight.ndim == 2
            weight = weight[:, :, None, None] if affine else weight
            return graph.constant(weight, exact=affine), graph.constant(bias.flatten())

        self.graph, self.bound = graph, graph.constant(np.float32(step.coupling.max_log_scale))
        self.linear, self.inverse_linear = kept(*folded.linear), kept(*folded.inverse_linear)
        # Raw scales and shifts alternate: sort them.
        first, second, last = folded.convs
        self.convs = [kept(*first), kept(*second), kept(*(torch.cat([v[0::2], v[1::2]]) for v in last))]

    def __call__(self, x, inverse=False):
        graph, (first, second, last) = self.graph, self.convs
        x_a, x_b = graph.split(x if inverse else graph.conv(x, self.linear))
        h = graph("Relu", graph.conv(x_b, first, 3))
        h = graph("Relu", graph.conv(h, second))
        raw, t = graph.split(graph.conv(h, last, 3))
        s = graph("Exp", graph("Mul", graph("Tanh", raw), self.bound))
        y_a = graph("Div", graph("Sub", x_a, t), s) if inverse else graph("Add", graph("Mul", x_a, s), t)
        y = graph("Concat", y_a, x_b, axis=1)
        return graph.conv(y, self.inverse_linear) if inverse else y


def _prox(graph, glow, x, shrinkage):
    """(name of f⁻¹(f(x) / (1 + shrinkage)), name of ‖f(x)‖) for an image x."""
    levels = [[_Step(graph, step) for step in level] for level in glow.levels]
    latents = []
    for level, steps in zip(glow.levels, levels):
        # SpaceToDepth orders channels as (row, column, c).
        order = np.arange(len(level[0].invconv.weight)).reshape(4, -1).T.flatten()
        x = graph("Gather", graph("SpaceToDepth", x, blocksize=2), graph.constant(order), axis=1)
        for step in steps:
            x = step(x)
        if steps is not levels[-1]:
            x, latent = graph.split(x)
            latents.append(latent)
    latents.append(x)
    squares = graph("Sum", *(graph("ReduceSumSquare", z, keepdims=0) for z in latents))
    divisor = graph("Add", shrinkage, graph.constant(np.float32([1])))
    for steps in reversed(levels):
        latent = graph("Div", latents.pop(), divisor)
        x = latent if steps is levels[-1] else graph("Concat", x, latent, axis=1)
        for step in reversed(steps):
            x = step(x, inverse=True)
        x = graph("DepthToSpace", x, blocksize=2, mode="CRD")
    return x, graph("Sqrt", graph("Reshape", squares, graph.constant(np.int64([1]))))


def _apply(graph, task, x, adjoint=False):
    """A x, or Aᵀ x."""
    if task == "deblurring":
        transposed = graph("Transpose", "blur", perm=[1, 0])
        left, right = (transposed, "blur") if adjoint else ("blur", transposed)
        return graph("MatMul", graph("MatMul", left, x), right)
    if task == "denoising":
        return x
    measured = graph("Cast", "mask", to=TensorProto.BOOL)
    return graph("Where", measured, x, graph.constant(np.float32(0)))  # 0 * NaN would be NaN


@torch.no_grad()
def export_onnx(solver: UnfoldedPGD, task: str, path: str | Path) -> None:
    """Writes the solver of a task, "denoising", "inpainting" or "deblurring", as an ONNX file for one image.
    Inputs: y (1, C, H, W); mask (1, 1, H, W) for inpainting, blur (H, H) for deblurring of square images
    (`Blur.matrix`); step_size and shrinkage (K,), so that they can be moved. Outputs: folds (K, C, H, W), the
    images x_k, and latent_norms (K,), ``‖f_k(x̃_k)‖``. Raises ValueError for a solver without flows, or with
    another scale rule than "tanh", or images that are not square for deblurring."""
    if not all(isinstance(prox, GlowProx) for prox in solver.proxes):
        raise ValueError("only solvers with a flow can be exported: others have no shrinkage to move")
    for config in (prox.glow.config for prox in solver.proxes):
        if config["scale"] != "tanh" or np.any(config["contiguous_squeeze"]):
            raise ValueError(f"only the rule 'tanh' and the usual squeeze can be exported, not {config}")
    if task == "deblurring" and solver.x0.shape[2] != solver.x0.shape[3]:
        raise ValueError(f"deblurring can be exported for square images, not {tuple(solver.x0.shape[2:])}")
    solver, graph = copy.deepcopy(solver).float(), _Graph()
    num_folds, (_, *shape) = solver.num_folds, solver.x0.shape
    data = dict(denoising={}, inpainting={"mask": [1, 1, *shape[1:]]}, deblurring={"blur": shape[1:]})
    inputs = {"y": [1, *shape], **data[task], "step_size": [num_folds], "shrinkage": [num_folds]}
    x, results = graph.constant(solver.x0), []
    scalars = (graph.split(name, num_folds, axis=0) for name in ("step_size", "shrinkage"))
    for prox, step_size, shrinkage in zip(solver.proxes, *scalars):
        residual = _apply(graph, task, graph("Sub", "y", _apply(graph, task, x)), adjoint=True)
        x = graph("Add", x, graph("Mul", step_size, residual))
        x, norm = _prox(graph, prox.glow, x, shrinkage)
        results.append((x, norm))
    outputs = {"folds": [num_folds, *shape], "latent_norms": [num_folds]}
    for name, values in zip(outputs, zip(*results)):
        graph.nodes.append(helper.make_node("Concat", values, [name], axis=0))
    info = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    described = ([info(name, shape=size) for name, size in ends.items()] for ends in (inputs, outputs))
    whole = helper.make_graph(graph.nodes, "UnfoldedPGD", *described, graph.constants)
    # Versions which onnxruntime-web reads.
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    write_atomically(path, lambda p: onnx.save(model, p))
