"""Where a number comes from: code, machine and date."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import flowlib
from companion.paths import ROOT


def provenance():
    """Commit (with "+" where the tree had changes; from $GIT_COMMIT where the code has no history), versions,
    hardware and date, as a JSON-able dict."""
    return dict(
        commit=_commit(),
        flowlib=flowlib.__version__,
        torch=torch.__version__,
        hardware=_hardware(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _commit():
    def git(*args):
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    unknown = "unknown"
    try:
        # An unpacked archive may lie inside another project's repository.
        if Path(git("rev-parse", "--show-toplevel")) == ROOT:
            changed = "+" if git("status", "--porcelain", "-uno") else ""
            return git("rev-parse", "--short=10", "HEAD") + changed
    except FileNotFoundError:
        unknown += " (git is not installed)"
    except subprocess.CalledProcessError as error:  # such as: detected dubious ownership
        unknown += f" (git: {error.stderr.partition(' at ')[0].strip()})"  # without the place
    return os.environ.get("GIT_COMMIT", unknown)


def _hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
