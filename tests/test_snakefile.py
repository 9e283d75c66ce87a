"""What is made again when something changes. Notebooks are executed for real, at the profile smoke."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from companion.imports import PACKAGES, files_of
from companion.locks import locked
from tests.conftest import ROOT

PAGE = "build/executed/in_distribution-inpainting.ipynb"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("my project")
    for name in ("flowlib", "companion", "data", "notebooks", "book"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.zip"))
    for name in ("Snakefile", "_config.yml", "_toc.yml", "package.json", "package-lock.json"):
        shutil.copy(ROOT / name, folder)
    (folder / "results/runs").mkdir(parents=True)
    for path in (ROOT / "results").glob("*.csv"):
        shutil.copy(path, folder / "results")
    shutil.copytree(ROOT / "results/benchmarks", folder / "results/benchmarks")
    return folder


def snakemake(project, *targets, dry=False, fails=False, **config):
    (project / "config.json").write_text(json.dumps({"profile": "smoke"} | config))
    options = ["--dry-run"] if dry else []
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *targets,
        *options,
        "--cores",
        "2",
        "--configfile",
        "config.json",
    ]
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def made(project):
    """{name of a run: when its record was written}, of the newest of each name."""
    times = {}
    for path in (project / "build/runs").rglob("record.json"):
        name = re.sub(r"-[0-9a-f]{10}$", "", path.parent.name)
        times[name] = max(times.get(name, 0), path.stat().st_mtime_ns)
    return times


def edit(project, file, old, new):
    path = project / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def folders(project):
    """{name of a run: its folder}; a run whose folder is another one is made again."""
    code = "from companion.experiment import Experiment as E\n"
    code += "print(*(run.folder_name for run in E('smoke').runs().values()))"
    environment = os.environ | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment, check=True)
    return {re.sub(r"-[0-9a-f]{10}$", "", name): name for name in done.stdout.split()}


def test_only_what_is_affected_is_made_again(project):
    snakemake(project, PAGE)
    first, named = made(project), folders(project)
    assert set(first) == {"flow", "flow-noisy", "inpainting-resnet", "inpainting-unet", "inpainting-glow"}

    def renamed():
        nonlocal named
        before, named = named, folders(project)
        return {name for name in first if named[name] != before[name]}

    settings = "companion/settings.py"
    rate = "network: Training(num_steps=4, batch_size=4, lr="
    edit(project, settings, rate + "1e-3", rate + "{'unet': 2e-3}.get(network, 1e-3)")
    edit(project, "companion/figures.py", "WIDTH = 5.2", "WIDTH = 5.3")
    assert renamed() == {"inpainting-unet"}  # a changed learning rate; figures change no number
    snakemake(project, PAGE)
    second = made(project)
    assert {name for name in second if second[name] != first[name]} == {"inpainting-unet"}

    for file in ("explorer/explorer.css", "explorer/live.py", "scale.py"):  # of other pages
        with open(project / "companion" / file, "a") as opened:
            opened.write("\n")
    moved = shutil.copytree(project, project.with_name("moved"))
    for place in (project, moved):
        assert "Nothing to be done" in snakemake(place, PAGE, dry=True)

    size = "num_levels=2, num_steps=1, hidden_channels="
    edit(project, settings, size + "8", size + "6")
    assert renamed() == {"flow", "flow-noisy", "inpainting-glow"}  # a changed flow
    edit(project, "flowlib/prox.py", "z / (1 + shrinkage)", "z / (1 + 1.01 * shrinkage)")
    assert renamed() == set(first)  # a changed proximal mapping: a code that all trainings may depend on


@pytest.mark.parametrize("name", ["companion/tables.py", "companion/explorer/page.py", "flowlib/solver.py"])
def test_a_page_depends_on_all_that_its_code_imports(name):
    module = name.removesuffix(".py").replace("/", ".")
    code = f"import sys, {module}; print(*(getattr(m, '__file__', None) for m in sys.modules.values()))"
    options = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    imported = subprocess.run([sys.executable, "-c", code], **options).stdout.split()
    folders = [ROOT / package for package in PACKAGES]
    ours = {path for path in map(Path, imported) if any(folder in path.parents for folder in folders)}
    assert len(ours) > 10 and {str(path.relative_to(ROOT)) for path in ours} <= set(files_of(name))


def test_another_snakemake_keeps_its_lock(project):
    """One that `make book` did not start; nor are the settings of its build changed."""
    build, environment = project / "build", os.environ | {"PYTHONPATH": str(project)}
    for made in ("data", "logs", "executed"):
        shutil.rmtree(build / made, ignore_errors=True)
    (project / "config.json").write_text('{"profile": "smoke"}')
    command = [sys.executable, "-m", "snakemake", PAGE, "--cores", "1", "--configfile", "config.json"]
    plain = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True)
    try:
        while not list(build.glob("data/*/.preparing-*")):  # it works
            assert plain.poll() is None
            time.sleep(0.1)
        os.killpg(plain.pid, signal.SIGSTOP)
        book = [sys.executable, "-m", "companion", "book", "--profile", "cpu"]
        done = subprocess.run(book, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and f"another build of {build} is running" in done.stderr
        assert list(project.glob(".snakemake/locks/*")) and not (build / "config.json").exists()
    finally:
        os.killpg(plain.pid, signal.SIGKILL)
        plain.wait()
    shutil.rmtree(project / ".snakemake/locks")
    with locked(build / "lock"):  # is free again
        found = snakemake(project, "build/data/synthetic/images.npy", fails=True)
        assert f"another build of {build} is running" in found


def test_a_cluster_is_told_what_a_page_needs(project):
    """The same DAG with a profile for a cluster; a dry run, as no cluster is here."""
    found = snakemake(project, dry=True, profile="paper")
    jobs = re.findall(r"rule (page_\w+):.*?resources: ([^\n]*)", found, re.DOTALL)
    resources = dict(jobs)
    assert (
        "gpu=1" in resources["page_in_distribution_inpainting"]
        and "runtime=1440" in resources["page_pretrain_flow"]
    )
    assert "gpu=1" not in resources["page_tables"]


def test_the_slurm_profile_is_one_that_snakemake_reads(project):
    """Its executor is a package of its own, so here another stands in for it."""
    options = ["--profile", str(ROOT / "profiles/slurm"), "--executor", "dryrun", "--quiet", "rules"]
    command = [sys.executable, "-m", "snakemake", *options, "--config", "profile=smoke"]
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "executor: slurm" in (ROOT / "profiles/slurm/config.yaml").read_text()


@pytest.mark.parametrize("name", ["2024_05_12", "007", "my photos"])
def test_names_that_look_like_numbers_stay_names(project, name):
    found = snakemake(project, dry=True, dataset=name)
    assert f"build/data/{name}/manifest.json" in found


def test_the_path_to_modules_is_extended(project, monkeypatch):
    """`module load` sets it on clusters; and RETRAIN reaches the notebooks, or is refused."""
    (project / "Snakefile").write_text(
        (ROOT / "Snakefile").read_text(encoding="utf-8")
        + """
