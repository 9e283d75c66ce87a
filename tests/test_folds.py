"""What is said of the folds of recorded solvers."""

import numpy as np
import pytest

from companion import folds, records


def solver(psnrs, **changes):
    rows = [{"psnr_tilde": a, "psnr": b, "shrinkage": 0.1, "step_size": 0.5} for a, b in psnrs]
    names = {"profile": "cpu", "dataset": "celeba", "edition": "v2", "seed": 0}
    about = {"kind": "solver", "task": "inpainting", "method": "glow", "psnr": {"mean": 30.0}}
    return about | {"experiment": names, "folds": rows} | changes


def test_gains_are_differences_of_each_prox():
    np.testing.assert_allclose(folds.gains(solver([(10, 12), (20, 19.5)])), [2, -0.5])


def test_the_recorded_solvers_shown_are_trained_flows_by_task_the_best_first():
    shown = folds.solvers(records.recorded())
    assert len(shown) > 10
    assert all(r["settings"]["network"] == "glow" and r["method"] != "glow-frozen" for r in shown)
    for first, second in zip(shown, shown[1:]):
        assert first["task"] != second["task"] or first["psnr"]["mean"] >= second["psnr"]["mean"]
    assert folds.solvers([solver([(10, 12)])]) == []  # one fold


def test_worth_is_of_the_same_solver_or_not_told():
    record = solver([(10, 12), (12, 13)])
    rows = [
        {"task": "inpainting", "method": "glow", "profile": "cpu", "edition": "v2", "fold": k, "worth": w}
        for k, w in ((1, 2.0), (2, 0.01))
    ]
    assert folds.worth(record, rows) == [2.0, 0.01]
    assert folds.worth(record, []) is None
    assert folds.worth(solver([(1, 2), (2, 3)], task="deblurring"), rows) is None
    other_seed = record | {"experiment": record["experiment"] | {"seed": 1}}
    assert folds.worth(other_seed, rows) is None
    own = solver([(10, 12), (12, 13)])
    for fold, value in zip(own["folds"], (1.0, 0.5)):
        fold["worth"] = value
    assert folds.worth(own, rows) == [1.0, 0.5]


@pytest.mark.parametrize("count", [1, 3])
def test_the_chart_has_a_cell_for_each_prox(count):
    figure = folds.chart([solver([(10, 12.34), (12, 12.01)])] * count)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["+2.3", "0"] * count


def test_what_the_front_page_says_of_folds_is_recorded():
    """Idle: two flows in inpainting, one in deblurring, none in denoising."""
    off, idle = folds.switched_off(), {}
    for row in off:
        if row["method"] == "glow":
            idle.setdefault(row["task"], []).append(row["worth"] < folds.IDLE)
    assert {task: sum(of_task) for task, of_task in idle.items()} == {
        "inpainting": 2,
        "deblurring": 1,
        "denoising": 0,
    }
    (denoiser,) = (
        r
        for r in folds.solvers(records.recorded())
        if r["task"] == "denoising" and name_of(r) == "cpu v2" and r["method"] == "glow"
    )
    gains = folds.gains(denoiser)
    assert gains[-1] > 10 and gains[:-1].max() < folds.IDLE


def name_of(record):
    return f"{record['experiment']['profile']} {record['experiment']['edition']}"
