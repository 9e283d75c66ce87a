"""Accuracy against compute: cost of the recorded solvers, pre-training included, and their results."""

import json
import math
from collections import defaultdict

import numpy as np
import pandas as pd

from companion.links import Link, benchmark
from companion.paths import RESULTS
from companion.results import CPU, Results, Run, frame, rows
from companion.settings import EDITIONS, METHODS, TASKS

COMPARED = ("glow", "glow-noisy", "unet", "resnet")


def spent(run: Run, runs: list[Run]) -> float | None:
    """Minutes of its machine that a run took, with those of the runs that it starts from; None where one of
    them has no record, or another kind of machine."""
    found = {r.settings_hash: r for r in runs if r.minutes is not None}
    total, before = run.minutes, run
    while before.start:
        before = found.get(before.start)
        if before is None or before.machine != run.machine:
            return None
        total += before.minutes
    return total


def solvers(results: Results, edition: str, task: str) -> pd.DataFrame:
    """The compared solvers of one task that have a time, each with "spent", in minutes, and its "psnr"."""
    every = rows(results.runs)
    found = frame(r for r in every if (r.kind, r.edition, r.task) == ("solver", edition, task))
    found = found[found.method.isin(COMPARED)]
    measured = [(spent(r, every), r.psnr) for r in rows(found)]
    found[["spent", "psnr"]] = np.array(measured, dtype=float).reshape(-1, 2)
    return found.dropna(subset=["spent", "psnr"]).sort_values("spent")


def fairness(results: Results) -> list[dict]:
    """Rows, one a compared run and seed: its cost, with all that it starts from, how often its training went
    back, and the learning rates tried for its network."""
    tried, every = defaultdict(list), rows(results.runs)
    for row in json.loads((RESULTS / "benchmarks/learning_rates.json").read_text(encoding="utf-8"))["rows"]:
        tried[row["method"]].append(f"{row['lr']:g}")
    compared = [r for edition in EDITIONS for r in rows(results.compared(edition))]
    trained = [r for merged in compared for r in merged.seeds if r.kind == "solver" and not r.frozen]
    return [
        {
            "Task": f"{r.edition}, {TASKS[r.task].label}",
            "Method": METHODS[r.method].short,
            "Seed": r.seed,
            "Solver, min": r.minutes,
            "With pre-training, min": spent(r, every) or "no record on this machine",
            "On": r.machine,
            "Restarts at half the rate": ", ".join(f"{restart.step:,}" for restart in r.restarts),
            "Rate": r.lr,
            "Rates tried": ", ".join(tried[METHODS[r.method].network]),
            "Record": r.record,
        }
        for r in trained
    ]


def inference_rows() -> tuple[list[dict], str]:
    """(rows, machine) of benchmarks/inference.py: time of an answer by each solver, in one run; none without
    its record."""
    path = RESULTS / "benchmarks/inference.json"
    if not path.exists():
        return [], ""
    record, found = json.loads(path.read_text(encoding="utf-8")), []
    for row in record["rows"]:
        milliseconds = [1000 * seconds for seconds in row["seconds"]]
        found.append(
            {
                "Method": METHODS[row["method"]].short,
                "Networks of": row["profile"],
                "Folds": row["num_folds"],
                "Parameters": row["num_parameters"],
            }
            | {f"ms an image, {n} at once": f"{ms:,.0f}" for n, ms in zip(record["batches"], milliseconds)}
        )
    return found, record["hardware"].partition(",")[0]


def slopes(results: Results, edition: str, task: str) -> list[dict]:
    """Rows: what each method gained from its shortest to its longest training on a CPU core, in dB for each
    doubling of the time."""
    found, table = solvers(results, edition, task), []
    for method, group in found[found.machine == CPU].groupby("method", sort=False):
        ends = group.iloc[0], group.iloc[-1]
        doublings = math.log2(ends[1].spent / ends[0].spent)
        if doublings >= 1:
            told = [f"{r.psnr:.2f} dB, {r.spent:.0f} min ({r.profile})" for r in ends]
            row = {"Method": METHODS[method].short, "Shortest": told[0], "Longest": told[1]}
            table.append(row | {"dB a doubling": (ends[1].psnr - ends[0].psnr) / doublings})
    return table


def trials() -> dict[str, dict]:
    """The records of benchmarks/recipe.py, by name, each with "minutes": processor time, with that of the
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
                "Minutes": trial["minutes"],
                "Images": images,
                "Parameters": f"{trial['num_parameters'] / 1e6:.2f} M",
                "μ": ", ".join(f"{value:.2f}" for value in trial["step_size"]),
                "λ": shrinkage,
                "Outcome": trial["diverged"],
            }
        )
    return rows


def beside_recorded(results: Results, trials: dict[str, dict], task: str) -> list[dict]:
    """Rows: the best trial of a flow solver, and the recorded solvers, by the same validation error."""
    of_flows = [t for t in trials.values() if (t["trial"]["task"], t["trial"]["network"]) == (task, "glow")]
    ended = [t for t in of_flows if not t["diverged"]]
    compared = [r for r in rows(results.compared("v2", task)) if r.kind == "solver" and r.method in COMPARED]
    names = ("Solver", "Folds", "Optimizer", "Validation, dB", "Minutes", "Processor", "Record")
    found = []
    if ended:
        best = max(ended, key=lambda t: t["curve"][-1][1])
        about, (spent, reached) = best["trial"], best["curve"][-1]
        found.append(["GLOW, the best trial", about["num_folds"], about["optimizer"].capitalize()])
        found[0] += [reached, spent, best["trained"]["hardware"], benchmark(f"recipe/{best['name']}")]
    for r in compared:
        reached = -10 * math.log10(r.best_val_loss)
        about = [METHODS[r.method].short, EDITIONS["v2"].num_folds, "Adam", reached, r.minutes]
        found.append([*about, r.made["hardware"], r.record])
    return [dict(zip(names, row)) for row in found]
