"""The runs of an experiment, for notebooks and commands: finished runs are loaded, kept models (those in
results/) are restored, and missing runs are trained."""

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
    """The record of a run. A missing run is made first, with a progress bar, after the run that it starts
    from.

    With RETRAIN=1 in the environment, kept models are not used. Several processes may ask for the same run:
    one makes it, or all ranks of one torchrun together. A diverged run has a record too, of kind "failed"."""
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
    """The trained model, a Glow or an UnfoldedPGD, of a run that ensure() has made. FileNotFoundError if the
    run diverged."""
    return load_checkpoint(model_path(experiment, run)).requires_grad_(False)


def records_of_build(experiment: Experiment) -> list[dict]:
    """The records of this experiment's finished runs in this build, with its settings and today's code."""
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
    """The paths of this run's published record and kept model in results/."""
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
    """The finished record, unless its model was deleted, or was restored and RETRAIN=1 is set."""
    record = _finished(experiment, run)
    if not record or record["kind"] == "failed":
        return record
    return record if model_path(experiment, run).exists() and not (record.get("kept") and retrain()) else None


def _is_current(record):
    """Whether today's code would evaluate to the same numbers. `verify` checks kept models."""
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
    """Trains, on all ranks; rank 0 writes."""
    started, record, first = provenance(), None, rank_and_size()[0] == 0
    directory = experiment.directory(run)
    try:
        model, summary = train(experiment, run)
    except Diverged as error:
        # A diverged run is a result, too.
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
    """Copies the records of finished runs to results/, and the packed models of the runs in ship. All files
    are written under other names first, then renamed, so that a flow and the solvers counted from it stay
    together even on a full disk. Raises FileNotFoundError and ValueError before anything is replaced."""
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
    """The run's record. FileNotFoundError or ValueError if it cannot be published."""
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
    """ValueError where a flow in new replaces one from which other kept solvers are counted."""
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
    """The record of every kept model."""
    for path in sorted((RESULTS / "checkpoints").rglob("*.safetensors")):
        place = path.relative_to(RESULTS / "checkpoints").with_suffix(".json")
        yield json.loads((RESULTS / "runs" / place).read_text(encoding="utf-8"))


def kept_model(experiment: Experiment, run: Run, path: Path | None = None, start: Path | None = None):
    """The kept model of a run, a Glow or an UnfoldedPGD (or the model at path, counted from the flow at
    start)."""
    path, start = path or kept_place(experiment, run)[1], start or _kept_start(experiment, run)
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder) / "model", start)
        return load_checkpoint(Path(folder) / "model").requires_grad_(False)
