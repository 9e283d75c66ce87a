"""flowlib by itself: what it imports, and that its wheel runs the book's examples far from the checkout."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import flowlib

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"torch", "numpy", "safetensors"}
OPTIONAL = {"skimage": "metrics.py", "tqdm": "training.py", "onnx": "export.py"}


def imports(path):
    """(module, line is at the top level) of all that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            yield name.partition(".")[0], node in tree.body


@pytest.mark.parametrize("path", sorted((ROOT / "flowlib").glob("*.py")), ids=lambda path: path.name)
def test_a_module_imports_what_it_may(path):
    for name, at_the_top in imports(path):
        if name not in NEEDED | {"flowlib"} | sys.stdlib_module_names:
            assert OPTIONAL.get(name) == path.name, f"{path.name} imports {name}"
            assert not at_the_top or path.name == "export.py", (
                f"{path.name} imports {name} before it is needed"
            )


def run(code, cwd, python=sys.executable):
    """What a Python prints that knows neither the checkout nor the user's own packages."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-I", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_little():
    """Nothing beyond PyTorch's own imports, and hardly more time."""
    code = """
import sys, time
sys.path.insert(0, {root!r})
start = time.perf_counter()
import torch, numpy, safetensors.torch
from torch.utils import checkpoint
middle, before = time.perf_counter(), set(sys.modules)
import flowlib
print(time.perf_counter() - middle, middle - start)
print(*sorted({{m.partition(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
"""
    times, modules = run(code.format(root=str(ROOT)), ROOT).splitlines()
    ours, torchs = map(float, times.split())
    assert modules.split() == ["flowlib"]
    assert ours < 0.1 + 0.2 * torchs


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python of its own, with this one's packages and flowlib's wheel; the checkout is not on its path."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, as building leaves files
    source.mkdir()
    for name in ("flowlib", "companion", "data", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("flowlib-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    own = folder / "venv" / "bin" / "python"
    packages = Path(run("import sysconfig; print(sysconfig.get_path('purelib'))", folder, own).strip())
    target = [*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel]
    done = subprocess.run(target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A path file appends only this folder: an editable install of the checkout in there is not followed.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return own


def test_the_wheel_is_flowlib_alone(python, tmp_path):
    packages = next(python.parents[1].glob("lib/python*/site-packages"))
    assert {p.name for p in packages.glob("*") if "flowlib" not in p.name} == {"others.pth"}
    names = {p.name for p in (packages / "flowlib").iterdir() if p.name != "__pycache__"}
    assert names == {p.name for p in (ROOT / "flowlib").glob("*.py")}
    code = "import flowlib, importlib.util as u; print(flowlib.__file__, u.find_spec('companion'), sep='|')"
    place, companion = run(code, tmp_path, python).strip().split("|")
    assert Path(place).is_relative_to(packages) and companion == "None"
    [metadata] = packages.glob("flowlib-*.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(required) == sorted(
        [
            "torch",
            "numpy",
            "safetensors",
            'tqdm; extra == "train"',
            'scikit-image; extra == "metrics"',
            'onnx; extra == "onnx"',
        ]
    )


def test_the_books_examples_run_on_the_wheel(python, tmp_path):
    """The Python of book/use.md, in one go and in an empty folder."""
    text = (ROOT / "book" / "use.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```\{code-cell\}\n(?::[^\n]*\n)*(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ours = [
        s
        for s in snippets
        if not re.search(r"^(from|import) (companion|data|onnxruntime)\b", s, re.MULTILINE)
    ]
    assert len(ours) >= 3  # the others show pictures by companion, which is no part of the wheel
    run("import torch\ntorch.set_num_threads(1)\n" + "\n".join(ours), tmp_path, python)


@pytest.mark.long
def test_the_release_recipe_makes_a_wheel_and_a_source_archive(tmp_path):
    """As CONTRIBUTING.md says, in an environment of its own; the workflow asks for the same file name."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("flowlib", "companion", "data", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "-q", "install", "build"], check=True)
    done = subprocess.run([python, "-m", "build"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = flowlib.__version__
    names = {path.name for path in (source / "dist").iterdir()}
    assert names == {f"flowlib-{version}-py3-none-any.whl", f"flowlib-{version}.tar.gz"}
