"""The pieces of code of the user guide, each copied alone into a file and run."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CELL = re.compile(r"^```\{code-cell\}\n(?::[^\n]*\n)*(.*?)^```$", re.MULTILINE | re.DOTALL)
PIECES = [code.lstrip() for code in CELL.findall((ROOT / "book/use.md").read_text(encoding="utf-8"))]
# Each in a process of its own, forked from one that has already imported what takes seconds.
RUN_ALL = """
import os, runpy, sys, traceback, warnings
import matplotlib.pyplot, torch
import companion.gallery, companion.tables
warnings.simplefilter("ignore")
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(folder)
        os.dup2(os.open("out.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT), 2)
        try:
            runpy.run_path("piece.py", run_name="__main__")
            sys.stdout.flush()
            open("done", "w").close()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One for each piece, in which it was run."""
    found = [tmp_path_factory.mktemp(f"piece{number}") for number in range(len(PIECES))]
    for folder, piece in zip(found, PIECES):
        (folder / "piece.py").write_text(piece, encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RUN_ALL, *map(str, found)], env=environment, check=True)
    return found


@pytest.mark.parametrize("number", range(len(PIECES)))
def test_each_piece_runs_alone_and_shows_something(folders, number):
    folder = folders[number]
    assert (folder / "done").exists(), (folder / "err.txt").read_text(encoding="utf-8")
    pictures = [path for path in folder.glob("*.png") if path.stat().st_size > 1000]
    assert (folder / "out.txt").read_text(encoding="utf-8").strip() or pictures


def test_the_pieces_are_found():
    assert len(PIECES) > 15
