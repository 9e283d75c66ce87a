"""The runs of an experiment, as notebooks and commands ask for them: what is made already is loaded, what is
kept with the code and fits is restored, and what is missing is trained."""

import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from companion import records
from companion.experiment import Experiment
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.settings import Run, evaluation_code
from companion.shipping import pack, unpack
from companion.training import model_path, train
from flowlib import load_checkpoint
from flowlib.checkpoints import load_tensors, save_checkpoint
from flowlib.training import Diverged


def ensure(experiment: Experiment, run: Run) -> dict:
    """The record of a run: what is missing of it, and of the run that it starts from, is made first, with a
    progress bar.

    With RETRAIN=1 in the environment, models that are kept with the code are not used. Several processes may
    ask for the same run: one makes it. A run that diverged has a record too, of kind "failed"."""
    if run.start:
        ensure(experiment, run.start)
    with _locked(experiment.directory(run) / "lock"):
        record = _finished(experiment, run)
        if record and record["kind"] != "failed" and not model_path(experiment, run).exists():
            record = None  # somebody deleted the model: it is restored, or trained again
        if os.environ.get("RETRAIN") == "1":
            record = None if record and record.get("kept") else record
        else:
            record = record or _restored(experiment, run)
        if record is None:
            return _make(experiment, run)
        return record if _is_current(record) else _evaluate(experiment, run)


def load(experiment: Experiment, run: Run):
    """The trained model of a run that ensure() has made: a Glow, or an UnfoldedPGD. FileNotFoundError where
    it diverged."""
    return load_checkpoint(model_path(experiment, run)).requires_grad_(False)


def records_of_build(experiment: Experiment) -> list[dict]:
    """The records of the runs of this experiment that this build has, those of its settings and of today's
    code alone."""
    found = [_finished(experiment, run) for run in experiment.runs().values()]
    return [record for record in found if record] + records.read(_classical(experiment))


def _classical(experiment):
    return sorted(
        (experiment.build / "runs" / experiment.key / experiment.names["edition"]).glob("classical-*.json")
    )


def is_finished(experiment: Experiment, run: Run) -> bool:
    """Whether this build has its record."""
    return _finished(experiment, run) is not None


def kept_place(experiment: Experiment, run: Run) -> tuple[Path, Path]:
    """Where the record and the model of this run lie, if they are kept with the code."""
    place = experiment.place(run)
    return RESULTS / "runs" / f"{place}.json", RESULTS / "checkpoints" / f"{place}.safetensors"


@contextmanager
def _locked(path) -> Iterator[None]:
    """Waits for its turn; the kernel frees the lock of a process that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is making {path.parent.name}: waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path):
    return records.read([path])[0] if path.exists() else None


def _fits(record, run, experiment):
    """Whether a record is of these settings and of these images."""
    pixels = experiment.images().manifest["pixels_sha256"]
    return record["settings_hash"] == run.settings_hash and record["data"]["pixels_sha256"] == pixels


def _finished(experiment, run):
    """The record in the run's folder, if it is of these images."""
    record = _read(experiment.directory(run) / "record.json")
    return record if record and _fits(record, run, experiment) else None


def _is_current(record):
    """Whether today's code would evaluate to the same. What is kept with the code is checked by `verify`."""
    return record["kind"] == "failed" or record.get("kept") or record["evaluation_code"] == evaluation_code()


def _restored(experiment, run):
    record_path, kept = kept_place(experiment, run)
    record = _read(record_path)
    if not record or not kept.exists() or not _fits(record, run, experiment):
        return None
    unpack(kept, model_path(experiment, run), _kept_start(experiment, run))
    record["kept"] = True
    records.write(experiment.directory(run) / "record.json", record)
    return record


def _make(experiment, run):
    started = provenance()
    directory = experiment.directory(run)
    try:
        model, summary = train(experiment, run)
    except Diverged as error:
        # A run that diverged is a result too.
        model_path(experiment, run).unlink(missing_ok=True)
        return records.write_failed(experiment, run, directory, str(error), error.summary, started)
    info = {"summary": summary, "provenance": started, "settings": run.as_dict()}
    save_checkpoint(model_path(experiment, run), model, **info)
    return _evaluate(experiment, run)


def _evaluate(experiment, run):
    directory = experiment.directory(run)
    info = load_tensors(model_path(experiment, run))[1]["info"]
    record = records.evaluate(experiment, run, load(experiment, run), info["summary"], info["provenance"])
    records.write(directory / "record.json", record)
    (directory / "resume.safetensors").unlink(
        missing_ok=True
    )  # not before: whoever is killed need not train again
    return record


def publish(experiment: Experiment, run: Run, ship: bool = False) -> Path:
    """Copies the record of a finished run to results/, to be kept with the code; with ship, its model too,
    small."""
    record = _read(experiment.directory(run) / "record.json")
    if not record:
        raise FileNotFoundError(
            f"{run.name} is not finished in {experiment.build}: make it first (python -m companion run)"
        )
    record_path, kept = kept_place(experiment, run)
    record.pop("kept", None)
    small = kept.with_name(f".{kept.name}.new")
    try:
        if ship:
            _ship(experiment, run, record, small)
        records.write(record_path, record)
        if ship:  # last, as it needs no space: a full disk leaves the old record with its own model
            os.replace(small, kept)
    finally:
        small.unlink(missing_ok=True)
    return record_path


def _ship(experiment, run, record, path):
    """Writes the model to path, in the fewest bits that cost at most 0.02 dB on the test images."""
    for bits in (6, 7, 8, 16):
        pack(model_path(experiment, run), path, _kept_start(experiment, run), bits, settings=run.as_dict())
        if run.kind == "flow":
            return
        found = records.psnr_on_test(experiment, run, kept_model(experiment, run, path))
        cost = record["psnr"]["mean"] - found.mean().item()
        if cost <= 0.02:
            return
    print(f"the kept {run.name} costs {cost:.3f} dB: verify will say so")


def _kept_start(experiment, run):
    """The kept flow from which a kept solver's folds are counted, if it started from one."""
    if run.start is None or run.start.kind != "flow" or run.kind == "flow":
        return None
    return kept_place(experiment, run.start)[1]


def publish_classical(experiment: Experiment):
    """Copies the records of the classical methods to results/."""
    for path in _classical(experiment):
        records.write(
            RESULTS / "runs" / experiment.key / experiment.names["edition"] / path.name, _read(path)
        )


def kept_experiments() -> Iterator[dict]:
    """The record of every model that is kept with the code."""
    for path in sorted((RESULTS / "checkpoints").rglob("*.safetensors")):
        place = path.relative_to(RESULTS / "checkpoints").with_suffix(".json")
        yield json.loads((RESULTS / "runs" / place).read_text(encoding="utf-8"))


def kept_model(experiment: Experiment, run: Run, path: Path | None = None):
    """The model of a run that is kept with the code (or at path): a Glow, or an UnfoldedPGD."""
    path = path or kept_place(experiment, run)[1]
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder) / "model", _kept_start(experiment, run))
        return load_checkpoint(Path(folder) / "model").requires_grad_(False)
