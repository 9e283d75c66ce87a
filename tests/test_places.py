"""Where the project lies, and in which locale it runs."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from companion import book, provenance
from flowlib.files import write_atomically
from tests.conftest import ROOT


def planned(folder):
    command = ["make", "--no-print-directory", "--dry-run", "environment"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # of `make test`
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=clean).stdout


@pytest.mark.parametrize("name", ["project", "my project", "it's mine"])
def test_a_moved_project_gets_a_new_environment(tmp_path, name):
    folder = tmp_path / name
    packages = folder / ".venv/lib/python3/site-packages"
    packages.mkdir(parents=True)
    for file in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, folder)
    (folder / ".venv/installed").touch()
    assert "Nothing to be done" in planned(folder)  # one that somebody made otherwise
    (packages / "project.pth").write_text(str(folder), encoding="utf-8")
    assert "Nothing to be done" in planned(folder)
    folder.rename(tmp_path / "other")
    commands = planned(tmp_path / "other")
    assert commands.index("rm -rf .venv") < commands.index("-m venv .venv") < commands.index("pip install")
    # The place that is written is that of the folder, whatever its name.
    assert str(tmp_path) not in commands and "Path.cwd()" in commands


def test_the_commit_is_that_of_the_project(tmp_path, monkeypatch):
    """An archive of it, unpacked inside another project's repository, has none."""
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    inside = tmp_path / "vendor" / "flow"
    inside.mkdir(parents=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.provenance()["commit"] != "unknown"
    monkeypatch.setattr(provenance, "ROOT", inside)
    assert provenance.provenance()["commit"] == "unknown"


@pytest.mark.parametrize("npm", [None, "/usr/bin/npm"])
@pytest.mark.parametrize("fetched", [False, True])
def test_npm_is_tried_again_where_it_failed(tmp_path, monkeypatch, npm, fetched):
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort/.snakemake_timestamp").touch()
    if fetched:
        (tmp_path / "ort/ort.wasm.min.mjs").touch()
    monkeypatch.setattr(book.shutil, "which", lambda _: npm)
    monkeypatch.setattr(book.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    assert book.build_book(str(tmp_path)) == 0
    assert (tmp_path / "ort").exists() == (fetched or not npm)  # a rule whose output is missing runs


def test_what_killed_processes_wrote_is_cleaned(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host, lives = socket.gethostname(), os.getppid()
    left = {f".a[1].json.{host}.{lives}.tmp", f".b.json.{host}.{gone.pid}.tmp"}  # the other is another file's
    left |= {f".a[1].json.elsewhere.{gone.pid}.tmp"}  # of another machine, which may still be at it
    for name in (f".a[1].json.{host}.{gone.pid}.tmp", *left):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a[1].json", lambda path: path.write_bytes(b"new"))
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json"} | left


def sources():
    """(name, syntax tree) of every module, and of the code of every notebook."""
    for folder in ("flowlib", "companion", "data", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.name, ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path.name, ast.parse("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))


def test_no_text_is_in_the_encoding_of_the_locale():
    """That of Windows is not UTF-8."""
    calls = 0
    for name, tree in sources():
        for node in ast.walk(tree):
            function = getattr(node, "func", None)
            method, opened = getattr(function, "attr", ""), getattr(function, "id", "") == "open"
            if method in ("read_text", "write_text") or opened and "b" not in ast.unparse(node.args[1:]):
                calls += 1
                assert "encoding" in {k.arg for k in node.keywords}, f"{name}: {ast.unparse(node)}"
    assert calls > 20


def test_the_explorer_is_written_in_any_locale(tmp_path):
    (tmp_path / "originals.png").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"tasks": [], "labels": ["é"]}', encoding="utf-8")
    code = f"from companion.explorer.page import page; print(len(page({str(tmp_path)!r}, 'x')))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | locale, capture_output=True)
    assert int(done.stdout) > 10_000, done.stderr.decode(errors="replace")


def test_binder_gets_torch_for_the_cpu():
    """Of two builds of the version in requirements.txt, pip takes the one with a local label."""
    lines = (ROOT / "binder/requirements.txt").read_text(encoding="utf-8").splitlines()
    assert (
        "--extra-index-url https://download.pytorch.org/whl/cpu" in lines
        and "-r ../requirements.txt" in lines
    )
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = [Requirement(line) for line in requirements if line.startswith("torch==")]
    plain, cpu = (str(torch.specifier).removeprefix("==") + label for label in ("", "+cpu"))
    assert list(torch.specifier.filter([plain, cpu])) == [plain, cpu] and Version(cpu) > Version(plain)
