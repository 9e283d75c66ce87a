"""Where things lie, absolute, so that notebooks and commands work from any folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"  # recorded runs, kept models and the paper's own numbers, kept with the code


def build_folder(build: str | Path = "build") -> Path:
    """The folder of a build; a relative one is meant from the project's root."""
    return ROOT / build
