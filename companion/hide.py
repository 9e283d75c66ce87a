"""Copies an executed notebook; the parameters that papermill put into it will not be on the book's page:
python -m companion.hide executed.ipynb page.ipynb"""

import sys

import nbformat


def main(source, target):
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags and "remove-cell" not in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
