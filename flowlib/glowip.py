"""Checkpoints of GlowIP (Asim et al. 2020), whose pre-trained flow the paper starts from."""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowlib.checkpoints import build_to_fit
from flowlib.glow import Glow

_NAMES = {"logs": "log_scale", "b": "bias", "W": "weight"}  # there -> here; all others are the same


def load_glowip(
    path_or_state_dict: str | Path | dict[str, Tensor], config: str | Path | Mapping[str, Any] | None = None
) -> Glow:
    """The Glow of a GlowIP state dict (a .pt file or the dict itself), in evaluation mode.

    Sizes are read from the keys: `glow_modules` there holds, for each level, a squeeze, its steps and (but
    for the last) a split. config: the options it was trained with, a mapping or JSON file (None: configs.json
    beside the weights, if it is there). Three change the flow: `squeeze_contig` and `coupling_bias` on all
    levels but the last, and `last_zeros`, which that code also passes, by position, as the last level's
    coupling bias. Nothing in a file is executed. Raises FileNotFoundError, and ValueError for a truncated,
    foreign or inconsistent file, naming the first key that does not fit."""
    state, source = path_or_state_dict, "this state dict"
    if not isinstance(state, dict):
        source = Path(state)
        if not source.is_file():
            raise FileNotFoundError(f"no GlowIP checkpoint at {source}")
        beside = source.with_name("configs.json")
        config = beside if config is None and beside.is_file() else config
        try:
            damaged = zipfile.is_zipfile(source) and zipfile.ZipFile(source).testzip()
            if damaged:  # torch.load does not check it
                raise ValueError(f"{damaged} does not fit its checksum")
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            what = f"is truncated or damaged, or no PyTorch state dict ({error})"
            raise ValueError(f"{source} {what}") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{source} holds no state dict but a {type(state).__name__}")
    options = config or {}
    if not isinstance(options, Mapping):
        try:
            options = dict(json.loads(Path(config).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config} is no JSON of GlowIP's options ({error})") from error
    if options.get("coupling", "affine") != "affine":
        raise ValueError(f"only affine couplings can be loaded, not {options['coupling']!r}")

    found = []  # (index in glow_modules, name here, tensor)
    for key, value in state.items():
        match = re.fullmatch(r"(?:module\.)?glow_modules\.(\d+)\.(.+\.)(\w+)", str(key))
        if not match or not isinstance(value, Tensor):
            raise ValueError(f"{source} is no GlowIP flow: its key {key!r} is not one of a flow step")
        if value.ndim != 4 or ".conv" not in key:  # some carry axes of length 1 there
            value = value.flatten(1) if "invconv" in key else value.flatten()
        found.append((int(match[1]), match[2] + _NAMES.get(match[3], match[3]), value))
    places, num_steps = {}, []  # a gap between indices, where the squeeze and the split are, ends a level
    for index in sorted({index for index, _, _ in found}):
        if index - 1 not in places:
            num_steps.append(0)
        places[index] = f"levels.{len(num_steps) - 1}.{num_steps[-1]}."
        num_steps[-1] += 1
    renamed = {places[index] + name: value for index, name, value in found}
    channels, hidden = (f"levels.0.0.{n}" for n in ("invconv.weight", "coupling.net.conv1.weight"))
    if channels not in renamed or hidden not in renamed:
        raise ValueError(f"{source} is no whole GlowIP flow: its first step lacks a weight")
    but_last = len(num_steps) - 1
    arguments = dict(
        in_channels=len(renamed[channels]) // 4,
        num_levels=len(num_steps),
        num_steps=num_steps,
        hidden_channels=len(renamed[hidden]),
        scale="sigmoid",
        scale_bias=[options.get("coupling_bias", 0.0)] * but_last + [float(options.get("last_zeros", False))],
        contiguous_squeeze=[bool(options.get("squeeze_contig", False))] * but_last + [False],
    )
    scales = [k for k in renamed if "actnorm" in k and k.endswith("log_scale")]
    renamed |= {k.replace("log_scale", "initialized"): torch.tensor(True) for k in scales}
    return build_to_fit(lambda: Glow(**arguments), renamed, source)
