"""Runs Snakemake on the project's Snakefile, one build of a folder at a time."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from companion.experiment import Experiment
from companion.files import write_json
from companion.locks import locked
from companion.paths import ROOT, build_folder
from companion.settings import retrain

_held = []


def book_folder(build: str) -> Path:
    """The folder of a whole book. ValueError for a name that commands cannot hold, some after `rm -rf`, and
    for a folder of something else, whose `html` a build would replace."""
    if not re.fullmatch(r"[\w./+-]+", build) or build.startswith("-"):
        raise ValueError(f"BUILD={build!r}: give a path of letters, digits and ./_+- only, without spaces")
    folder = build_folder(build)
    if folder.is_dir() and any(folder.iterdir()) and not folder.resolve().is_relative_to(ROOT):
        marks = [*folder.glob("data/*/manifest.json"), folder / "lock", folder / "ort"]
        html = folder / "html"
        if not any(mark.exists() for mark in marks) or html.exists() and not (html / ".buildinfo").exists():
            raise ValueError(f"BUILD={build!r} holds other files: give an empty folder, or a new one")
    return folder


def build_book(build: str, **choice) -> int:
    """Builds the book and what it needs; the exit code. A killed build is resumed: the kernel
    freed its lock, which is ours, so Snakemake's own can be removed. Raises ValueError, before
    anything is written, for a choice that cannot be built."""
    folder = book_folder(build)
    experiment = Experiment(**choice, build=build)
    # In a file, as on its command line Snakemake takes the name 2024_05_12 for a number.
    settings = {key: str(value) for key, value in (choice | {"build": build}).items()}
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "all", "--rerun-incomplete"]
    snakemake += ["--configfile", str(folder / "config.json")]
    environment = os.environ | {"BUILD_LOCK": str((folder / "lock").resolve())}
    if not os.access(os.path.expanduser("~"), os.W_OK):  # kernels and Snakemake keep files there
        environment["HOME"] = str(folder / "home")
    state = ROOT / ".snakemake"
    with contextlib.suppress(OSError):
        state.mkdir(exist_ok=True)
    if not os.access(state, os.W_OK):
        raise ValueError(f"{state} cannot be written: copy the project to a folder of yours, and build there")
    try:
        with locked(folder / "lock") as lock:
            write_json(folder / "config.json", settings)
            _train_anew(experiment, folder / "retraining", settings)
            if shutil.which("npm") and not list((folder / "ort").glob("*.mjs")):
                # npm failed, perhaps without a network: try again
                shutil.rmtree(folder / "ort", ignore_errors=True)
            # Children share the lock: it outlives this process if only this one is killed.
            options = {"cwd": ROOT, "env": environment, "pass_fds": () if lock is None else (lock,)}
            subprocess.run([*snakemake, "--unlock", "--quiet"], stderr=subprocess.DEVNULL, **options)
            code = subprocess.run(snakemake, **options).returncode
            if code == 0:
                (folder / "retraining").unlink(missing_ok=True)
            else:
                _try_to_write(folder)
            return code
    except BlockingIOError:
        print(_running(folder), file=sys.stderr)
        return 2


def hold(build: str) -> None:
    """For a Snakemake that `make book` did not start: holds the build's lock while this process lives."""
    path = build_folder(build) / "lock"
    if os.environ.get("BUILD_LOCK") == str(path.resolve()):
        return
    try:
        _held.append(locked(path))
        _held[-1].__enter__()
    except BlockingIOError:
        raise SystemExit(_running(path.parent)) from None


def _running(folder):
    return f"another build of {folder} is running: wait for it, or choose another BUILD"


def _train_anew(experiment, mark, settings):
    """With RETRAIN=1, forgets the results of the experiment's runs, so that all are trained again; a killed
    retraining resumes."""
    if not retrain():
        mark.unlink(missing_ok=True)
    elif not mark.exists() or json.loads(mark.read_text(encoding="utf-8")) != settings:
        for run in experiment.runs().values():
            for name in ("record.json", "resume.safetensors"):
                (experiment.directory(run) / name).unlink(missing_ok=True)
        shutil.rmtree(experiment.build / "executed", ignore_errors=True)
        write_json(mark, settings)


def _try_to_write(folder):
    """OSError where the disk is full, which is hard to see in a failed job's output."""
    test = folder / "space"
    try:
        test.write_bytes(bytes(2**24))
    finally:
        test.unlink(missing_ok=True)
