"""Notebooks that papermill executes with somebody's own parameters, in a place where nothing is prepared."""

import json
import os
import re
import subprocess
import sys

import papermill
import pytest
import torch

from companion import settings
from companion.experiment import Experiment
from companion.experiment_page import check_psnr
from companion.parameters import PROFILES, TASKS, check, notebook_parameters
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAIN = sys.modules["__main__"]


def test_the_names_told_early_are_those_of_the_tables():
    assert PROFILES == tuple(settings.PROFILES) and sorted(TASKS) == sorted(settings.EDITIONS)
    for edition, tasks in TASKS.items():
        assert list(tasks) == Experiment("smoke", edition=edition).tasks()
        for profile in ("smoke", "demo", "short", "cpu"):
            assert all(Experiment(profile, edition=edition).methods(task) for task in tasks)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_checked_before_anything_else(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first, second = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][:2]
    assert re.fullmatch(r"(\w+ = .+\n?)+", first)
    assert second.endswith("\n\nparameters = notebook_parameters()") and second.count("import") == 1


def test_figures_have_names_of_their_own():
    """The book refuses a name that two pages have, after a quarter of an hour."""
    names = [
        cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
        for path in NOTEBOOKS
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]
    names = [name for name in names if name]
    assert len(names) > 10 and len(set(names)) == len(names)


def test_a_solver_must_give_what_its_record_says():
    record, statistics = {"psnr": None}, {"values": [20.0, 30.0, 25.0]}
    check_psnr(record, statistics, torch.tensor([20.005, 30.0]))
    with pytest.raises(AssertionError):
        check_psnr(record, statistics, torch.tensor([20.05, 29.95]))
    kept = record | {"kept": True}
    check_psnr(kept, statistics, torch.tensor([20.2, 29.9]))  # 0.05 dB in the mean
    with pytest.raises(AssertionError):
        check_psnr(kept, statistics, torch.tensor([20.2, 30.2]))
    with pytest.raises(AssertionError):
        check_psnr(kept, statistics, torch.tensor([20.4, 29.6]))  # level in the mean alone


def test_the_check_needs_no_torch():
    code = "import sys, companion.parameters; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(task="foo"),
            "unknown task of edition v2 'foo'; choose one of: denoising, inpainting, deblurring",
        ),
        (dict(task="denoising-0.1"), "unknown task of edition v2"),
        (dict(task=1), "unknown task"),
        (dict(profile="big"), "unknown profile 'big'; choose one of: smoke, demo"),
        (dict(profile=None), "unknown profile None"),
        (dict(edition=2), "unknown edition 2; choose one of: v2, v1"),
        *(
            (dict(seed=seed), "seed must be a whole number of at least 0")
            for seed in (1.5, 0.0, -1, "1", True, None)
        ),
        *((dict(num_folds=n), "num_folds must be a whole number of at least 1") for n in (True, 0, 2.5, "4")),
        *((dict(num_steps=n), "num_steps must be a whole number") for n in (2.5, -3, "many", float("nan"))),
        (dict(batch_size=0), "batch_size must be a whole number of at least 1, not 0"),
        *(
            (dict(lr=rate), "lr must be a number of at least 0")
            for rate in ("fast", -1e-3, float("inf"), False)
        ),
        *((dict(noisy=value), "noisy must be True or False") for value in ("true", 1, None)),
        (dict(last_fold_only="no"), "last_fold_only must be True or False, not 'no'"),
        (dict(flow="{num_levels: 3}"), "flow must be a mapping of its settings .papermill: -y"),
        *((dict(dataset=name), "dataset must be the name") for name in (20240512, "", "..", "a/b")),
        (dict(build=""), "build must be text"),
        (dict(images=7), "images must be the name of a data set"),
        (dict(shift="12"), "shift must be a number"),
        *((dict(task="inpainting", shift=n), "shift, the side of a hole,") for n in (12.5, 0, 65)),
    ],
)
def test_values_that_a_parameter_cannot_have_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        check(given)


@pytest.mark.parametrize("override", [dict(flow={"num_level": 3}), dict(batch_size=17), dict(seed=0.5)])
def test_an_experiment_refuses_them_too(override):
    with pytest.raises(ValueError, match="num_level|batch_size 17 is more than the 16 images|seed"):
        Experiment("smoke", **override)


def test_none_and_usual_values_are_taken():
    check(dict(num_folds=None, lr=None, flow=None, images=None, shift=None, last_fold_only=None))
    check(dict(task="denoising-0.1", edition="v1", shift=0.3, lr=0, seed=3, noisy=False, images="mine"))
    check(dict(task="inpainting", shift=12))


def test_parameters_that_a_notebook_does_not_have_are_refused(tmp_path, monkeypatch):
    """Here its cells are what IPython has executed."""
    given = dict(task="denoising", seed=1, dataset="mine", build=str(tmp_path))
    for name, value in given.items():
        monkeypatch.setattr(MAIN, name, value, raising=False)
    own, added = 'task = "inpainting"\nseed = 0', '# Parameters\ntaks = "denoising"\nseed = 1\n'
    monkeypatch.setattr(MAIN, "In", ["", own, added, "1 + 1"], raising=False)
    with pytest.raises(ValueError, match="unknown parameter 'taks'; choose one of: task, seed"):
        notebook_parameters()
    monkeypatch.setattr(MAIN, "In", ["", own, added.replace("taks", "task"), "1 + 1"])
    with pytest.raises(FileNotFoundError, match="python -m companion prepare .* --name mine"):
        notebook_parameters()


def test_an_own_run_where_nothing_is_prepared(tmp_path):
    """Progress is told while papermill runs, and pictures are there, whatever matplotlib is told to be."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.family: none such\nsavefig.pad_inches: 9\n"
    )
    settings = {"MPLBACKEND": "Agg", "MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "papermill",
        ROOT / "notebooks/in_distribution.ipynb",
        tmp_path / "out.ipynb",
    ]
    command += ["-p", "profile", "smoke", "-p", "num_steps", "6", "-p", "build", tmp_path / "build"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"synthetic: +\d+%.*1400", done.stderr)
    assert all(
        re.search(rf"inpainting-{name}-\w+: .*6/6", done.stderr) for name in ("resnet", "unet", "glow")
    )
    cells = json.loads((tmp_path / "out.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) >= 3
    assert not any(
        "Figure(" in "".join(data.get("text/plain", "")) and "image/png" not in data for data in shown
    )


def test_a_wrong_parameter_is_told_by_name_and_nothing_is_made(tmp_path):
    wrong = dict(task="foo", profile="smoke", build=str(tmp_path / "build"))
    with pytest.raises(papermill.PapermillExecutionError, match="choose one of: denoising, inpainting"):
        papermill.execute_notebook(
            ROOT / "notebooks/in_distribution.ipynb", tmp_path / "out.ipynb", wrong, progress_bar=False
        )
    assert not (tmp_path / "build").exists()
