"""Flipped bits, hostile files and kills: an error that names the file, or the result of the whole one."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import faults
from tests.conftest import ROOT


@pytest.mark.parametrize("kind", faults.FILES)
def test_flipped_bits(tmp_path, kind):
    found = faults.flip_bits(kind, tmp_path, 500)
    assert sum(found.values()) == 500 and set(found) <= {faults.NAMED, faults.SAME}
    assert found[faults.NAMED] > 400


@pytest.mark.parametrize("name", faults.HOSTILE)
def test_hostile_files(tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert faults.hostile(name, tmp_path) == faults.NAMED
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def kill(folder, count, method):
    found = faults.kill_runs(folder, count, method)
    assert found["killed"] == count and set(found) == {"killed", "the same record"}


def test_a_killed_run_is_gone_on_with(tmp_path):
    kill(tmp_path, 3, "resnet")


@pytest.mark.long
def test_thirty_kills(tmp_path):
    kill(tmp_path, 30, "glow")


@pytest.mark.long
def test_killed_builds():
    """The next `make book` just goes on: no lock to take away, nothing half made."""
    build = ROOT / "build/killed-book"
    shutil.rmtree(build, ignore_errors=True)
    command = [sys.executable, "-m", "companion", "book", "--profile", "smoke", "--build", str(build)]
    for seconds in np.random.default_rng(0).uniform(5, 90, size=8):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            assert process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (build / "html/index.html").exists()
