import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOKE_BUILD = "build/smoke-book"


@pytest.fixture(scope="session")
def smoke_book():
    """The folder of the whole book, built from nothing at the smoke profile as `make book` does it."""
    build = ROOT / SMOKE_BUILD
    shutil.rmtree(build, ignore_errors=True)
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--rerun-incomplete"]
    command += ["--config", "profile=smoke", f"build={SMOKE_BUILD}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return build
