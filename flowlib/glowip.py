"""Checkpoints of GlowIP (Asim et al. 2020), the flow code that the paper used and whose pre-trained model it starts from."""

import re
from pathlib import Path

import torch

from flowlib.checkpoints import load_state
from flowlib.glow import Glow

# Per flow step: name there -> name here. The invertible 1x1 carries two trailing axes there, the scales leading ones.
_NAMES = {
    "actnorm.logs": "actnorm.log_scale",
    "actnorm.b": "actnorm.bias",
    "invconv.W": "invconv.weight",
    "coupling.net.logs": "coupling.net.log_scale",
    **{f"coupling.net.conv{i}.{p}": f"coupling.net.conv{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")},
    **{f"coupling.net.actnorm{i}.logs": f"coupling.net.actnorm{i}.log_scale" for i in (1, 2)},
    **{f"coupling.net.actnorm{i}.b": f"coupling.net.actnorm{i}.bias" for i in (1, 2)},
}


def load_glowip(path_or_state_dict):
    """The Glow of a GlowIP state dict (a .pt file or the dict itself), in evaluation mode.

    The geometry is read from the keys: `glow_modules` there holds, for each level, a squeeze, its steps and (but for the
    last) a split. Files are read with weights_only, so nothing in them is executed. Raises FileNotFoundError, and
    ValueError for a truncated, foreign or inconsistent file, naming the first key that does not fit."""
    state, source = path_or_state_dict, "this state dict"
    if not isinstance(state, dict):
        source = Path(state)
        if not source.is_file():
            raise FileNotFoundError(f"no GlowIP checkpoint at {source}")
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{source} is truncated, or no PyTorch state dict ({error})") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{source} holds no state dict but a {type(state).__name__}")

    modules = {}  # index in glow_modules -> {name here: tensor}
    for key, value in state.items():
        match = re.fullmatch(r"(?:module\.)?glow_modules\.(\d+)\.(.+)", str(key))
        if not match or match[2] not in _NAMES or not isinstance(value, torch.Tensor):
            raise ValueError(f"{source} is no GlowIP flow: its key {key!r} is not one of a flow step")
        value = (
            value if value.ndim == 4 and ".conv" in key else value.flatten(1) if "invconv" in key else value.flatten()
        )
        modules.setdefault(int(match[1]), {})[_NAMES[match[2]]] = value

    levels = [[min(modules)]]
    for index in sorted(modules)[1:]:
        if index == levels[-1][-1] + 1:
            levels[-1].append(index)
        else:
            levels.append([index])
    renamed = {
        f"levels.{level}.{step}.{name}": value
        for level, steps in enumerate(levels)
        for step, index in enumerate(steps)
        for name, value in modules[index].items()
    }
    first = f"glow_modules.{levels[0][0]}"
    for name in ("invconv.weight", "coupling.net.conv1.weight"):
        if name not in modules[levels[0][0]]:
            raise ValueError(f"{source} is no whole GlowIP flow: {first} has no {name}")
    glow = Glow(
        in_channels=len(modules[levels[0][0]]["invconv.weight"]) // 4,
        num_levels=len(levels),
        num_steps=len(levels[0]),
        hidden_channels=len(modules[levels[0][0]]["coupling.net.conv1.weight"]),
        last_level_steps=len(levels[-1]),
        scale="sigmoid",
    )
    initialized = {k: torch.tensor(True) for k in glow.state_dict() if k.endswith("initialized")}
    load_state(glow, renamed | initialized, source)
    return glow.eval()
