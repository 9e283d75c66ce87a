"""Checkpoints: one safetensors file; everything that is not a tensor is JSON in its header."""

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowlib.files import as_json, write_atomically
from flowlib.glow import Glow
from flowlib.prox import PROXES, GlowProx
from flowlib.solver import UnfoldedPGD


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
    # The library takes no path that is not UTF-8, such as one from a Latin-1 system.
    utf8 = not any("\ud800" <= c <= "\udfff" for c in str(path))
    try:
        with open(path, "rb") as f, safe_open(path if utf8 else f"/dev/fd/{f.fileno()}", "pt") as opened:
            about, tensors = opened.metadata() or {}, {k: opened.get_tensor(k) for k in opened.keys()}
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
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged (its header is no JSON mapping: {error})") from error


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key starts with prefix, under the rest of that key."""
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def save_checkpoint(
    path: str | Path, model: Glow | UnfoldedPGD, dtype: torch.dtype | None = None, **info: Any
) -> None:
    """Writes a Glow or an UnfoldedPGD, the settings that build it again, and any JSON-able info. dtype:
    torch.float16 or bfloat16 halves the file; None keeps the model's. Modules and weights that folds share
    are written once and stay shared. Raises, before it writes, TypeError for another model, and ValueError
    where it could not be loaded again (parametrised or pruned weights, added buffers) or dtype cannot hold a
    number."""
    if type(model) not in (Glow, UnfoldedPGD):  # a subclass would come back as its base
        inside = "of a wrapper give model.module (parallel) or model._orig_mod (compiled), and no subclass"
        raise TypeError(f"can save a Glow or an UnfoldedPGD, not a {type(model).__name__}: {inside}")
    header = {"kind": type(model).__name__, "shared": _shared(model)}
    if type(model) is Glow:
        header["config"] = model.config
    else:
        header["folds"] = [_describe(prox) for prox in model.proxes]
        header |= {"literal_last_fold": model.literal_last_fold, "image_shape": list(model.x0.shape[1:])}
    tensors = model.state_dict()
    try:
        _draft(lambda: _model(header, tensors), tensors, "what would be saved")
    except ValueError as error:
        advice = "remove parametrisations, pruning and buffers of your own, or let from_config make them"
        raise ValueError(f"{error}: {advice}") from error
    once = (key for key in tensors if not _within(key, header["shared"]))
    save_tensors(path, {key: _cast(key, tensors[key], dtype) for key in once}, header | {"info": info})


def _cast(key, value, dtype):
    if dtype is None or not value.is_floating_point():
        return value
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"cannot save as {dtype}: choose torch.float16, bfloat16, float32 or float64")
    cast = value.to(dtype)
    if not torch.equal(cast.isfinite(), value.isfinite()):
        raise ValueError(f"{key} holds numbers too large for {dtype}: choose torch.bfloat16, or None")
    return cast


def _shared(model):
    """{name: first name} of modules, parameters and buffers that have several, the outermost only."""
    firsts, shared = {}, {}
    kinds = model.named_modules, model.named_parameters, model.named_buffers
    for name, part in itertools.chain(*(named(remove_duplicate=False) for named in kinds)):
        first = firsts.setdefault(id(part), name)
        if first != name and not _within(name, shared):
            shared[name] = first
    return shared


def _within(name, parts):
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _share(model, shared):
    for name, first in shared.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, functools.reduce(getattr, first.split("."), model))


def _describe(prox):
    """{"prox": name, "config": …}, from which _build makes a fold's prox again."""
    cls = type(prox)
    name = {cls: name for name, cls in PROXES.items()}.get(cls, f"{cls.__module__}:{cls.__qualname__}")
    if cls is GlowProx and type(prox.glow) is not Glow:
        raise ValueError(f"{type(prox.glow).__name__} would come back as a Glow: give it a prox of your own")
    if name.startswith("__main__:") or "<locals>" in name:
        raise ValueError(f"{name} cannot be imported again: define it at the top of a module of its own")
    if not hasattr(prox, "config") or not hasattr(cls, "from_config"):
        raise ValueError(f"{name} lacks `config` or `from_config`, to build it again: see flowlib.prox.Prox")
    return {"prox": name, "config": prox.config}


