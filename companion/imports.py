"""Which of the project's files a notebook or module depends on, so that an edit makes again only what needs
it."""

import ast
import functools
import json
from pathlib import Path

from companion.paths import ROOT

PACKAGES = ("companion", "data", "flowlib")


def files_of(*names: str) -> list[str]:
    """The modules that these files import, directly or not and wherever in their code, and the files
    themselves; as paths from the project's root."""
    found, left = set(), [ROOT / name for name in names]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported(path)
    return sorted(str(path.relative_to(ROOT)) for path in found)


@functools.cache
def _imported(path):
    found = []
    for node in ast.walk(ast.parse(_code(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names if name.split(".")[0] in PACKAGES):
            for n in range(1, len(parts) + 1):  # packages on the way are executed, too
                way = ROOT.joinpath(*parts[:n])
                found += filter(Path.is_file, (way.with_suffix(".py"), way / "__init__.py"))
    return found


def _code(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
