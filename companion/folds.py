"""What each fold of the recorded flow solvers does to the image."""

import json

import matplotlib.pyplot as plt
import numpy as np

from companion.figures import styled
from companion.paths import RESULTS
from companion.settings import METHODS, TASKS

IDLE = 0.1  # dB: a prox that changes the image by less


def solvers(records: list[dict]) -> list[dict]:
    """The recorded flow solvers of more than one fold that were trained, by task, the best first."""
    found = [r for r in records if r["kind"] == "solver" and len(r.get("folds") or ()) > 1]
    found = [r for r in found if "shrinkage" in r["folds"][0] and not METHODS[r["method"]].frozen]
    tasks = list(TASKS)
    return sorted(found, key=lambda r: (tasks.index(r["task"]), -r["psnr"]["mean"]))


def gains(record: dict) -> np.ndarray:
    """dB that each prox adds to the PSNR of what it is given, (K,)."""
    return np.array([fold["psnr"] - fold["psnr_tilde"] for fold in record["folds"]])


def worth(record: dict, switched_off: list[dict]) -> list[float] | None:
    """dB that the result loses where λ = 0 in one fold, for each fold; None where that was not measured.
    switched_off: the rows of benchmarks/folds.py."""
    if "worth" in record["folds"][0]:
        return [fold["worth"] for fold in record["folds"]]
    names = record["experiment"]
    about = {"task": record["task"], "method": record["method"]}
    about |= {"profile": names["profile"], "edition": names["edition"]}
    rows = [row for row in switched_off if about.items() <= row.items()] if names["seed"] == 0 else []
    return [row["worth"] for row in rows] or None


def switched_off() -> list[dict]:
    """The rows of benchmarks/folds.py; none where it was not run."""
    path = RESULTS / "benchmarks/folds.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def name(record: dict) -> str:
    names = record["experiment"]
    return f"{METHODS[record['method']].short}, {names['profile']} {names['edition']}"


@styled
def chart(records: list[dict]):
    """The gain of each prox, a cell a fold and a row a solver; tasks apart."""
    by_task = {task: [r for r in records if r["task"] == task] for task in TASKS}
    by_task = {task: found for task, found in by_task.items() if found}
    heights = [len(found) for found in by_task.values()]
    figure, axes = plt.subplots(
        len(by_task), 1, figsize=(5.6, 0.3 * sum(heights) + 0.62 * len(by_task)), squeeze=False,
        sharex=True, height_ratios=heights,
    )  # fmt: skip
    for axis, (task, found) in zip(axes[:, 0], by_task.items()):
        width = max(len(r["folds"]) for r in records)
        cells = np.full((len(found), width), np.nan)
        for row, record in zip(cells, found):
            row[: len(record["folds"])] = gains(record)
        # Steep around zero, so that a tenth of a decibel differs from nothing and from ten.
        shades = np.sign(cells) * np.log1p(np.abs(cells) / IDLE)
        limit = np.log1p(15 / IDLE)
        axis.imshow(shades, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        for (i, k), value in np.ndenumerate(cells):
            if np.isfinite(value):
                dark = abs(shades[i, k]) > 0.6 * limit
                text = f"{value:+.1f}" if abs(value) >= IDLE else "0"
                axis.text(k, i, text.replace("-", "−"), ha="center", va="center", fontsize=8.5,
                          color="white" if dark else "#222222")  # fmt: skip
        axis.set_title(TASKS[task].label, fontsize=10, loc="left")
        axis.set_yticks(range(len(found)), [name(r) for r in found], fontsize=8.5)
        axis.set_xticks(range(width), range(1, width + 1))
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[-1, 0].set_xlabel("fold k: gain of its prox in PSNR, dB")
    return figure
