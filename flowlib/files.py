"""Files that are whole or absent: each is written to a temporary name, then renamed; and JSON."""

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FIRST_SPACE = 0xEFFFFFFC  # Linux's number of the first namespace of processes


def as_json(value: Any) -> Any:
    """value in JSON's types: NumPy's and PyTorch's numbers as Python's, tuples as lists; else TypeError."""
    other = json.JSONEncoder().default
    return json.loads(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else other(v)))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary_path), then renames that file to path and makes path's folder if needed. The
    umask sets who may read the file, whichever library wrote it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    # In a folder of its own: libraries also write beside the file, and the sweep removes their leftovers.
    folder = path.with_name(f".{path.name}.{_host()}.{os.getpid()}-{threading.get_ident()}.tmp")
    folder.mkdir(exist_ok=True)
    try:
        write(folder / path.name)
        _share(folder / path.name, folder.stat().st_mode & 0o666)
        os.replace(folder / path.name, path)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' words for a full disk
        if isinstance(error, OSError) or not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _share(file, bits):
    """Adds these permissions: safetensors writes files that only their owner may read."""
    mode = file.stat().st_mode
    if bits & ~mode:
        file.chmod(stat.S_IMODE(mode | bits))


def _host():
    """This machine's name; in a container, also its namespace, as process numbers start at 1 in each."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = _FIRST_SPACE
    return socket.gethostname() + ("" if space == _FIRST_SPACE else f"-{space}")


def _sweep(path):
    """Removes unfinished files for path from killed processes of this machine."""
    if os.name != "posix":  # os.kill(pid, 0) would end the process elsewhere
        return
    start = f".{path.name}.{_host()}."
    for left in path.parent.glob(f"{glob.escape(start)}*.tmp"):
        process = re.fullmatch(r"(\d+)(-\d+)?\.tmp", left.name.removeprefix(start))
        if process and not _is_running(int(process[1])):
            shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(OSError):
                left.unlink()


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
