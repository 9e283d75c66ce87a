"""The parameters of a notebook that papermill executes."""

import ast
import sys

from companion.settings import choose


def check_parameters():
    """ValueError for a parameter that the notebook does not have, which papermill only warns of: a typo would
    train something else. The cell that papermill adds comes after the notebook's own parameters."""
    cells = list(getattr(sys.modules["__main__"], "In", ()))  # what IPython has executed
    for own, added in zip(cells, cells[1:]):
        if added.startswith("# Parameters\n"):
            for name in _assigned(added):
                choose(dict.fromkeys(_assigned(own)), name, "parameter")


def _assigned(cell):
    return [target.id for node in ast.parse(cell).body for target in getattr(node, "targets", ())]
