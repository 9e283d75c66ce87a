"""The solvers of the page, small: convolution weights in 8 bits, which a browser fetches in half the time."""

import copy

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

STEPS = 127  # of a weight's size, as a part of the largest in its row


@torch.no_grad()
def rounded(solver):
    """A copy of a solver whose convolution weights are of 8 bits, with a scale for each row."""
    solver = copy.deepcopy(solver)
    for weight in (p for p in solver.proxes.parameters() if p.ndim == 4 and p.numel() >= 256):
        scale = weight.flatten(1).abs().amax(1).clamp_min(1e-30)[:, None, None, None] / STEPS
        weight.copy_((weight / scale).round() * scale)
    return solver


def shrink(path):
    """Rewrites the exported file of a rounded solver, which holds 16 bits, with 8. Nothing is lost: export
    scales rows only."""
    model = onnx.load(path)
    constants = {constant.name: constant for constant in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    for name, constant in constants.items():
        codes = numpy_helper.to_array(constant)
        small = np.round(codes * (STEPS / 32767))
        if codes.dtype != np.int16 or np.abs(small * (32767 / STEPS) - codes).max() > 1:
            continue  # not a rounded weight: the first image, say
        cast, scaled = readers[name], readers[readers[name].output[0]]
        scale = constants[scaled.input[1]]
        values = numpy_helper.to_array(scale).flatten() * np.float32(32767 / STEPS)
        constant.CopyFrom(numpy_helper.from_array(small.astype(np.int8), name))
        scale.CopyFrom(numpy_helper.from_array(values, scale.name))
        scaled.CopyFrom(helper.make_node("DequantizeLinear", [name, scale.name], scaled.output, axis=0))
        model.graph.node.remove(cast)
    onnx.checker.check_model(model)
    onnx.save(model, path)
