"""What each fold of the recorded flow solvers does to the image."""

import json

import matplotlib.pyplot as plt
import numpy as np

from companion.figures import styled
from companion.paths import RESULTS
from companion.results import Results, Run, rows
from companion.settings import METHODS, TASKS
from companion.tables import fold_rows

IDLE = 0.1  # dB: a prox that changes the image by less


def solvers(results: Results) -> list[Run]:
    """The recorded flow solvers of more than one fold that were trained, by task, the best first."""
    found = [r for r in rows(results.runs) if r.kind == "solver" and len(r.folds or ()) > 1]
    found = [r for r in found if "shrinkage" in r.folds[0] and not r.frozen]
    return sorted(found, key=lambda r: (list(TASKS).index(r.task), -r.psnr))


def gains(run: Run) -> np.ndarray:
    """dB that each prox adds to the PSNR of what it is given, (K,)."""
    return np.array([fold["psnr"] - fold["psnr_tilde"] for fold in run.folds])


def switched_off() -> list[dict]:
    """The rows of benchmarks/folds.py; none where it was not run."""
    path = RESULTS / "benchmarks/folds.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def worth(run: Run, switched_off: list[dict]) -> list[float] | None:
    """dB that the result loses where λ = 0 in one fold, for each fold; None where that was not measured.
    switched_off: the rows of benchmarks/folds.py, whose models are of seed 0."""
    if "worth" in run.folds[0]:
        return [fold["worth"] for fold in run.folds]
    about = {name: getattr(run, name) for name in ("task", "method", "profile", "edition")}
    same = [row["worth"] for row in switched_off if about.items() <= row.items()]
    return same if same and run.seed == 0 else None


def table(runs: list[Run], switched_off: list[dict]) -> list[dict]:
    """The rows of fold_rows, with each prox's gain and worth, and its run."""
    found = []
    for run in runs:
        measured = worth(run, switched_off) or [None] * len(run.folds)
        for row, gain, loss in zip(fold_rows([run]), gains(run), measured):
            shown = {"Task": row["Task"], "Solver": name(run), "Fold": row["Fold"], "μ": row["μ"]}
            shown |= {key: row[key] for key in ("λ", "PSNR x̃, dB", "PSNR x, dB")}
            found.append(shown | {"Gain, dB": float(gain), "Worth, dB": loss, "Record": run.record})
    return found


def summary(runs: list[Run], switched_off: list[dict]) -> dict:
    """The content of the template which_folds."""
    denoisers = [r for r in runs if TASKS[r.task].kind == "denoising"]
    others = [r for r in runs if r not in denoisers]
    measured = [found for r in runs if (found := worth(r, switched_off))]
    return dict(
        denoisers=len(denoisers),
        others=len(others),
        last_decides=sum(gains(r)[-1] > 4 > gains(r)[:-1].max() for r in denoisers),
        last_idle=sum(abs(gains(r)[-1]) < IDLE for r in others),
        proxes=sum(len(r.folds) for r in runs),
        worse=sum(int((gains(r) < -IDLE).sum()) for r in runs),
        measured=len(measured),
        folds=sum(map(len, measured)),
        idle=sum(loss < IDLE for found in measured for loss in found),
    )


def name(run: Run) -> str:
    return f"{METHODS[run.method].short}, {run.profile} {run.edition}"


@styled
def chart(runs: list[Run]):
    """The gain of each prox, a cell a fold and a row a solver; tasks apart."""
    by_task = {task: found for task in TASKS if (found := [r for r in runs if r.task == task])}
    heights, width = [len(found) for found in by_task.values()], max(len(r.folds) for r in runs)
    size = (5.6, 0.3 * sum(heights) + 0.62 * len(by_task))
    options = dict(figsize=size, squeeze=False, sharex=True, height_ratios=heights)
    figure, axes = plt.subplots(len(by_task), 1, **options)
    for axis, (task, found) in zip(axes[:, 0], by_task.items()):
        cells = np.full((len(found), width), np.nan)
        for row, run in zip(cells, found):
            row[: len(run.folds)] = gains(run)
        # Steep around zero, so that a tenth of a decibel differs from nothing and from ten.
        shades, limit = np.sign(cells) * np.log1p(np.abs(cells) / IDLE), np.log1p(15 / IDLE)
        axis.imshow(shades, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        for (i, k), value in np.ndenumerate(cells):
            if np.isfinite(value):
                colour = "white" if abs(shades[i, k]) > 0.6 * limit else "#222222"
                text = f"{value:+.1f}".replace("-", "−") if abs(value) >= IDLE else "0"
                axis.text(k, i, text, ha="center", va="center", fontsize=8.5, color=colour)
        axis.set_title(TASKS[task].label, fontsize=10, loc="left")
        axis.set_yticks(range(len(found)), [name(r) for r in found], fontsize=8.5)
        axis.set_xticks(range(width), range(1, width + 1))
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[-1, 0].set_xlabel("fold k: gain of its prox in PSNR, dB")
    return figure
