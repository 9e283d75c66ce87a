"""Packed files of kept models: a flow in half precision; a solver as integers of a few bits with one scale a
row, which count the difference to its kept flow if it started from one."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from companion.paths import RESULTS
from flowlib.checkpoints import load_tensors, save_tensors

FIRST_DIGESTS = RESULTS / "checkpoints" / "sha256.json"  # {file: {"sha256", "start": that of its flow}}
SMALLEST = 1024  # numbers; smaller tensors are not packed


def pack(model: Path, kept: Path, start: Path | None = None, bits: int = 8, **info):
    """Packs the checkpoint `model` into the file `kept`. start: the kept flow from which its folds are
    counted; bits: 16 stands for half precision, which needs no start."""
    tensors, header = load_tensors(model)
    header |= {"info": info}
    if header["kind"] == "Glow" or bits == 16:
        return save_tensors(
            kept, {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, header
        )
    of_start, small = _tensors_of(start), {}
    for name, value in tensors.items():
        if value.is_floating_point() and value.ndim > 1 and value.numel() >= SMALLEST:
            small[f"{name}:scale"], small[f"{name}:bits"] = _pack(value - _at_start(name, of_start), bits)
        else:
            small[name] = value
    shapes = {name: list(value.shape) for name, value in tensors.items() if f"{name}:bits" in small}
    about = {"bits": bits, "shapes": shapes, "started": start is not None, "start": start and sha256(start)}
    save_tensors(kept, small, {"kind": "packed", "model": header} | about)


def unpack(kept: Path, model: Path, start: Path | None = None):
    """Writes the checkpoint `model` of a packed file. ValueError if its flow is not given, or is not the flow
    from which it was counted."""
    tensors, header = _checked(kept)
    if header.get("kind") != "packed":
        return save_tensors(
            model, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, header
        )
    if header["started"] and not (start and start.exists()):
        raise ValueError(f"{kept} holds differences to a flow: give that flow, as it is kept, or fetch both")
    of_start = _tensors_of(start)
    if header["started"] and header["start"] != sha256(start):
        raise ValueError(f"{kept} holds differences to another flow than {start}: fetch both again")
    try:
        for name, shape in header["shapes"].items():
            packed = tensors.pop(f"{name}:scale"), tensors.pop(f"{name}:bits")
            tensors[name] = _unpack(*packed, header["bits"], shape) + _at_start(name, of_start)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{kept} is damaged ({error!r}): fetch it again") from error
    save_tensors(model, tensors, header["model"])


def sha256(path: Path) -> str:
    """The SHA-256 of a model's contents from its header, as safetensors may write equal contents in another
    order; of the file if its header has none."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("sha256") or _of_file(path)
    except SafetensorError:
        return _of_file(path)


def _of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def counted_from(kept: Path) -> str | None:
    """The sha256 of the kept flow from which a kept solver is counted, or None."""
    return _checked(kept)[1].get("start")


def _checked(kept):
    """(tensors, header) of a kept model. FIRST_DIGESTS has the digests that the first kept models lack: their
    own, and that of their flow."""
    tensors, header = load_tensors(kept)
    with safe_open(kept, "pt") as file:
        hashed = "sha256" in file.metadata()
    if not hashed or header.get("started") and "start" not in header:
        first = json.loads(FIRST_DIGESTS.read_text(encoding="utf-8")) if FIRST_DIGESTS.exists() else {}
        known = {entry["sha256"]: entry["start"] for entry in first.values()}
        if _of_file(kept) not in known:
            raise ValueError(f"{kept} is damaged ({FIRST_DIGESTS} lacks its hash): fetch it again")
        header["start"] = known[_of_file(kept)]
    return tensors, header


def _tensors_of(start):
    return _checked(start)[0] if start else {}


def _at_start(name, of_start):
    """The flow's tensor for a fold's: "proxes.2.glow.levels…" is "levels…" there."""
    found = of_start.get(name.partition(".glow.")[2])
    return 0.0 if found is None else found.float()


def _pack(value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    limit = 2 ** (bits - 1) - 1
    rows = value.flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / limit
    whole = ((rows / scale).round() + limit).to(torch.uint8).numpy()
    packed = np.packbits(np.unpackbits(whole.reshape(-1, 1), axis=1)[:, 8 - bits :])
    return scale.squeeze(1), torch.from_numpy(packed)


def _unpack(scale: Tensor, packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if not 0 <= count * bits <= 8 * packed.numel():  # before memory is taken for it
        raise ValueError(f"{count} numbers of {bits} bits are not in {packed.numel()} bytes")
    columns = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    whole = torch.from_numpy(columns @ (2 ** np.arange(bits)[::-1])).float() - (2 ** (bits - 1) - 1)
    return (whole.reshape(len(scale), -1) * scale[:, None]).reshape(shape)
