"""Export of a flow solver to ONNX, to run it where there is no PyTorch: in a browser, in another program.

The graph is written node by node, because tracing one of this many small layers takes minutes."""

import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from flowlib.files import write_atomically
from flowlib.layers import fold
from flowlib.prox import GlowProx
from flowlib.solver import UnfoldedPGD

# What the graph of a task takes beside y: the mask, or the matrix of the blur along one axis.
OPERATOR_DATA = {"denoising": None, "inpainting": "mask", "deblurring": "blur"}


class _Graph:
    """An ONNX graph in the making; calling it adds a node and returns the name of its output."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def __call__(self, operation, *inputs, outputs=None, **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs or 1)]
        self.nodes.append(helper.make_node(operation, inputs, names, **attributes))
        return names if outputs else names[0]

    def constant(self, values):
        """A constant; large ones as 16-bit integers with a scale for each row, which costs about 1e-4."""
        values = values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if not np.isfinite(values).all():
            raise ValueError("the solver has weights that are not finite: train it again")
        if values.dtype == np.float32 and values.size >= 256:
            rows = np.abs(values).reshape(len(values), -1).max(axis=1).reshape(-1, *[1] * (values.ndim - 1))
            scale = np.maximum(rows, 1e-30) / 32767
            whole = self("Cast", self._keep(np.round(values / scale).astype(np.int16)), to=TensorProto.FLOAT)
            return self("Mul", whole, self._keep(scale.astype(np.float32)))
        return self._keep(values)

    def _keep(self, values):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def conv(self, x, weight_and_bias, size=1):
        return self("Conv", x, *weight_and_bias, kernel_shape=[size, size], pads=[size // 2] * 4)


class _Step:
    """A FlowStep with its ActNorms folded into the convolutions and its 1x1 matrix inverted."""

    def __init__(self, graph, step):
        [folded] = fold([step])

        def kept(weight, bias):
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
            return graph.constant(weight), graph.constant(bias.flatten())

        self.graph, self.bound = graph, graph.constant(np.float32(step.coupling.max_log_scale))
        self.linear, self.inverse_linear = kept(*folded.linear), kept(*folded.inverse_linear)
        # Raw scales and shifts alternate: sort them.
        first, second, last = folded.convs
        self.convs = [kept(*first), kept(*second), kept(*(torch.cat([v[0::2], v[1::2]]) for v in last))]

    def _log_scale_and_shift(self, x_b):
        graph, (first, second, last) = self.graph, self.convs
        h = graph("Relu", graph.conv(x_b, first, 3))
        h = graph("Relu", graph.conv(h, second))
        raw, t = graph("Split", graph.conv(h, last, 3), outputs=2, axis=1, num_outputs=2)
        return graph("Mul", graph("Tanh", raw), self.bound), t

    def __call__(self, x):
        graph = self.graph
        x_a, x_b = graph("Split", graph.conv(x, self.linear), outputs=2, axis=1, num_outputs=2)
        log_s, t = self._log_scale_and_shift(x_b)
        return graph("Concat", graph("Add", graph("Mul", x_a, graph("Exp", log_s)), t), x_b, axis=1)

    def inverse(self, y):
        graph = self.graph
        y_a, y_b = graph("Split", y, outputs=2, axis=1, num_outputs=2)
        log_s, t = self._log_scale_and_shift(y_b)
        x_a = graph("Div", graph("Sub", y_a, t), graph("Exp", log_s))
        return graph.conv(graph("Concat", x_a, y_b, axis=1), self.inverse_linear)


def _prox(graph, glow, x, shrinkage, shape):
    """(name of f⁻¹(f(x) / (1 + shrinkage)), name of ‖f(x)‖) for an image of this shape (C, H, W)."""
    channels, height, width = shape
    levels = [[_Step(graph, step) for step in level] for level in glow.levels]
    divisor = graph("Add", shrinkage, graph.constant(np.float32([1])))
    latents = []
    for i, steps in enumerate(levels):
        blocks = [1, channels, height // 2, 2, width // 2, 2]
        channels, height, width = 4 * channels, height // 2, width // 2
        x = graph("Transpose", graph("Reshape", x, graph.constant(np.int64(blocks))), perm=[0, 1, 3, 5, 2, 4])
        x = graph("Reshape", x, graph.constant(np.int64([1, channels, height, width])))
        for step in steps:
            x = step(x)
        if i < len(levels) - 1:
            channels //= 2
            x, latent = graph("Split", x, outputs=2, axis=1, num_outputs=2)
            latents.append(latent)
    latents.append(x)
    squares = graph("Sum", *(graph("ReduceSumSquare", z, keepdims=0) for z in latents))
    shrunk = [graph("Div", z, divisor) for z in latents]
    x = shrunk.pop()
    for i, steps in reversed(list(enumerate(levels))):
        if i < len(levels) - 1:
            x = graph("Concat", x, shrunk.pop(), axis=1)
        for step in reversed(steps):
            x = step.inverse(x)
        x = graph("DepthToSpace", x, blocksize=2, mode="CRD")
    return x, graph("Sqrt", graph("Reshape", squares, graph.constant(np.int64([1]))))


def _apply(graph, task, x, adjoint=False):
    """A x, or Aᵀ x."""
    if task == "denoising":
        return x
    if task == "inpainting":
        return graph("Mul", "mask", x)
    transposed = graph("Transpose", "blur", perm=[1, 0])
    left, right = (transposed, "blur") if adjoint else ("blur", transposed)
    return graph("MatMul", graph("MatMul", left, x), right)


@torch.no_grad()
def export_onnx(solver: UnfoldedPGD, task: str, path: str | Path) -> None:
    """Writes the solver of a task, "denoising", "inpainting" or "deblurring", as an ONNX file for one image.

    Inputs: y (1, C, H, W); mask (1, 1, H, W) for inpainting, blur (H, H) for deblurring of square images
    (`Blur.matrix`); step_size and shrinkage (K,), so that they can be moved. Outputs: folds (K, C, H, W), the
    images x_k, and latent_norms (K,), ``‖f_k(x̃_k)‖``. Raises ValueError for a solver without flows, or with
    another scale rule than "tanh", or images that are not square for deblurring."""
    if not all(isinstance(prox, GlowProx) for prox in solver.proxes):
        raise ValueError("only solvers with a flow can be exported: others have no shrinkage to move")
    for module in solver.modules():
        if getattr(module, "scale", "tanh") != "tanh" or getattr(module, "contiguous", False):
            rule = getattr(module, "scale", "contiguous_squeeze")
            raise ValueError(f"only the rule 'tanh' and the usual squeeze can be exported, not {rule!r}")
    if task == "deblurring" and solver.x0.shape[2] != solver.x0.shape[3]:
        raise ValueError(f"deblurring can be exported for square images, not {tuple(solver.x0.shape[2:])}")
    solver, graph = copy.deepcopy(solver).float(), _Graph()
    num_folds, (_, *shape) = solver.num_folds, solver.x0.shape
    data = {None: [], "mask": [("mask", [1, 1, *shape[1:]])], "blur": [("blur", [shape[1], shape[1]])]}
    scalars = [("step_size", [num_folds]), ("shrinkage", [num_folds])]
    inputs = [("y", [1, *shape]), *data[OPERATOR_DATA[task]], *scalars]
    each = dict(outputs=num_folds, axis=0, num_outputs=num_folds)
    step_sizes, shrinkages = (graph("Split", name, **each) for name, _ in scalars)
    x, images, norms = graph.constant(solver.x0), [], []
    for prox, step_size, shrinkage in zip(solver.proxes, step_sizes, shrinkages):
        residual = _apply(graph, task, graph("Sub", "y", _apply(graph, task, x)), adjoint=True)
        x = graph("Add", x, graph("Mul", step_size, residual))
        x, norm = _prox(graph, prox.glow, x, shrinkage, shape)
        images.append(x)
        norms.append(norm)
    outputs = [("folds", [num_folds, *shape]), ("latent_norms", [num_folds])]
    for (name, _), values in zip(outputs, (images, norms)):
        graph.nodes.append(helper.make_node("Concat", values, [name], axis=0))

    def described(tensors):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in tensors]

    parts = described(inputs), described(outputs), graph.constants
    described_graph = helper.make_graph(graph.nodes, "UnfoldedPGD", *parts)
    # Versions which onnxruntime-web reads.
    model = helper.make_model(described_graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    write_atomically(Path(path), lambda p: onnx.save(model, p))
