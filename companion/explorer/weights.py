"""A solver small enough to travel to a page: its convolutions are whole numbers of steps, as coarse as its
answers allow, each fold is stored as the difference from the one before, and all is compressed."""

import copy
import gzip
import json
from pathlib import Path

import numpy as np
import onnx
import torch

from flowlib.fused import fuse_nets

SHARE = 1 / 250  # the share of an answer's squared error that rounding may add
LARGEST = 2**18  # code; differences of two fit 24 bits


def convolutions(solver):
    """The weights of all folds and steps that go by one name, by level and place in the coupling net."""
    levels = zip(*(prox.glow.levels for prox in solver.proxes))
    nets = [[step.coupling.net for steps in level for step in steps] for level in levels]
    return [[getattr(net, f"conv{i}").weight for net in level] for level in nets for i in (1, 2, 3)]


@torch.no_grad()
def _merge(solver):
    """Puts ActNorms and scales of the coupling nets into their convolutions, as they are exported."""
    for prox in solver.proxes:
        for net in (step.coupling.net for level in prox.glow.levels for step in level):
            merged = fuse_nets([net])[0]
            for conv, (weight, bias) in zip((net.conv1, net.conv2, net.conv3), merged):
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
            for norm in (net.actnorm1, net.actnorm2):
                norm.bias.zero_()
                norm.log_scale.zero_()
            net.log_scale.copy_(torch.zeros(()) if net.divisor is None else net.divisor.log() / 3)


def rounded(solver, operator, y, error):
    """(copy of a solver whose convolutions are whole numbers of steps, these steps): a step for all folds and
    flow steps of a level and place in the coupling net. A step Δ adds Δ² ‖∂x̂/∂w‖² / 12 for each weight w to
    the squared error of an answer x̂, and all weights together SHARE of it, each as much. error: the mean
    squared error of the solver's answers, a pixel; y: measurements at which the derivatives are taken."""
    solver = copy.deepcopy(solver).requires_grad_(False)
    _merge(solver)
    groups = convolutions(solver)
    weights = [w.requires_grad_() for group in groups for w in group]
    with torch.enable_grad():
        x_hat = solver(y, operator)
        signs = torch.randint(0, 2, x_hat.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        slopes = iter(torch.autograd.grad((x_hat * signs).sum(), weights))  # squared: ‖∂x̂/∂w‖² on average
    allowed = 12 * SHARE * error * y[0].numel() / sum(w.numel() for w in weights)
    steps = []
    with torch.no_grad():
        for group in groups:
            slope = torch.stack([next(slopes).square() for _ in group]).mean() / len(y)
            largest = max(w.abs().max() for w in group).clamp_min(1e-30)
            steps.append(float((allowed / slope).sqrt().clamp(largest / LARGEST, largest)))
            for w in group:
                w.copy_((w / steps[-1]).round() * steps[-1])
    return solver.requires_grad_(False), steps


def pack(path: Path, steps: list[float]) -> bytes:
    """The small form of a rounded solver's ONNX file: the file without its large weights, and these as codes.
    A level's two affine maps come before its convolutions in the file; they get the finest steps."""
    whole = path.read_bytes()
    large = [i for i in onnx.load_from_string(whole).graph.initializer if len(i.dims) == 6]
    maps = [None, None]
    steps = [step for i in range(0, len(steps), 3) for step in (*maps, *steps[i : i + 3])]
    tensors, rest, codes, end = [], b"", [], 0
    for tensor, step in zip(large, steps, strict=True):
        values = onnx.numpy_helper.to_array(tensor)
        step = float(np.float32(step or np.abs(values).max() / LARGEST))
        whole_steps = np.rint(values.reshape(tensor.dims[0], -1) / step).astype(np.int32)
        differences = np.diff(whole_steps, axis=0, prepend=0).ravel()
        # Zigzag: small values of either sign have empty upper bytes.
        codes.append(((differences << 1) ^ (differences >> 31)).astype("<u4"))
        start = whole.index(tensor.raw_data, end)
        tensors.append({"start": start, "count": values.size, "folds": len(values), "step": step})
        rest, end = rest + whole[end:start], start + len(tensor.raw_data)
    rest += whole[end:]
    head = json.dumps({"length": len(whole), "rest": len(rest), "tensors": tensors}).encode()
    planes = np.concatenate(codes).view(np.uint8).reshape(-1, 4).T[:3]  # the lowest bytes of all, and so on
    parts = [np.uint32(len(head)).tobytes(), head, rest, planes.tobytes()]
    return gzip.compress(b"".join(parts), compresslevel=6, mtime=0)


def unpack(packed: bytes) -> bytes:
    """The ONNX file that `pack` made small, as explorer.js makes it too."""
    data = gzip.decompress(packed)
    start = 4 + int.from_bytes(data[:4], "little")
    head = json.loads(data[4:start])
    rest = data[start : start + head["rest"]]
    codes = np.frombuffer(data, np.uint8, offset=start + head["rest"]).reshape(3, -1)
    whole, end, taken, used = [], 0, 0, 0
    for tensor in head["tensors"]:
        low, middle, high = codes[:, used : used + tensor["count"]].astype(np.int32)
        zigzag = low | middle << 8 | high << 16
        differences = ((zigzag >> 1) ^ -(zigzag & 1)).reshape(tensor["folds"], -1)
        values = (differences.cumsum(0) * tensor["step"]).astype("<f4").tobytes()
        gap = tensor["start"] - end
        whole += [rest[taken : taken + gap], values]
        taken, used, end = taken + gap, used + tensor["count"], tensor["start"] + len(values)
    return b"".join([*whole, rest[taken:]])
