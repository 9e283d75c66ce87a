"""Copies an executed notebook for the book: the parameters that papermill put into it will not be on its
page, its heading says which of the notebook's pages it is, captions stay with pictures, and a copy downloaded
by itself says what it needs:
python -m companion.postprocess executed.ipynb page.ipynb about"""

import copy
import sys

import nbformat

NEEDS = """

from importlib.util import find_spec

if not (find_spec("companion") and find_spec("flowlib")):
    raise ModuleNotFoundError(
        "This notebook is a page of the flowlib book and needs the whole project, not this file alone: "
        "get the project, run `make environment` in its folder, and open the notebook with `make lab`."
    )"""


def captioned(cell):
    """A cell with a caption as one cell for each output: words beside a picture are no figure."""
    if "figure" not in cell.metadata.get("mystnb", {}) or not cell.get("outputs"):
        return [cell]
    parts = []
    for i, output in enumerate(cell.outputs):
        part = copy.deepcopy(cell)
        part.outputs = [output]
        if i:
            # Hidden, but not empty: the book leaves out cells without source.
            part |= {"id": f"{cell.id}-{i}", "source": "# one more output of the cell above"}
            part.metadata["tags"] = sorted({*cell.metadata.get("tags", []), "remove-input"})
        if not any(kind.startswith("image/") for kind in output.get("data", {})):
            del part.metadata["mystnb"]
        parts.append(part)
    return parts


def main(source, target, about=""):
    notebook = nbformat.read(source, as_version=4)
    if about:
        heading, *text = notebook.cells[0].source.split("\n")
        notebook.cells[0].source = "\n".join([f"{heading} ({about})", *text])
    notebook.cells = [part for cell in notebook.cells for part in captioned(cell)]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.source += NEEDS
        if "injected-parameters" in tags and "remove-cell" not in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
