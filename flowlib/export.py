"""Export of a flow solver to ONNX, to run it without PyTorch: in a browser, in another program. The graph is
written node by node, because tracing so many small layers takes minutes, and as loops over folds and steps,
because a runtime prepares a node more slowly than it runs it. `torch.onnx.export(..., dynamo=False)` exports
other solvers, and flows."""

import copy
import functools
import itertools
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from flowlib.files import write_atomically
from flowlib.fused import fuse
from flowlib.operators import Blur, Denoising, Inpainting, LinearOperator
from flowlib.precision import set_compute_dtype
from flowlib.prox import GlowProx
from flowlib.solver import UnfoldedPGD


class _Graph:
    """An unfinished ONNX graph, or the body of a loop in one. A call adds a node and returns the name of its
    output."""

    def __init__(self, outer=None):
        self.nodes, self.constants = [], outer.constants if outer else []
        self.numbers = outer.numbers if outer else itertools.count()

    def name(self):
        return f"v{next(self.numbers)}"

    def __call__(self, operation, *inputs, outputs=None, **attributes):
        names = [self.name() for _ in range(outputs or 1)]
        self.nodes.append(helper.make_node(operation, inputs, names, **attributes))
        return names if outputs else names[0]

    def constant(self, values):
        values = values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if not np.isfinite(values).all():
            raise ValueError("the solver has weights that are not finite: train it again")
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), self.name()))
        return self.constants[-1].name

    def scan(self, body, state, slices, reverse=False):
        """A loop along the first axis of all slices: body(graph, state, *slice) gives the next state, then
        other results. Returns the names of the last state and of the other results, stacked."""
        inner, inputs = _Graph(self), [self.name() for _ in (state, *slices)]
        ends = inputs, body(inner, *inputs)
        infos = ([onnx.ValueInfoProto(name=name) for name in names] for names in ends)
        loop = helper.make_graph(inner.nodes, self.name(), *infos)
        directions = [int(reverse)] * len(slices)
        options = dict(body=loop, num_scan_inputs=len(slices), scan_input_directions=directions)
        return self("Scan", state, *slices, outputs=len(ends[1]), **options)

    def split(self, x, parts=2):
        return self("Split", x, outputs=parts, axis=1, num_outputs=parts)

    def conv(self, x, weight, bias, size=1):
        return self("Conv", x, weight, bias, kernel_shape=[size, size], pads=[size // 2] * 4)


def _weights(graph, levels):
    """Names of the weights of one level of all folds, (K, number of steps, ...) each: of the affine maps,
    their inverses, and the convolutions."""
    steps = [step for level in levels for step in fuse(list(level))]
    maps = zip(*((step.affine, step.inverse_affine, *step.convs) for step in steps))
    pairs = [[torch.stack(v).unflatten(0, (len(levels), -1)) for v in zip(*found)] for found in maps]
    affine = [[weight[..., None, None], bias.flatten(2)] for weight, bias in pairs[:2]]
    # Raw scales and shifts alternate: sort them.
    pairs[-1] = [torch.cat([v[:, :, 0::2], v[:, :, 1::2]], dim=2) for v in pairs[-1]]
    convs = list(itertools.chain(*pairs[2:]))
    return [[graph.constant(values) for values in part] for part in (*affine, convs)]


def _step(graph, x, weight, bias, *convs, bound, inverse=False):
    """[a flow step of x], or of its inverse. weight, bias: its affine map, or the inverse of that; convs:
    weight and bias of each convolution; bound: of log s, or for the inverse of -log s."""
    x_a, x_b = graph.split(x if inverse else graph.conv(x, weight, bias))
    h, zero = x_b, graph.constant(np.float32(0))
    for size, conv, shift in zip((3, 1, 3), convs[0::2], convs[1::2]):
        # In WebAssembly, Relu branches at every number: a fifth of the whole time.
        h = h if h == x_b else graph("Max", h, zero)
        h = graph.conv(h, conv, shift, size)
    raw, t = graph.split(h)
    s = graph("Exp", graph("Mul", graph("Tanh", raw), bound))
    y_a = graph("Mul", graph("Sub", x_a, t), s) if inverse else graph("Add", graph("Mul", x_a, s), t)
    y = graph("Concat", y_a, x_b, axis=1)
    return [graph.conv(y, weight, bias) if inverse else y]


def _prox(graph, glow, x, shrinkage, weights):
    """(name of f⁻¹(f(x) / (1 + shrinkage)), name of ‖f(x)‖) for an image x; weights: names for each level."""
    latents, bounds = [], [level[0].coupling.max_log_scale for level in glow.levels]
    for level, (affine, _, convs), bound in zip(glow.levels, weights, bounds):
        # SpaceToDepth orders channels as (row, column, c).
        order = np.arange(len(level[0].invconv.weight)).reshape(4, -1).T.flatten()
        x = graph("Gather", graph("SpaceToDepth", x, blocksize=2), graph.constant(order), axis=1)
        step = functools.partial(_step, bound=graph.constant(np.float32(bound)))
        [x] = graph.scan(step, x, affine + convs)
        if level is not glow.levels[-1]:
            x, latent = graph.split(x)
            latents.append(latent)
    latents.append(x)
    squares = graph("Sum", *(graph("ReduceSumSquare", z, keepdims=0) for z in latents))
    divisor = graph("Add", shrinkage, graph.constant(np.float32(1)))
    x = None
    for (_, affine, convs), bound in zip(reversed(weights), reversed(bounds)):
        latent = graph("Div", latents.pop(), divisor)
        x = graph("Concat", x, latent, axis=1) if x else latent
        step = functools.partial(_step, bound=graph.constant(np.float32(-bound)), inverse=True)
        [x] = graph.scan(step, x, affine + convs, reverse=True)
        x = graph("DepthToSpace", x, blocksize=2, mode="CRD")
    return x, graph("Sqrt", squares)


def _apply(graph, operator, x, mask, adjoint=False):
    """A x, or Aᵀ x."""
    if operator is Blur:
        transposed = graph("Transpose", "blur", perm=[1, 0])
        left, right = (transposed, "blur") if adjoint else ("blur", transposed)
        return graph("MatMul", graph("MatMul", left, x), right)
    if operator is Denoising:
        return x
    measured = graph("Cast", mask, to=TensorProto.BOOL)
    return graph("Where", measured, x, graph.constant(np.float32(0)))  # 0 * NaN would be NaN


@torch.no_grad()
def export_onnx(solver: UnfoldedPGD, operator: LinearOperator, path: str | Path) -> None:
    """Writes the solver as an ONNX file for one image, measured by an operator of the given one's class:
    Denoising, Inpainting or Blur. Inputs: y (1, C, H, W); for Inpainting mask (K, 1, H, W), one for each
    fold; for Blur of square images blur (H, H) (`Blur.matrix`); step_size and shrinkage (K,). Outputs: folds
    (K, C, H, W), the images x_k, and latent_norms (K,), ``‖f_k(x̃_k)‖``. Raises ValueError for another
    operator, and for a solver without flows, with flows of unequal sizes or another scale rule than "tanh",
    with `literal_last_fold`, or of images that are not square for Blur."""
    if not all(isinstance(prox, GlowProx) for prox in solver.proxes):
        raise ValueError("only solvers with a flow can be exported: others have no shrinkage to move")
    flows = [prox.glow for prox in copy.deepcopy(solver.proxes).cpu().float()]
    for flow in flows:
        set_compute_dtype(flow, None)
    config = flows[0].config
    if any(flow.config != config for flow in flows):
        raise ValueError("only solvers whose flows are all of one size can be exported")
    if config["scale"] != "tanh" or np.any(config["contiguous_squeeze"]):
        raise ValueError(f"only the rule 'tanh' and the usual squeeze can be exported, not {config}")
    kind, (*_, height, width) = type(operator), solver.x0.shape
    given = {Denoising: {}, Inpainting: {"mask": [solver.num_folds, 1, height, width]}}
    given |= {Blur: {"blur": [height, width]}}
    if kind not in given:
        raise ValueError(f"an operator can be a Denoising, an Inpainting or a Blur, not {operator!r}")
    if solver.literal_last_fold:
        raise ValueError("only solvers whose last fold is whole can be exported: set literal_last_fold=False")
    if kind is Blur and height != width:
        raise ValueError(f"Blur can be exported for square images, not {(height, width)}")
    graph, num_folds, (_, *shape) = _Graph(), solver.num_folds, solver.x0.shape
    levels = [_weights(graph, level) for level in zip(*(flow.levels for flow in flows))]

    def one_fold(body, x, step_size, shrinkage, *rest):
        names = iter(rest)
        parts = [[list(itertools.islice(names, len(part))) for part in level] for level in levels]
        mask = next(names, None)
        residual = body("Sub", "y", _apply(body, kind, x, mask))
        x = body("Add", x, body("Mul", step_size, _apply(body, kind, residual, mask, adjoint=True)))
        x, norm = _prox(body, flows[0], x, shrinkage, parts)
        return [x, body("Squeeze", x, body.constant(np.int64([0]))), norm]

    weights = [name for level in levels for part in level for name in part]
    masks = ["mask"] if kind is Inpainting else []
    x0 = graph.constant(solver.x0.cpu().float())
    _, *results = graph.scan(one_fold, x0, ["step_size", "shrinkage", *weights, *masks])
    inputs = {"y": [1, *shape], **given[kind], "step_size": [num_folds], "shrinkage": [num_folds]}
    outputs = {"folds": [num_folds, *shape], "latent_norms": [num_folds]}
    for result, name in zip(results, outputs):
        graph.nodes.append(helper.make_node("Identity", [result], [name]))
    info = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    described = ([info(name, shape=size) for name, size in ends.items()] for ends in (inputs, outputs))
    whole = helper.make_graph(graph.nodes, "UnfoldedPGD", *described, graph.constants)
    # Versions which onnxruntime-web reads.
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    write_atomically(path, lambda p: onnx.save(model, p))
