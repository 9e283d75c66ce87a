"""What is said of the folds of recorded solvers."""

import numpy as np
import pytest

from companion import folds, results
from tests.test_results import solver_record


def solver(psnrs, seed=0, **changes):
    """A run whose proxes are given, and give, images of these PSNRs."""
    record = solver_record("glow", 30.0, seed=seed, task=changes.pop("task", "inpainting"))
    keys = ("latent_norm_tilde", "latent_norm", "bits_per_dim_tilde", "bits_per_dim")
    rest = dict(shrinkage=0.1, step_size=0.5) | dict.fromkeys(keys, 1.0) | changes
    record["folds"] = [{"psnr_tilde": a, "psnr": b} | rest for a, b in psnrs]
    (run,) = results.rows(results.load([record]).runs)
    return run


def test_gains_are_differences_of_each_prox():
    np.testing.assert_allclose(folds.gains(solver([(10, 12), (20, 19.5)])), [2, -0.5])


def test_the_recorded_solvers_shown_are_trained_flows_by_task_the_best_first():
    shown = folds.solvers(results.load())
    assert len(shown) > 10
    assert all(r.method.startswith("glow") and r.method != "glow-frozen" for r in shown)
    for first, second in zip(shown, shown[1:]):
        assert first.task != second.task or first.psnr >= second.psnr
    one_fold = solver_record("glow", 30.0) | {"folds": [{"psnr_tilde": 1, "psnr": 2, "shrinkage": 0.1}]}
    assert folds.solvers(results.load([one_fold])) == []


ROWS = [
    {"task": "inpainting", "method": "glow", "profile": "cpu", "edition": "v2", "fold": k, "worth": w}
    for k, w in ((1, 2.0), (2, 0.01))
]


def test_worth_is_of_the_same_solver_or_not_told():
    run = solver([(10, 12), (12, 13)])
    assert folds.worth(run, ROWS) == [2.0, 0.01]
    assert folds.worth(run, []) is None
    assert folds.worth(solver([(1, 2), (2, 3)], task="deblurring"), ROWS) is None
    assert folds.worth(solver([(1, 2), (2, 3)], seed=1), ROWS) is None
    assert folds.worth(solver([(10, 12), (12, 13)], worth=1.0), ROWS) == [1.0, 1.0]


def test_the_table_and_the_counts_are_those_of_the_folds():
    runs = [solver([(10, 12), (12, 11.95)]), solver([(10, 9), (9, 20)], task="denoising")]
    rows = folds.table(runs, ROWS)
    assert [row["Gain, dB"] for row in rows] == pytest.approx([2, -0.05, -1, 11])
    assert [row["Worth, dB"] for row in rows] == [2.0, 0.01, None, None]
    found = folds.summary(runs, ROWS)
    counts = dict(denoisers=1, others=1, last_decides=1, last_idle=1, proxes=4, worse=1)
    assert found == counts | dict(measured=1, folds=2, idle=1)


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
    shown = {(r.task, r.profile, r.edition, r.method): r for r in folds.solvers(results.load())}
    denoiser = shown["denoising", "cpu", "v2", "glow"]
    gains = folds.gains(denoiser)
    assert gains[-1] > 10 and gains[:-1].max() < folds.IDLE
