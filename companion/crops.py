"""What benchmarks/crops.py found: faces cut otherwise than in training."""

import json

import matplotlib.pyplot as plt
import numpy as np

from companion.figures import COLOURS, GREY, styled
from companion.paths import RESULTS
from companion.records import mean_and_interval
from companion.settings import TASKS

# What changes, its name on an axis, and its value in training.
CHANGES = {"scale": ("side of the square ÷ that of training", 1.0), "shift": ("downwards, by its side", 0.0)}


def record() -> dict | None:
    path = RESULTS / "benchmarks/crops.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def series(crops: list[dict], change: str) -> list[dict]:
    """The crops in which nothing but this changed, in order."""
    other = next(name for name in CHANGES if name != change)
    found = [row for row in crops if row[other] == CHANGES[other][1]]
    return sorted(found, key=lambda row: row[change])


def difference(row: dict, task: str, first: str = "glow", second: str = "resnet") -> tuple[float, float]:
    """Mean over the images of first − second in dB, and half its 95 % interval."""
    a, b = (np.array(row["psnr"][task][method]["values"]) for method in (first, second))
    return mean_and_interval(a - b)


@styled
def chart(crops: list[dict]):
    """GLOW minus ResNet for each task, and the flow's bits per dimension, over the crops."""
    tasks = [task for task in TASKS if task in crops[0]["psnr"]]
    figure, axes = plt.subplots(
        len(tasks) + 1, 2, figsize=(5.8, 2.0 * (len(tasks) + 1)), sharex="col", sharey="row"
    )
    for column, (change, (label, usual)) in zip(axes.T, CHANGES.items()):
        rows = series(crops, change)
        at = [row[change] for row in rows]
        for axis, task in zip(column, tasks):
            means, halves = zip(*(difference(row, task) for row in rows))
            axis.axhline(0, color=GREY, lw=1)
            axis.errorbar(at, means, halves, fmt="o-", ms=4, lw=1.4, color=COLOURS["glow"], capsize=2)
            axis.set_title(TASKS[task].label, fontsize=9.5)
        bits = [row["bits_per_dim"] for row in rows]
        means, halves = zip(*((b["mean"], b["half_width"]) for b in bits))
        column[-1].errorbar(at, means, halves, fmt="s-", ms=4, lw=1.4, color="#0072B2", capsize=2)
        column[-1].set_title("likelihood under the flow", fontsize=9.5)
        column[-1].set_xlabel(label)
        for axis in column:
            axis.axvline(usual, color=GREY, lw=1, ls=":")
    for axis in axes[:-1, 0]:
        axis.set_ylabel("GLOW − ResNet, dB", fontsize=9)
    axes[-1, 0].set_ylabel("bits/dim", fontsize=9)
    return figure