rule told:
    shell:
        "echo TOLD $PYTHONPATH, $RETRAIN"
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("RETRAIN", "1")
    monkeypatch.setenv("PYTHONPATH", "/modules")
    command = [sys.executable, "-m", "snakemake", "told", "--cores", "1", "--config", "profile=smoke"]
    for given, expected in (([], "1"), (["retrain=0"], "0")):
        done = subprocess.run([*command, *given], cwd=project, capture_output=True, text=True)
        assert f"TOLD {project}:/modules, {expected}\n" in done.stdout, done.stderr
    assert "RETRAIN='yes': give 1" in snakemake(project, dry=True, fails=True, retrain="yes")
    shutil.copy(ROOT / "Snakefile", project)


@pytest.mark.parametrize("build", ["my build", "$HOME", "-r"])
def test_a_build_whose_name_a_shell_would_change_is_refused(project, build):
    found = snakemake(project, dry=True, fails=True, build=build)
    assert f"BUILD={build!r}: give a path of letters" in found and "rule prepare" not in found


def test_make_hands_on_what_it_was_given(tmp_path):
    python = tmp_path / "a python" / "python"
    python.parent.mkdir()
    told = "printf '%s\\n' \"$@\" RETRAIN=$RETRAIN $PYTHONPATH"
    python.write_text(f"#!/bin/sh\n{told}\n", encoding="utf-8")
    python.chmod(0o755)
    build, dataset, seed = """my "build's"; exit 3;""", 'a "b"', f"x$(shell touch {tmp_path}/x)`id`$$HOME"
    command = ["make", "-s", "book", "verify", f"PYTHON={python}", f"BUILD={build}", f"DATASET={dataset}"]
    environment = os.environ | {"PYTHONPATH": "/modules", "SEED": seed}
    options = dict(cwd=ROOT, capture_output=True, text=True)
    done = subprocess.run([*command, "RETRAIN=1"], check=True, env=environment, **options)
    found = done.stdout.splitlines()
    assert found.count(build) == 2 and dataset in found and f"The book is at {build}/html" in done.stdout
    assert seed in found and "RETRAIN=1" in found and f"{ROOT}:/modules" in found
    assert not (tmp_path / "x").exists()
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    done = subprocess.run(command, **options)
    assert f"PYTHON={python} is no Python with the packages of requirements.txt" in done.stderr


def test_editions_and_profiles_have_a_plan(project):
    for edition, profile in (("v1", "demo"), ("v2", "cpu")):
        found = snakemake(project, dry=True, profile=profile, edition=edition)
        assert "page_in_distribution_deblurring" in found
