"""The runs of an experiment, as notebooks and commands ask for them: what is made already is loaded, what is
kept with the code and fits is restored, and what is missing is trained."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from companion import records
from companion.experiment import Experiment
from companion.locks import locked
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.settings import Run, evaluation_code, retrain
from companion.shipping import counted_from, pack, sha256, unpack
from companion.training import model_path, train
from flowlib import load_checkpoint
from flowlib.checkpoints import load_tensors, save_checkpoint
from flowlib.ranks import rank_and_size, shared
from flowlib.training import Diverged


def ensure(experiment: Experiment, run: Run) -> dict:
    """The record of a run: what is missing of it, and of the run that it starts from, is made first, with a
    progress bar.

    With RETRAIN=1 in the environment, models that are kept with the code are not used. Several processes may
    ask for the same run: one makes it, or all ranks of one torchrun together. A run that diverged has a
    record too, of kind "failed"."""
    first = rank_and_size()[0] == 0
    record = shared(_whole(experiment, run) if first else None)
    if record and _is_current(record):  # read without a right to write
        return record
    if run.start:
        ensure(experiment, run.start)
    with _locked(experiment.directory(run) / "lock") if first else nullcontext():
        if first:
            record = _whole(experiment, run) or (None if retrain() else _restored(experiment, run))
            if record and not _is_current(record):
                record = _evaluate(experiment, run)
        return shared(record) or _make(experiment, run)


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


def _locked(path):
    return locked(path, f"another process is making {path.parent.name}: waiting for it")


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


def _whole(experiment, run):
    """The finished record, unless somebody deleted the model, or it was kept with the code and RETRAIN=1."""
    record = _finished(experiment, run)
    if not record or record["kind"] == "failed":
        return record
    return record if model_path(experiment, run).exists() and not (record.get("kept") and retrain()) else None


def _is_current(record):
    """Whether today's code would evaluate to the same. What is kept with the code is checked by `verify`."""
    return record["kind"] == "failed" or record.get("kept") or record["evaluation_code"] == evaluation_code()


def _restored(experiment, run):
    record_path, kept = kept_place(experiment, run)
    record = _read(record_path)
    if not record or not kept.exists() or not _fits(record, run, experiment):
        return None
    own = experiment.directory(run) / "record.json"
    own.unlink(missing_ok=True)  # never an old record beside another model
    unpack(kept, model_path(experiment, run), _kept_start(experiment, run))
    record["kept"] = True
    records.write(own, record)
    return record


def _make(experiment, run):
    """Trains, on all ranks; what is written comes from the first."""
    started, record, first = provenance(), None, rank_and_size()[0] == 0
    directory = experiment.directory(run)
    try:
        model, summary = train(experiment, run)
    except Diverged as error:
        # A run that diverged is a result too.
        if first:
            model_path(experiment, run).unlink(missing_ok=True)
            rest = str(error), error.summary, started
            record = records.write_failed(experiment, run, directory, *rest)
    else:
        if first:
            (directory / "record.json").unlink(missing_ok=True)  # never an old one beside another model
            info = {"summary": summary, "provenance": started, "settings": run.as_dict()}
            save_checkpoint(model_path(experiment, run), model, **info)
            record = _evaluate(experiment, run)
    return shared(record)


def _evaluate(experiment, run):
    directory = experiment.directory(run)
    info = load_tensors(model_path(experiment, run))[1]["info"]
    record = records.evaluate(experiment, run, load(experiment, run), info["summary"], info["provenance"])
    records.write(directory / "record.json", record)
    (directory / "resume.safetensors").unlink(missing_ok=True)  # not before: a kill must lose no training
    return record


def publish(experiment: Experiment, run: Run, ship: bool = False) -> Path:
    """publish_all of one run: the path of its record."""
    return publish_all(experiment, [run], [run] if ship else [])[0]


def publish_all(experiment: Experiment, runs: list[Run], ship: list[Run] = ()) -> list[Path]:
    """Copies the records of finished runs to results/, to be kept with the code; the models of those in ship,
    too, small. Nothing is replaced before all is written, and what replaces needs no space: a flow and the
    solvers that are counted from it stay together. Raises FileNotFoundError and ValueError before that."""
    found = {run.name: _publishable(experiment, run, run in ship) for run in runs}
    for run in ship:
        start = _kept_start(experiment, run)
        if start and not start.exists() and run.start not in ship:
            with_it = f"--ship {run.start.name} {run.name}"
            raise ValueError(f"{run.name} is kept as differences to its flow, which is not kept: {with_it}")
    new = {}  # {path: where it is written first}
    try:
        for run in sorted(runs, key=lambda run: run.kind != "flow"):
            record_path, kept = kept_place(experiment, run)
            if run in ship:
                start = _kept_start(experiment, run)
                new[kept] = kept.with_name(f".{kept.name}.new")
                _ship(experiment, run, found[run.name], new[kept], new.get(start, start))
            new[record_path] = record_path.with_name(f".{record_path.name}.new")
            records.write(new[record_path], found[run.name])
        _check_counted(new)
        for path, written in new.items():
            os.replace(written, path)
    finally:
        for written in new.values():
            written.unlink(missing_ok=True)
    return [kept_place(experiment, run)[0] for run in runs]


def _publishable(experiment, run, ship):
    """The record of a run that can be published."""
    record = _read(experiment.directory(run) / "record.json")
    record_path, kept = kept_place(experiment, run)
    if not record or ship and record["kind"] != "failed" and not model_path(experiment, run).exists():
        raise FileNotFoundError(
            f"{run.name} is not finished in {experiment.build}: make it first (python -m companion run)"
        )
    if ship and record["kind"] == "failed":
        raise ValueError(f"{run.name} diverged: there is no model of it to keep")
    record.pop("kept", None)
    if kept.exists() and not ship and _read(record_path) != record:
        raise ValueError(f"{kept} is of another training: --ship {run.name} replaces it, too")
    return record


def _check_counted(new):
    """ValueError where new, a kept flow among it, leaves solvers that are counted from the old one."""
    models = [path for path in new if path.suffix == ".safetensors"]
    old = {sha256(path) for path in models if path.exists()} - {sha256(new[path]) for path in models}
    others = [path for path in (RESULTS / "checkpoints").rglob("*.safetensors") if old and path not in new]
    left = [path.stem for path in others if counted_from(path) in old]
    if left:
        raise ValueError(
            f"{', '.join(left)}: counted from the flow kept now: --ship them too, or delete them"
        )


def _ship(experiment, run, record, path, start):
    """Writes the model to path, in the fewest bits that cost at most 0.02 dB on the test images."""
    for bits in (6, 7, 8, 16):
        pack(model_path(experiment, run), path, start, bits, settings=run.as_dict())
        if run.kind == "flow":
            return
        found = records.psnr_on_test(experiment, run, kept_model(experiment, run, path, start))
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


def kept_model(experiment: Experiment, run: Run, path: Path | None = None, start: Path | None = None):
    """The model of a run that is kept with the code (or at path, counted from the flow at start): a Glow, or
    an UnfoldedPGD."""
    path, start = path or kept_place(experiment, run)[1], start or _kept_start(experiment, run)
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder) / "model", start)
        return load_checkpoint(Path(folder) / "model").requires_grad_(False)
