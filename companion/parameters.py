"""The parameters of a notebook that papermill executes, and the images that they name. A mistake is reported
at once: nothing here needs PyTorch, which takes half a minute to import on a slow machine."""

import ast
import contextlib
import io
import os
import sys
from numbers import Integral, Real
from pathlib import Path

from companion.paths import ROOT, build_folder

PROFILES = ("smoke", "demo", "short", "cpu", "gpu", "paper", "gpu-longer", "muon")
TASKS = {"v2": ("denoising", "inpainting", "deblurring")}  # by edition
TASKS["v1"] = ("denoising", "denoising-0.1", "inpainting", "deblurring")
SYNTHETIC_IMAGES = 1400  # enough for every profile that uses them
# Of an Experiment.
OVERRIDES = ("num_folds", "flow", "unet", "resnet", "num_steps", "lr", "batch_size")
CHOICE = ("profile", "dataset", "edition", "seed", "build", *OVERRIDES)


def _number(value, kind=Real, least=0):
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < 2**63


def _whole(least):
    return f"a whole number of at least {least}", lambda value: _number(value, Integral, least)


def _is_name(value):
    return isinstance(value, str) and value == Path(value).name and value not in ("", "..")


# What a parameter must be, in words and as a test.
TEXT = "text (papermill: -r)", lambda value: isinstance(value, str) and value != ""
NAME = "the name of a data set, as text (papermill: -r)", _is_name
NUMBER = "a number of at least 0", _number
SWITCH = "True or False", lambda value: isinstance(value, bool)
MAPPING = "a mapping of its settings (papermill: -y)", lambda value: isinstance(value, dict)
KINDS = dict(seed=_whole(0), num_folds=_whole(1), num_steps=_whole(1), batch_size=_whole(1), lr=NUMBER)
KINDS |= dict(shift=NUMBER, noisy=SWITCH, last_fold_only=SWITCH, dataset=NAME, build=TEXT, images=NAME)
KINDS |= dict(flow=MAPPING, unet=MAPPING, resnet=MAPPING)
MAY_BE_NONE = {*OVERRIDES, "images", "shift", "last_fold_only"}


def notebook_parameters():
    """The notebook's parameters that an Experiment takes. All are checked, known
    images that are missing are prepared, and papermill's terminal shows progress from here on.

    ValueError for a parameter that the notebook does not have (papermill only warns of it, and a typo would
    train something else) or a value that it cannot have; FileNotFoundError for images that are not there."""
    main = sys.modules["__main__"]
    _show_in_terminal()
    # What IPython has executed. The cell that papermill adds comes after the notebook's own parameters.
    cells = list(getattr(main, "In", ()))
    for own, added in zip(cells, cells[1:]):
        if added.startswith("# Parameters\n"):
            for name in _assigned(added):
                choose(dict.fromkeys(_assigned(own)), name, "parameter")
    given = {name: vars(main)[name] for name in ("task", *CHOICE, *KINDS) if name in vars(main)}
    check(given)
    for name in {given["dataset"], given.get("images") or given["dataset"]}:
        packed(given["build"], name)
    return {name: given[name] for name in CHOICE if name in given}


def _assigned(cell):
    return [target.id for node in ast.parse(cell).body for target in getattr(node, "targets", ())]


def choose(table, key, what):
    """table[key], or a ValueError that names the choices."""
    if not isinstance(key, str) or key not in table:
        raise ValueError(f"unknown {what} {key!r}; choose one of: {', '.join(table)}")
    return table[key]


def check(given):
    """ValueError for the first of these parameters of a wrong type: it would only fail after a training, or
    be taken for another."""
    if "profile" in given:
        choose(dict.fromkeys(PROFILES), given["profile"], "profile")
    tasks = choose(TASKS, given.get("edition", "v2"), "edition")
    if "task" in given:
        choose(dict.fromkeys(tasks), given["task"], f"task of edition {given.get('edition', 'v2')}")
    for name, value in given.items():
        words, fits = KINDS.get(name, ("", lambda value: True))
        if not fits(value) and not (value is None and name in MAY_BE_NONE):
            raise ValueError(f"{name} must be {words}, not {value!r}")
    shift = given.get("shift")
    if given.get("task") == "inpainting" and shift is not None and shift not in range(1, 65):
        raise ValueError(f"shift, the side of a hole, must be a whole number from 1 to 64, not {shift!r}")


def packed(build, name):
    """The packed set of images of a build; a known one that is missing is prepared first. FileNotFoundError,
    with the remedy, where it cannot be."""
    import data

    folder = build_folder(build) / "data" / name
    if not (folder / "manifest.json").exists() and name in data.NAMED:
        with contextlib.chdir(ROOT):  # where the user's images are looked for
            data.prepare_into(name, folder.parent, num_images=SYNTHETIC_IMAGES)
    return data.load(folder)


def _show_in_terminal():
    """papermill shows a kernel's output only when its cell ends. Messages and progress bars, as text, also go
    to its terminal at once."""
    stream, in_jupyterlab = sys.stderr, "JPY_SESSION_NAME" in os.environ
    if hasattr(stream, "echo") and stream.echo is None and not in_jupyterlab:
        import tqdm.auto
        import tqdm.std

        tqdm.auto.tqdm = tqdm.std.tqdm
        try:
            terminal = stream.fileno()  # the kernel's copy of what it got from papermill
        except io.UnsupportedOperation:  # where the kernel leaves the original as it is, as on Windows
            terminal = 2
        stream.echo = open(terminal, "w", encoding="utf-8", errors="replace", closefd=False)
