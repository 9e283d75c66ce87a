"""Checkpoints: one safetensors file, with all that is no tensor as JSON in its header."""

import functools
import hashlib
import importlib
import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from flowlib.files import as_json, write_atomically
from flowlib.glow import Glow
from flowlib.prox import PROXES, GlowProx
from flowlib.solver import UnfoldedPGD

_COUNTING = threading.RLock()  # the hook that counts is the whole process's


def save_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes a dict of tensors and a JSON-able header to one file, atomically."""
    found, seen = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        found[key] = value.clone() if value.data_ptr() in seen else value  # safetensors has no shared memory
        seen.add(value.data_ptr())
    text = json.dumps(as_json(header))
    about = {"flowlib": text, "sha256": _digest(text, found)}
    write_atomically(path, lambda p: save_file(found, p, metadata=about))


def _digest(text, tensors):
    digest = hashlib.sha256(text.encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"\0{key}\0{value.dtype}\0{list(value.shape)}\0".encode())
        flat = value.reshape(-1).clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) as save_tensors wrote them. FileNotFoundError, or ValueError for any other file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train it first, or correct the path")
    try:
        with safe_open(path, "pt") as f:
            about, tensors = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}
    except Exception as error:  # the library raises more than its own kind
        what = f"{path} is no safetensors file, or is truncated ({error})"
        raise ValueError(f"{what}: delete it, then make or fetch it again") from error
    text = about.get("flowlib")
    if text is None:
        raise ValueError(f"{path} was not written by flowlib (its header has no 'flowlib' entry)")
    if "sha256" in about and about["sha256"] != _digest(text, tensors):  # older files have none
        raise ValueError(f"{path} is damaged (its contents do not fit their hash): make or fetch it again")
    try:
        return tensors, dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged (its header is no JSON mapping: {error})") from error


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose key starts with prefix, under the rest of their key."""
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def save_checkpoint(
    path: str | Path, model: Glow | UnfoldedPGD, dtype: torch.dtype | None = None, **info: Any
) -> None:
    """Writes a Glow or an UnfoldedPGD with all that is needed to build it again, and any JSON-able info.
    dtype: torch.float16 or bfloat16 halves the file; None keeps the model's. A prox that serves several folds
    is written once. Raises ValueError for a prox that cannot be built again, TypeError for another model."""
    tensors = model.state_dict()
    if type(model) is Glow:  # a subclass would come back as its base
        header = {"kind": "Glow", "config": model.config}
    elif type(model) is UnfoldedPGD:
        folds, marks = [], [_mark(prox) for prox in model.proxes]
        for k, prox in enumerate(model.proxes):
            first = marks.index(marks[k])
            folds.append(_describe(prox) if first == k else {"same_as": first})
            for key in part_of(tensors, f"proxes.{k}.") if first < k else ():
                del tensors[f"proxes.{k}.{key}"]
        header = {"kind": "UnfoldedPGD", "folds": folds, "literal_last_fold": model.literal_last_fold}
        header["image_shape"] = list(model.x0.shape[1:])
    else:
        inside = "of a wrapper give model.module (parallel) or model._orig_mod (compiled), and no subclass"
        raise TypeError(f"can save a Glow or an UnfoldedPGD, not a {type(model).__name__}: {inside}")
    converted = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in tensors.items()}
    save_tensors(path, converted, header | {"info": info})


def _mark(prox):
    """Equal for proxes that are one, or share all of their weights."""
    return type(prox), [id(p) for p in prox.parameters()] or id(prox), getattr(prox, "config", None)


def _describe(prox):
    """{"prox": name, "config": …}: what a fold's prox is built from again."""
    cls = type(prox)
    name = {cls: name for name, cls in PROXES.items()}.get(cls, f"{cls.__module__}:{cls.__qualname__}")
    if cls is GlowProx and type(prox.glow) is not Glow:
        raise ValueError(f"{type(prox.glow).__name__} would come back as a Glow: give it a prox of your own")
    if name.startswith("__main__:") or "<locals>" in name:
        raise ValueError(f"{name} cannot be imported again: define it at the top of a module of its own")
    if not hasattr(prox, "config") or not hasattr(cls, "from_config"):
        raise ValueError(f"{name} lacks `config` or `from_config`, to build it again: see flowlib.prox.Prox")
    return {"prox": name, "config": prox.config}


