"""Models kept with the code, small: integers of a few bits with one scale a row, and for solvers that
started from a kept flow only how each fold differs from it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowlib import Glow, load_checkpoint
from flowlib.checkpoints import load_state, load_tensors, model_from_header, model_header, save_tensors

BITS = 6  # of solvers; a flow, from which they are counted, is kept in half precision
SMALLEST = 1024  # numbers of a tensor that is worth it


def save_small(path: Path, model, start: Glow | None = None, **info):
    """Writes a Glow in half precision, or a solver in BITS bits. start: the flow as it is kept, from which
    each fold's weights are counted."""
    if isinstance(model, Glow):
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        return save_tensors(path, tensors, model_header(model) | {"info": info})
    tensors, packed = {}, []
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim > 1 and value.numel() >= SMALLEST:
            tensors |= {
                f"{name}.{part}": t for part, t in _pack(value - _of_start(name, value, start)).items()
            }
            packed.append(name)
        else:
            tensors[name] = value
    save_tensors(
        path, tensors, model_header(model) | {"info": info, "packed": packed, "from_start": start is not None}
    )


def load_small(path: Path, start: Glow | None = None):
    """The model that save_small wrote. Raises ValueError where it was counted from a flow and none is
    given."""
    tensors, header = load_tensors(path)
    if "packed" not in header:
        return load_checkpoint(path)
    if header["from_start"] and start is None:
        raise ValueError(f"{path} holds differences to a flow: give that flow, as it is kept")
    model = model_from_header(header)
    own = model.state_dict()
    for name in header["packed"]:
        difference = _unpack(tensors.pop(f"{name}.scale"), tensors.pop(f"{name}.bits"), own[name].shape)
        tensors[name] = difference + _of_start(name, own[name], start)
    load_state(model, tensors, path)
    return model.eval()


def _of_start(name, value, start):
    """What a fold's tensor was in the flow that it started from: "proxes.2.glow.levels…" -> levels…"""
    _, _, rest = name.partition(".glow.")
    return start.get_parameter(rest).detach() if start is not None and rest else torch.zeros_like(value)


def _pack(value: Tensor) -> dict[str, Tensor]:
    limit = 2 ** (BITS - 1) - 1
    rows = value.detach().float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / limit
    whole = ((rows / scale).round() + limit).to(torch.uint8).numpy()
    bits = np.packbits(np.unpackbits(whole.reshape(-1, 1), axis=1)[:, 8 - BITS :])
    return {"scale": scale.squeeze(1), "bits": torch.from_numpy(bits)}


def _unpack(scale: Tensor, bits: Tensor, shape) -> Tensor:
    limit, count = 2 ** (BITS - 1) - 1, int(np.prod(shape))
    columns = np.unpackbits(bits.numpy(), count=count * BITS).reshape(count, BITS)
    whole = torch.from_numpy(columns @ (2 ** np.arange(BITS)[::-1])).float() - limit
    return (whole.reshape(len(scale), -1) * scale[:, None]).reshape(shape)