def _build(fold, imports):
    """The prox of _describe's description. A file may name a class, but imports none but `imports`."""
    name, (module, _, qualified) = fold["prox"], fold["prox"].partition(":")
    cls = PROXES.get(name)
    if not cls:
        needs = f"needs `from {module} import {qualified}`"
        if module not in sys.modules and module not in imports:
            raise ValueError(f"{needs}: import it first, or if you trust the file give imports=[{module!r}]")
        try:  # vars, as getattr may import
            cls = functools.reduce(lambda part, n: vars(part)[n], qualified.split("."), import_module(module))
        except (ImportError, LookupError, TypeError) as error:
            raise ValueError(f"{needs}, which failed: {error!r}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        raise ValueError(f"{name} is no prox: see flowlib.prox.Prox")
    try:
        return cls.from_config(fold["config"])
    except (RuntimeError, TypeError):  # not every class can be a draft
        with torch.device("cpu"):
            return cls.from_config(fold["config"])


def load_checkpoint(path: str | Path, imports: Collection[str] = ()) -> Glow | UnfoldedPGD:
    """The Glow or UnfoldedPGD that save_checkpoint wrote, in evaluation mode, float32 or float64 as saved.
    imports: modules that may be imported for your own prox class, if they are not yet. Raises
    FileNotFoundError; ValueError for a missing class and for a foreign, truncated or inconsistent file,
    naming the first key that does not fit."""
    tensors, header = load_tensors(path)
    if header.get("kind") not in ("Glow", "UnfoldedPGD"):
        kind = header.get("kind", "a training state")
        raise ValueError(f"{path} holds no model but {kind!r}: give a model.safetensors")
    return build_to_fit(lambda: _model(header, tensors, imports), tensors, path)


def _model(header, tensors, imports=()):
    """The model that the header describes, without weights; adds shared tensors to `tensors`."""
    # Old files describe all folds once.
    folds = [] if header["kind"] == "Glow" else header.get("folds") or [header] * len(tensors["step_size"])
    whole = {f"proxes.{k}": f"proxes.{fold['same_as']}" for k, fold in enumerate(folds) if "same_as" in fold}
    shared = header.get("shared", {}) | whole  # older files have only the latter
    for name, first in shared.items():
        found = {key.removeprefix(first): v for key, v in tensors.items() if _within(key, [first])}
        tensors.update({name + rest: value for rest, value in found.items()})
    if header["kind"] == "Glow":
        model = Glow(**header["config"])
        _share(model, shared)
        return model
    parts = nn.Module()
    parts.proxes = nn.ModuleList()
    for k, fold in enumerate(folds):
        first = shared.get(f"proxes.{k}")
        parts.proxes.append(parts.get_submodule(first) if first else _build(fold, imports))
        # At once: a draft then makes no more weights than the file has.
        _share(parts, {name: first for name, first in shared.items() if name.startswith(f"proxes.{k}.")})
    x0 = torch.zeros(1, *header["image_shape"])
    return UnfoldedPGD(parts.proxes, x0, literal_last_fold=header["literal_last_fold"])


def build_to_fit(build: Callable[[], nn.Module], tensors: dict[str, Tensor], path: str | Path) -> nn.Module:
    """build() with these weights, in evaluation mode, in float64 where they are. ValueError if it cannot
    be built or they do not fit, before memory is taken for what a file only claims."""
    draft = _draft(build, tensors, path)
    double = any(tensors[key].dtype == torch.float64 for key, _ in draft.named_parameters())
    model = build().double() if double else build().float()  # whatever PyTorch's default is
    for key, buffer in model.named_buffers():
        if key in tensors and buffer.is_floating_point():
            buffer.data = buffer.to(torch.promote_types(tensors[key].dtype, torch.float32))
    model.load_state_dict(tensors)
    return model.eval()


def _draft(build, tensors, path):
    """build() without memory, which the tensors fit. ValueError: see build_to_fit."""
    try:
        with _Bounded(tensors), torch.device("meta"):
            draft = build()
        draft.state_dict()  # fails where a part is inside itself
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no model that can be built: {error!r}") from error
    check_state(draft, tensors, path)
    return draft


class _Bounded(TorchFunctionMode):
    """Stops the making of a model that cannot have these tensors: a header may claim any size and any number
    of layers, and each layer takes memory, even without its weights."""

    def __init__(self, tensors):
        super().__init__()
        # Numbers; a call counts as 200. Twice what is there, so that check_state names what is missing.
        self.left = 10**7 + 2 * sum(value.numel() for value in tensors.values()) + 20_000 * len(tensors)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # No memory, no first values; PyTorch would import its compiler (2 s) to find that out.
        made = kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)
        is_new = isinstance(made, Tensor) and not any(isinstance(value, Tensor) for value in args)
        self.left -= 200 + (made.numel() if is_new else 0)
        if self.left < 0:
            raise ValueError("many more weights than it holds")
        return made


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
