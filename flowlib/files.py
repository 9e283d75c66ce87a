"""Files that are whole or absent: each is written to a temporary name, then renamed; and JSON."""

import glob
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def as_json(value: Any) -> Any:
    """As JSON has it: NumPy's and PyTorch's numbers as Python's, tuples as lists. TypeError for others."""
    other = json.JSONEncoder().default
    return json.loads(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else other(v)))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary_path), then renames it to path, whose folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_behind(path):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _left_behind(path):
    """What killed processes of this machine wrote of it."""
    if os.name != "posix":  # elsewhere a process cannot be asked whether it lives
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(socket.gethostname())}.*.tmp"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            yield left
        except PermissionError:  # another user's
            pass
