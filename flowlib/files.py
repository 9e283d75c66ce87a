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
    """As JSON has it: NumPy's and PyTorch's numbers as Python's, tuples as lists. TypeError for others."""
    other = json.JSONEncoder().default
    return json.loads(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else other(v)))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary_path), then renames it to path, whose folder is made where it is missing. Others
    may read the file as the umask says, whoever wrote it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    # In a folder of its own: libraries write beside the file, too, and what they leave is then swept as well.
    folder = path.with_name(f".{path.name}.{_host()}.{os.getpid()}-{threading.get_ident()}.tmp")
    folder.mkdir(exist_ok=True)
    try:
        write(folder / path.name)
        _share(folder / path.name, folder.stat().st_mode & 0o666)
        os.replace(folder / path.name, path)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors tells of a full disk
        if isinstance(error, OSError) or not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _share(file, bits):
    """safetensors writes files that their owner alone may read."""
    mode = file.stat().st_mode
    if bits & ~mode:
        file.chmod(stat.S_IMODE(mode | bits))


def _host():
    """This machine's name, and in a container that of its process numbers, which start at 1 in each."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = _FIRST_SPACE
    return socket.gethostname() + ("" if space == _FIRST_SPACE else f"-{space}")


def _sweep(path):
    """Removes what killed processes of this machine wrote of it."""
    if os.name != "posix":  # elsewhere a process cannot be asked whether it lives
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
