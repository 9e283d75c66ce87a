"""Where things lie, absolute, so that notebooks and commands work from any folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"  # recorded runs, kept models and the paper's own numbers, kept with the code
OWN = "benchmarks binder book companion data flowlib notebooks profiles results tests".split()


def build_folder(build: str | Path = "build") -> Path:
    """The folder of a build; a relative one starts at the project's root. ValueError for a file, and for
    a folder that holds the project or is a part of it."""
    folder = ROOT / build
    real = folder.resolve()
    inside = real.relative_to(ROOT).parts[:1] if real.is_relative_to(ROOT) else ("build",)
    if ROOT.is_relative_to(real) or inside[0] in OWN or inside[0].startswith("."):
        why = "holds the project or is a part of it"
    elif any(place.is_file() for place in (real, *real.parents)):
        why = "is a file, or lies in one"
    else:
        return folder
    raise ValueError(f"BUILD={str(build)!r} {why}: give a folder of its own, such as build")
