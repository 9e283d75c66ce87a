"""The pieces of code of the user guide, each copied alone into a file and run."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CELL = re.compile(r"^```\{code-cell\}\n(?::[^\n]*\n)*(.*?)^```$", re.MULTILINE | re.DOTALL)
PIECES = [code.lstrip() for code in CELL.findall((ROOT / "book/use.md").read_text(encoding="utf-8"))]


@pytest.mark.parametrize("number", range(len(PIECES)))
def test_each_piece_runs_alone_and_shows_something(number, tmp_path):
    (tmp_path / "piece.py").write_text(PIECES[number], encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    command = [sys.executable, "-W", "ignore", "piece.py"]
    environment = clean | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = [path for path in tmp_path.glob("*.png") if path.stat().st_size > 1000]
    assert done.stdout.strip() or pictures


def test_the_pieces_are_found():
    assert len(PIECES) > 15
