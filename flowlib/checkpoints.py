"""Checkpoints: tensors in safetensors, everything else as JSON in the same file's header, so that one rename is atomic."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flowlib.files import write_atomically
from flowlib.glow import Glow
from flowlib.prox import PROXES
from flowlib.solver import UnfoldedPGD


def save_tensors(path, tensors, header):
    """Writes a dict of tensors and a JSON-able header to one file, atomically."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p, metadata={"flowlib": json.dumps(header)}))


def load_tensors(path):
    """(tensors, header) as save_tensors wrote them. Raises FileNotFoundError, or ValueError for any other kind of file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train it first, or correct the path")
    try:
        with safe_open(path, "pt") as f:
            header = (f.metadata() or {}).get("flowlib")
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is truncated ({error}): copy or train it again") from error
    if header is None:
        raise ValueError(f"{path} was not written by flowlib (its header has no 'flowlib' entry)")
    return tensors, json.loads(header)


def save_checkpoint(path, model, dtype=None, **info):
    """Writes a Glow or an UnfoldedPGD with all that is needed to build it again, and any JSON-able info.

    dtype: torch.float16 or bfloat16 halves the file; None keeps the model's."""
    if isinstance(model, Glow):
        header = {"kind": "Glow", "config": model.config}
    elif isinstance(model, UnfoldedPGD):
        kinds = {cls: name for name, cls in PROXES.items()}
        header = {
            "kind": "UnfoldedPGD",
            "prox": kinds[type(model.proxes[0])],
            "config": model.proxes[0].config,
            "num_folds": model.num_folds,
            "literal_last_fold": model.literal_last_fold,
            "image_shape": list(model.x0.shape[1:]),
        }
    else:
        raise TypeError(f"can save a Glow or an UnfoldedPGD, not a {type(model).__name__}")
    tensors = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_tensors(path, tensors, header | {"info": info})


def load_checkpoint(path):
    """The Glow or UnfoldedPGD that save_checkpoint wrote, in evaluation mode and float32 (float64 if so saved).

    Raises FileNotFoundError; ValueError for a foreign, truncated or inconsistent file, naming the first key that does not fit."""
    tensors, header = load_tensors(path)
    if header.get("kind") == "Glow":
        model = Glow(**header["config"])
    elif header.get("kind") == "UnfoldedPGD":
        prox = PROXES[header["prox"]]
        model = UnfoldedPGD(
            [prox.from_config(header["config"]) for _ in range(header["num_folds"])],
            torch.zeros(1, *header["image_shape"]),
            literal_last_fold=header["literal_last_fold"],
        )
    else:
        raise ValueError(
            f"{path} holds no model but {header.get('kind', 'a training state')!r}: give a model.safetensors"
        )
    if any(v.dtype == torch.float64 for v in tensors.values()):
        model.double()
    load_state(model, tensors, path)
    return model.eval()


def load_state(model, tensors, path):
    """model.load_state_dict, with a ValueError that names the first key that does not fit."""
    own = model.state_dict()
    for key in [*own, *tensors]:
        if key not in tensors or key not in own:
            raise ValueError(f"{path} does not fit the model: {key} is {'missing' if key in own else 'not part of it'}")
        if own[key].shape != tensors[key].shape:
            raise ValueError(
                f"{path} does not fit the model: {key} has shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
            )
    model.load_state_dict(tensors)
