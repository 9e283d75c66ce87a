"""What recorded solvers gain from more steps (benchmarks/going_on.py), and whether the paper's main claim
comes out otherwise then."""

import json

import numpy as np

from companion.paths import RESULTS
from companion.records import comparison, mean_and_interval
from companion.settings import METHODS
from companion.tables import Link, plus_minus, signed, spread_of_seeds

FOLDER = "benchmarks/going_on"


def gone_on(task: str) -> dict[str, dict]:
    """{method: record}: the flow as before, its rivals with BatchNorm fixed to its averages; edition v2."""
    found = {}
    for method in METHODS:
        path = RESULTS / FOLDER / f"{task}-{method}-{'going-on' if method == 'glow' else 'fixed-norms'}.json"
        if path.exists():
            found[method] = json.loads(path.read_text(encoding="utf-8")) | {"name": path.name}
    return found


def lead(task: str, records: list[dict]) -> dict[str, tuple[float, float]]:
    """{rival: (by how many dB the flow is above it, half the 95 % interval)}, over images and, as in
    tables.compare, over seeds, of which each has one here."""
    values = {method: r["psnr"]["values"] for method, r in gone_on(task).items()}
    flow = values.pop("glow", None)
    solvers = [r for r in comparison(records, "v2") if r["kind"] == "solver" and r["task"] == task]
    spread = spread_of_seeds(solvers, None, (1, 1))
    pairs = {method: mean_and_interval(np.subtract(flow, v)) for method, v in values.items() if flow}
    return {method: (mean, float(np.hypot(width, spread))) for method, (mean, width) in pairs.items()}


def rows(task: str, records: list[dict]) -> list[dict]:
    """One a solver: its result as recorded and now."""
    above = lead(task, records)
    seen = {r.get("settings_hash"): r["training"]["images_seen"] for r in records if "training" in r}
    return [
        {
            "Method": METHODS[method].short + ", BatchNorm fixed" * r["fixed_norms"],
            "Seed": r["experiment"]["seed"],
            "Images seen": f"{seen[r['settings_hash']] + r['training']['images_seen']:,}",
            "As recorded, dB": plus_minus(r["before"]),
            "Now, dB": Link(plus_minus(r["psnr"]), f"../records/{FOLDER}/{r['name']}"),
            "GLOW above it, dB": f"{signed(above[method][0])} ± {above[method][1]:.2f}"
            if method in above
            else "–",
        }
        for method, r in gone_on(task).items()
    ]


def in_words(tasks, records: list[dict]) -> str:
    """Whether the flow is ahead of the better rival then, task by task; "" where none has gone on."""
    told = []
    for task in tasks:
        above = lead(task, records)
        if {"unet", "resnet"} <= set(above):
            rival = min(above, key=lambda m: above[m][0])
            mean, width = above[rival]
            word = "ahead" if mean > width else "behind" if mean < -width else "not to be told apart"
            told.append(
                f"{task}: {word} ({signed(mean)} ± {width:.2f} dB against the {METHODS[rival].short})"
            )
    return "; ".join(told)
