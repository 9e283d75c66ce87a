"""Where the project lies, and in which locale it runs."""

import ast
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

import data
from companion import __main__, book, locks, provenance
from companion.files import write_json
from companion.paths import OWN, build_folder
from flowlib.checkpoints import load_tensors, save_tensors
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
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a clone that another user made
    told = provenance.provenance()["commit"]
    assert told.startswith("unknown (git: ") and "dubious ownership" in told
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.provenance()["commit"] == "unknown (git is not installed)"


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
    left |= {f".a[1].json.{host}.cluster.{gone.pid}.tmp"}
    for name in (f".a[1].json.{host}.{gone.pid}.tmp", *left):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a[1].json", lambda path: path.write_bytes(b"new"))
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json"} | left


def test_what_libraries_write_beside_is_cleaned_too(tmp_path):
    """safetensors writes to a temporary name of its own, 45 MB that a kill left for ever."""
    path, tensors = tmp_path / "m.safetensors", {"a": torch.zeros(9)}

    def killed(temporary):
        temporary.with_name(".tmpAbC").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_atomically(path, killed)
    os.waitpid(child, 0)
    assert list(tmp_path.rglob(".tmpAbC"))
    lives = tmp_path / f".m.safetensors.{socket.gethostname()}.{os.getppid()}-7.tmp"
    lives.mkdir()
    save_tensors(path, tensors, {})
    assert set(tmp_path.rglob("*")) == {path, lives} and load_tensors(path)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_may_be_read_as_the_umask_says(tmp_path, umask):
    """safetensors' own files are their owner's alone."""
    tmp_path.chmod(0o2775)  # a group's folder
    os.chown(tmp_path, -1, 4242 if os.getuid() == 0 else os.getgid())
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "m.safetensors", {"a": torch.zeros(9)}, {})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        assert path.stat().st_gid == tmp_path.stat().st_gid


def test_a_full_disk_is_told_with_the_file(tmp_path):
    """safetensors has an error of its own for it."""
    path, limits = tmp_path / "m.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_tensors(path, {"a": torch.zeros(9)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="m.safetensors") as told:
            save_tensors(path, {"a": torch.zeros(2**16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == [path]
    assert load_tensors(path)[0]["a"].numel() == 9


def without_locks(monkeypatch, number, folder=""):
    """flock as file systems without locks have it, in this folder."""
    flock = fcntl.flock

    def refused(file, flags):
        if str(folder) in file.name:
            raise OSError(number, os.strerror(number))
        return flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", refused)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    place, order = tmp_path / "run" / "lock", []

    def second():
        with locks.locked(place, "waiting"):
            order.append("second")

    with monkeypatch.context() as inner:
        without_locks(inner, number, tmp_path)
        with locks.locked(place):
            assert capsys.readouterr().err.count("has no file locks: use one machine at a time") == 1
            with pytest.raises(BlockingIOError), locks.locked(place):
                pass
            thread = threading.Thread(target=second)
            thread.start()
            while "waiting" not in capsys.readouterr().err:
                assert thread.is_alive()
            order.append("first")
        thread.join()
    assert order == ["first", "second"]
    without_locks(monkeypatch, number)  # nowhere
    with locks.locked(place) as lock:
        assert lock is None
    monkeypatch.setattr(fcntl, "flock", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), locks.locked(place):
        pass


def test_every_lock_is_one_of_these():
    assert {name for name, tree in sources() if "fcntl" in ast.unparse(tree)} == {"locks.py"}


@pytest.mark.parametrize(
    "build",
    ["/", ".", "..", "", "companion", "./results/", "data/x", "build/../flowlib", ".git", "README.md/x"],
)
def test_a_build_is_no_without_prefix_the_project(tmp_path, build):
    with pytest.raises(ValueError, match=f"^BUILD={build!r} .*: give a folder of its own"):
        build_folder(build)
    (tmp_path / "link").symlink_to(ROOT / build)
    with pytest.raises(ValueError, match="give a folder of its own"):
        build_folder(tmp_path / "link")


def test_every_folder_of_the_project_is_its_own():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.split("/")[0] for name in listed if "/" in name and name[0] != "."} <= set(OWN)
    for build in ("build", "b", "b/c", "/tmp/b"):
        assert build_folder(build) == ROOT / build


def test_a_book_replaces_no_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("mine", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^BUILD='{tmp_path}' holds other files"):
            book.build_book(str(tmp_path))
        (tmp_path / "lock").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"html", "lock"}
    (tmp_path / "html" / ".buildinfo").touch()
    assert book.book_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "name", ["", "a{b}", "x$(shell touch p)", "$HOME", "`id`", "a;b", "a\nb", "-r", ".", "a" * 101]
)
def test_names_of_data_sets_that_others_would_misread(tmp_path, name):
    with pytest.raises(ValueError, match="name .* a data set"):
        book.build_book(str(tmp_path / "build"), dataset=name)
    assert not list(tmp_path.iterdir())
    data.check_name("photos (1)")


def test_settings_of_a_running_build_stay(tmp_path, capsys):
    write_json(tmp_path / "config.json", {"profile": "smoke"})
    with locks.locked(tmp_path / "lock"):
        assert book.build_book(str(tmp_path), profile="cpu") == 2
    assert "another build" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"profile": "smoke"}


def test_a_project_that_cannot_be_written(tmp_path, monkeypatch):
    """Snakemake keeps its state there; what kernels keep in a home that cannot be written goes elsewhere."""
    environments = []

    def snakemake(*_, env, **__):
        environments.append(env)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(book, "subprocess", SimpleNamespace(run=snakemake, DEVNULL=None))
    monkeypatch.setenv("HOME", "/proc/nobody")
    assert book.build_book(str(tmp_path / "build")) == 0
    assert environments[-1]["HOME"] == str(tmp_path / "build" / "home")
    monkeypatch.setattr(book, "ROOT", Path("/proc"))
    with pytest.raises(ValueError, match="^/proc/.snakemake cannot be written: copy the project"):
        book.build_book(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_told_in_a_sentence(monkeypatch, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number), "/x/config.json")

    monkeypatch.setattr(book, "build_book", full)
    monkeypatch.setattr(sys, "argv", ["companion", "book"])
    told = __main__._told()
    assert told.startswith("error: cannot write /x/config.json (") and told.endswith("elsewhere (BUILD)")
    assert ("free some space" in told) == (number in (errno.ENOSPC, errno.EDQUOT))


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
    Image.new("RGB", (64, 64)).save(tmp_path / "originals.png")
    (tmp_path / "config.json").write_text('{"tasks": [], "labels": ["é"]}', encoding="utf-8")
    code = f"from companion.explorer.page import page; print(len(page({str(tmp_path)!r}, 'x')))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | locale, capture_output=True)
    assert int(done.stdout) > 10_000, done.stderr.decode(errors="replace")


def test_binder_gets_torch_for_the_cpu():
    """conda's build for the CPU has the version that pip asks for next, so that pip leaves it in place."""
    found = yaml.safe_load((ROOT / "binder/environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (conda,) = [line for line in found if line.startswith("pytorch-cpu=")]
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (pip,) = [Requirement(line) for line in requirements if line.startswith("torch==")]
    assert pip.specifier.contains(conda.partition("=")[2])
    assert "-r requirements.txt" in (ROOT / "binder/postBuild").read_text(encoding="utf-8")
