"""Runs Snakemake on the project's Snakefile, one build of a folder at a time."""

import fcntl
import shutil
import subprocess
import sys

from companion.files import write_json
from companion.paths import ROOT, build_folder


def build_book(build: str, **choice) -> int:
    """Builds the book and what it needs; the exit code. A build that was killed is gone on with: its lock,
    which the kernel frees, is ours, so that Snakemake's own can be taken away."""
    folder = build_folder(build)
    folder.mkdir(parents=True, exist_ok=True)
    # In a file, as on its command line Snakemake takes the name 2024_05_12 for a number.
    settings = {key: str(value) for key, value in (choice | {"build": build}).items()}
    write_json(folder / "config.json", settings)
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "all", "--rerun-incomplete"]
    snakemake += ["--configfile", str(folder / "config.json")]
    with open(folder / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"another build of {folder} is running: wait for it, or choose another BUILD", file=sys.stderr
            )
            return 2
        if shutil.which("npm") and not list((folder / "ort").glob("*.mjs")):
            # npm failed, perhaps without a network: try again
            shutil.rmtree(folder / "ort", ignore_errors=True)
        subprocess.run([*snakemake, "--unlock", "--quiet"], cwd=ROOT, stderr=subprocess.DEVNULL)
        return subprocess.run(snakemake, cwd=ROOT).returncode