def _build(fold):
    """The prox that _describe described. A file can name a class to import; it cannot hold code."""
    name, (module, _, qualified) = fold["prox"], fold["prox"].partition(":")
    try:
        cls = PROXES.get(name)
        cls = cls or functools.reduce(getattr, qualified.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"needs `from {module} import {qualified}`, which failed: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        raise ValueError(f"{name} is no prox: see flowlib.prox.Prox")
    with torch.device("cpu") if name not in PROXES else nullcontext():  # not every class can be a draft
        return cls.from_config(fold["config"])


def load_checkpoint(path: str | Path) -> Glow | UnfoldedPGD:
    """The Glow or UnfoldedPGD that save_checkpoint wrote, in evaluation mode, float32 or float64 as saved.
    A prox class of one's own is imported. Raises FileNotFoundError; ValueError for a class that cannot be
    imported and for a foreign, truncated or inconsistent file, naming the first key that does not fit."""
    tensors, header = load_tensors(path)
    if header.get("kind") not in ("Glow", "UnfoldedPGD"):
        kind = header.get("kind", "a training state")
        raise ValueError(f"{path} holds no model but {kind!r}: give a model.safetensors")
    return build_to_fit(lambda: _model(header, tensors), tensors, path)


def _model(header, tensors):
    if header["kind"] == "Glow":
        return Glow(**header["config"])
    proxes = []
    # Before there were unequal folds, one description served all.
    for k, fold in enumerate(header.get("folds") or [header] * len(tensors["step_size"])):
        first = fold.get("same_as", k)
        proxes.append(_build(fold) if first == k else proxes[first])
        for key, value in part_of(tensors, f"proxes.{first}.").items():
            tensors[f"proxes.{k}.{key}"] = value
    x0 = torch.zeros(1, *header["image_shape"])
    return UnfoldedPGD(proxes, x0, literal_last_fold=header["literal_last_fold"])


def build_to_fit(build: Callable[[], nn.Module], tensors: dict[str, Tensor], path: str | Path) -> nn.Module:
    """build() with these weights, in evaluation mode, in float64 where they are. ValueError, before memory is
    taken for what a file only claims, where it cannot be built or they do not fit."""
    left = 2 * sum(value.numel() for value in tensors.values())  # so that a missing tensor is named, below
    here = threading.get_ident()

    def count(module, name, parameter):
        nonlocal left
        left -= parameter.numel() if threading.get_ident() == here else 0
        if left < 0:
            raise ValueError("many more weights than it holds")

    with _COUNTING:
        counting = register_module_parameter_registration_hook(count)
        try:
            with torch.device("meta"):
                draft = build()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} describes no model that can be built: {error!r}") from error
        finally:
            counting.remove()
    check_state(draft, tensors, path)
    model = build()
    if any(tensors[key].dtype == torch.float64 for key, _ in draft.named_parameters()):  # not buffers alone
        model.double()
    model.load_state_dict(tensors)
    return model.eval()


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """model.load_state_dict, with a ValueError that names path and the first key that does not fit."""
    check_state(model, tensors, path)
    model.load_state_dict(tensors)


def check_state(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """ValueError that names path and the first key that does not fit the model."""
    own, given = ({k: tuple(v.shape) for k, v in found.items()} for found in (model.state_dict(), tensors))
    for key in own | given:
        if own.get(key) != given.get(key):
            wrong = f"has shape {given.get(key)}, not {own.get(key)}" if key in given else "is missing"
            what = wrong if key in own else "is not part of it"
            raise ValueError(f"{path} does not fit the model: {key} {what}")
