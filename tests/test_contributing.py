"""CONTRIBUTING.md: its steps are followed in a copy of the project, its lists are those of the code."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml

from companion import settings
from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEP = re.compile(r"^In `([^`]+)`, below `([^`]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = [sys.executable, "-m"]


def run(*command, cwd):
    environment = os.environ | {"PYTHONPATH": str(cwd)}
    done = subprocess.run([*PYTHON, *command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in which all steps of CONTRIBUTING.md were done."""
    folder = tmp_path_factory.mktemp("contributed")
    for name in ("flowlib", "companion", "data", "notebooks", "book"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.zip"))
    for name in ("Snakefile", "_toc.yml"):
        shutil.copy(ROOT / name, folder)
    (folder / "results/runs").mkdir(parents=True)
    steps = STEP.findall(TEXT)
    assert len(steps) == TEXT.count("\nIn `") == 8
    for name, line, addition in steps:
        text = (folder / name).read_text(encoding="utf-8")
        assert f"\n{line}\n" in text, f"{name} has no line {line!r}"
        text = text.replace(f"\n{line}\n", f"\n{line}\n{addition}", 1)
        (folder / name).write_text(text, encoding="utf-8")
    (page,) = re.findall(r"^```python\n(import nbformat.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-c", page], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", ["deblurring-2-resnet", "inpainting-resnet-2"])
def test_an_added_task_method_and_profile_make_a_run(project, name):
    listed = run("companion", "list", "--profile", "tiny", cwd=project)
    assert name in listed
    run("companion", "run", "--profile", "tiny", "--run", name, cwd=project)
    assert len(list((project / "build/runs/tiny-synthetic-s0/v2").glob(f"{name}-*/record.json"))) == 1


def test_an_added_page_executes_and_is_known_to_the_build(project):
    stored = ROOT / "notebooks", project / "notebooks/one_fold.ipynb"
    cells = [c.source for c in nbformat.read(stored[1], as_version=4).cells if c.cell_type == "code"]
    assert re.fullmatch(r"(\w+ = .+\n?)+", cells[0]) and cells[1].endswith("notebook_parameters()")
    out = project / "out.ipynb"
    run("papermill", "notebooks/one_fold.ipynb", str(out), "-p", "profile", "tiny", cwd=project)
    assert "dB after one fold" in out.read_text(encoding="utf-8")
    target = "build/executed/one_fold.ipynb"
    planned = run("snakemake", target, "--dry-run", "--cores", "1", "--config", "profile=tiny", cwd=project)
    assert "page_one_fold" in planned
    assert "notebooks/one_fold" in str(yaml.safe_load((project / "_toc.yml").read_text(encoding="utf-8")))


def test_the_lists_of_code_that_retrains_and_evaluates_again_are_whole(monkeypatch):
    counted = []
    monkeypatch.setattr(settings, "_code_hash", lambda files: counted.append(list(files)) or "hash")
    settings.training_code.__wrapped__()
    monkeypatch.setattr(settings, "training_code", lambda: "hash")
    settings.evaluation_code.__wrapped__()
    trains, evaluates = counted[0], counted[-1]
    rows = [line.split("|")[1:3] for line in TEXT.splitlines() if line.startswith("| `flowlib")]
    told = {effect.split(";")[0].strip(): re.findall(r"`([^`]+\.py)`", files) for files, effect in rows}
    assert set(told["every training of a build"]) == set(trains)
    assert set(told["every evaluation of a build"]) == set(evaluates)
    assert all((ROOT / name).exists() for files in told.values() for name in files)


def test_comments_do_not_count_and_code_does(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "flowlib", tmp_path / "flowlib")
    (tmp_path / "companion").mkdir()
    for name in ("training", "records"):
        shutil.copy(ROOT / f"companion/{name}.py", tmp_path / "companion")
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    before, solver = settings.training_code.__wrapped__(), tmp_path / "flowlib/solver.py"
    assert before == settings.training_code()
    solver.write_text(solver.read_text(encoding="utf-8") + "\n# why\n", encoding="utf-8")
    assert settings.training_code.__wrapped__() == before
    solver.write_text(solver.read_text(encoding="utf-8") + "WHY = 1\n", encoding="utf-8")
    assert settings.training_code.__wrapped__() != before


def test_every_file_named_exists():
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        for row in table.splitlines():
            folder = ""
            for name in re.findall(r"`([\w/]+(?:\.\w+|/))`", row):
                folder = name.rpartition("/")[0] if "/" in name else folder
                assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name


def test_hooks_strip_notebooks(tmp_path):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = config["repos"][0]["hooks"]
    entries = {hook["id"]: hook["entry"].split()[2:] for hook in hooks}
    path, cell = tmp_path / "a.ipynb", nbformat.v4.new_code_cell("print(1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", text="1")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    run(*entries["notebooks-without-outputs"], str(path), cwd=tmp_path)
    (cell,) = nbformat.read(path, as_version=4).cells
    assert cell.outputs == [] and cell.execution_count is None
    run(*entries["ruff"], str(path), cwd=tmp_path)


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_is_there(path):
    """actionlint checks their syntax, by hand: it is not among the project's packages."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands and all(job["timeout-minutes"] for job in jobs.values())
    for command in commands:
        for name in re.findall(r"(?:^|\s)(\.ci/\w+|CHANGELOG\.md)", command):
            assert (ROOT / name).exists()
        for target in re.findall(r"^make (\w+)", command):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
