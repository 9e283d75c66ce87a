"""Locks between processes, which the kernel frees when a process ends in any way."""

import errno
import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some file systems of clusters


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[int | None]:
    """Holds the lock at path; gives its file's descriptor. If another process has it, prints `waiting` and
    waits; without `waiting` raises BlockingIOError. On a file system without locks, it says so and separates
    only one user's processes on one machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    here = Path(tempfile.gettempdir()) / f"flowlib-{os.getuid()}-{name}.lock"
    for place in (path, here):
        with open(place, "ab") as lock:
            try:
                _take(lock, waiting)
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                if place == path:
                    print(f"{path.parent} has no file locks: use one machine at a time", file=sys.stderr)
                continue
            yield lock.fileno()
            return
    yield None


def _take(lock, waiting):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise
        print(waiting, file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
