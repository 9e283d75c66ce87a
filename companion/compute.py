"""Accuracy against compute: what the recorded solvers cost, with all that they start from, and reached."""

import json
import math
from collections import defaultdict

from companion.paths import RESULTS
from companion.records import comparison, of_seeds
from companion.settings import EDITIONS, METHODS, TASKS
from companion.tables import Link, benchmark, machine, minutes, record_of

COMPARED = ("glow", "glow-noisy", "unet", "resnet")


def spent(record: dict, records: list[dict]) -> float | None:
    """Minutes of its machine that a run took, with those of the runs that it starts from; None where one of
    them has no record, or another kind of machine."""
    found = {r["settings_hash"]: r for r in records if "settings_hash" in r and "training" in r}
    total, start = minutes(record), record["settings"]["start"]
    while start:
        before = found.get(start)
        if before is None or machine(before) != machine(record):
            return None
        total, start = total + minutes(before), before["settings"]["start"]
    return total


def solvers(task: str, edition: str, records: list[dict]) -> list[dict]:
    """The compared solvers of one task that have a time, each with "spent", in minutes, and "machine"."""
    of_task = [r for r in records if r["kind"] == "solver" and r["task"] == task and r["method"] in COMPARED]
    of_task = [r for r in of_task if r["experiment"]["edition"] == edition and r["psnr"]["mean"] is not None]
    timed = [r | {"spent": spent(r, records), "machine": machine(r)} for r in of_task]
    return sorted((r for r in timed if r["spent"]), key=lambda r: r["spent"])


def fairness(records: list[dict]) -> list[dict]:
    """Rows, one a compared run and seed: what it took, with all that it starts from, how often its training
    went back, and which learning rates its network was tried with."""
    tried, rows = defaultdict(list), []
    for row in json.loads((RESULTS / "benchmarks/learning_rates.json").read_text(encoding="utf-8"))["rows"]:
        tried[row["method"]].append(f"{row['lr']:g}")
    for edition in EDITIONS:
        compared = comparison(records, edition)
        trained = [r for r in compared if r["kind"] == "solver" and not METHODS[r["method"]].frozen]
        for r in (one for merged in trained for one in of_seeds(merged) if one["kind"] == "solver"):
            total, restarts = spent(r, records), r["training"].get("restarts") or ()
            rows.append(
                {
                    "Task": f"{edition}, {TASKS[r['task']].label}",
                    "Method": METHODS[r["method"]].short,
                    "Seed": r["experiment"]["seed"],
                    "Solver, min": f"{minutes(r):.0f}",
                    "With pre-training, min": "no record on this machine"
                    if total is None
                    else f"{total:.0f}",
                    "On": machine(r),
                    "Restarts at half the rate": ", ".join(f"{x['step']:,}" for x in restarts) or "–",
                    "Rate": f"{r['settings']['training']['lr']:g}",
                    "Rates tried": ", ".join(tried[METHODS[r["method"]].network]) or "–",
                    "Record": record_of(r),
                }
            )
    return rows


def slopes(task: str, edition: str, records: list[dict]) -> list[dict]:
    """Rows: what each method gained from its shortest to its longest training on a CPU core, in dB for each
    doubling of the time."""
    by_method = defaultdict(list)
    for r in solvers(task, edition, records):
        if r["machine"] == "a CPU core":
            by_method[r["method"]].append(r)
    rows = []
    for method, found in by_method.items():
        gain = found[-1]["psnr"]["mean"] - found[0]["psnr"]["mean"]
        doublings = math.log2(found[-1]["spent"] / found[0]["spent"])
        if doublings >= 1:
            row = {"Method": METHODS[method].short, "Shortest": _told(found[0]), "Longest": _told(found[-1])}
            rows.append(row | {"dB a doubling": f"{gain / doublings:.2f}"})
    return rows


def _told(record):
    return f"{record['psnr']['mean']:.2f} dB, {record['spent']:.0f} min ({record['experiment']['profile']})"


def trials() -> dict[str, dict]:
    """The records of benchmarks/recipe.py, by name, each with "minutes": of the processor, with those of the
    trials it started from; and "curve": (minutes, dB) at each validation."""
    found = {}
    for path in sorted((RESULTS / "benchmarks/recipe").glob("*.json")):
        found[path.stem] = json.loads(path.read_text(encoding="utf-8"))

    def before(trial):
        start = found.get(trial["trial"]["start"])
        return before(start) + max(start["seconds"].values()) / 60 if start else 0.0

    for trial in found.values():
        steps = sorted(map(int, trial["psnr"]))
        curve = [(before(trial) + trial["seconds"][str(s)] / 60, trial["psnr"][str(s)]) for s in steps]
        trial |= {"curve": curve, "minutes": curve[-1][0]}
    return found


def trial_rows(trials: dict[str, dict], labels: dict[str, str]) -> list[dict]:
    """One row for each of these trials, {label: name}, that is recorded."""
    rows = []
    for label, name in labels.items():
        if name not in trials:
            continue
        trial = trials[name]
        about = trial["trial"]
        shrinkage = trial["shrinkage"] and ", ".join(f"{value:.2f}" for value in trial["shrinkage"])
        images = max(map(int, trial["psnr"])) * about["batch_size"]
        rows.append(
            {
                "Trial": label,
                "Validation, dB": Link(f"{trial['curve'][-1][1]:.2f}", benchmark(f"recipe/{name}").href),
                "Minutes": f"{trial['minutes']:.1f}",
                "Images": f"{images:,}",
                "Parameters": f"{trial['num_parameters'] / 1e6:.2f} M",
                "μ": ", ".join(f"{value:.2f}" for value in trial["step_size"]),
                "λ": shrinkage or "–",
                "Outcome": trial["diverged"] or "–",
            }
        )
    return rows
