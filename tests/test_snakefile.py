"""Which models the book is made from: kept ones where there are any, trained ones otherwise. Dry runs, nothing is computed."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

KEPT = ("flow", "v2/inpainting-glow", "v2/denoising-0.1-glow")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with stand-ins for kept checkpoints of the smoke profile."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("flowlib", "notebooks", "book"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "_config.yml", "_toc.yml", "package.json", "package-lock.json"):
        shutil.copy(ROOT / name, folder)
    for name in KEPT:
        for path in (f"checkpoints/smoke-synthetic-s0/{name}.safetensors", f"runs/smoke-synthetic-s0/{name}.json"):
            (folder / "results" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "results" / path).touch()
    return folder


def planned(project, **config):
    """{rule: outputs} of the jobs that Snakemake would run."""
    settings = [f"{key}={value}" for key, value in ({"profile": "smoke"} | config).items()]
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--config", *settings]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {}
    for rule, outputs in re.findall(r"rule (\w+):\n(?:    input: .*\n)?    output: (.*)", done.stdout):
        jobs.setdefault(rule, []).append(outputs)
    return jobs


def test_kept_models_are_restored_and_nothing_is_trained(project):
    jobs = planned(project)
    assert sorted(jobs["restore"]) == [
        f"build/runs/smoke-synthetic-s0/v2/{name}/record.json" for name in ("denoising-0.1-glow", "inpainting-glow")
    ]
    assert "train" not in jobs and "pretrain" not in jobs
    assert len(jobs["restore_flow"]) == 1 and "flow/model.safetensors" in jobs["restore_flow"][0]
    assert len(jobs["pretrain_noisy"]) == 1  # that one is not kept


def test_retrain_ignores_kept_models(project):
    jobs = planned(project, retrain=1)
    assert "restore" not in jobs and "restore_flow" not in jobs
    assert len(jobs["train"]) == 11 and len(jobs["pretrain"]) == 1


def test_another_experiment_is_trained(project):
    jobs = planned(project, edition="v1")
    assert "restore" not in jobs and len(jobs["train"]) == 11
    assert "restore_flow" in jobs  # the editions share their flow
