"""Results of benchmarks/crops.py: faces cut differently than in training."""

import json

import matplotlib.pyplot as plt
import numpy as np

from companion.figures import COLOURS, GREY, styled
from companion.links import benchmark
from companion.paths import RESULTS
from companion.records import mean_and_interval
from companion.settings import METHODS, TASKS
from companion.words import signed

COMPARED = ("glow", "resnet")

# What changes, its name on an axis, and its value in training.
CHANGES = {"scale": ("side of the square ÷ that of training", 1.0), "shift": ("downwards, by its side", 0.0)}


def record() -> dict | None:
    path = RESULTS / "benchmarks/crops.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def series(crops: list[dict], change: str) -> list[dict]:
    """The crops in which only this changed, in order."""
    other = next(name for name in CHANGES if name != change)
    found = [row for row in crops if row[other] == CHANGES[other][1]]
    return sorted(found, key=lambda row: row[change])


def difference(row: dict, task: str) -> tuple[float, float]:
    """Mean over the images of GLOW minus ResNet in dB, and half its 95 % interval."""
    a, b = (np.array(row["psnr"][task][method]["values"]) for method in COMPARED)
    return mean_and_interval(a - b)


def table(crops: list[dict]) -> list[dict]:
    """Rows, one a crop and task: PSNR of each solver, GLOW minus ResNet, likelihood."""
    methods = [m for m in METHODS if any(m in found for row in crops for found in row["psnr"].values())]
    found = []
    for row in crops:
        for task, quality in row["psnr"].items():
            cut = {"Task": TASKS[task].label, "Side": row["scale"], "Moved down": row["shift"]}
            means = {f"{METHODS[m].short}, dB": quality[m]["mean"] if m in quality else None for m in methods}
            mean, half_width = difference(row, task)
            away = {"GLOW − ResNet, dB": f"{signed(mean)} ± {half_width:.2f}"}
            found.append(cut | means | away | {"bits/dim": row["bits_per_dim"]["mean"]})
    return found


def summary(found: dict | None) -> dict:
    """The content of the template crops: each task, as cut in training and differently."""
    if not found:
        return {"crops": 0}
    as_trained = {name: value for name, (_, value) in CHANGES.items()}
    (usual,) = (row for row in found["crops"] if as_trained.items() <= row.items())
    others, tasks = [row for row in found["crops"] if row is not usual], {}
    for task, quality in usual["psnr"].items():
        mean, half_width = difference(usual, task)
        told = [(m, h) for m, h in (difference(row, task) for row in others) if abs(m) > h]
        worst = {m: min(row["psnr"][task][m]["mean"] for row in others) for m in COMPARED}
        falls = {m: quality[m]["mean"] - worst[m] for m in COMPARED}
        tasks[task] = dict(kind=TASKS[task].kind, usual=(mean, half_width), falls=falls)
        tasks[task] |= dict(flipped=sum(m * mean < 0 for m, _ in told), undecided=len(others) - len(told))
    top = usual["bits_per_dim"]["mean"] + usual["bits_per_dim"]["half_width"]
    bits = [row["bits_per_dim"] for row in others]
    less_likely = sum(b["mean"] - b["half_width"] > top for b in bits)
    return dict(crops=len(others), tasks=tasks, less_likely=less_likely, link=benchmark("crops"))


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
