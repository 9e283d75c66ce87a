"""The trainings behind the book's recorded numbers, the most valuable first.

One command, which resumes where it stopped. Several may work side by side: a lock, which the kernel frees,
tells them what is being trained. On a small machine, one thread and one core each:

    OMP_NUM_THREADS=1 taskset -c 0 python -m companion.queue --dataset celeba

Each finished run is published to results/ at once; runs recorded there are not trained again.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

from companion.experiment import Experiment
from companion.gallery import publish_picture
from companion.locks import locked
from companion.records import read
from companion.runs import kept_place, publish
from companion.settings import Run

TASK_ORDER = ("inpainting", "denoising", "deblurring")
ONE_FOLD_FIRST = ("glow-1", "glow", "unet", "resnet", "unet-1", "resnet-1")


def queue(**choice) -> Iterator[tuple[Experiment, Run]]:
    """Both flows; v2's main rows, each task's likelier start of the flow first; v2's plug-and-play; v1's
    rows; v2's denoiser starts; more seeds. In a profile of one fold first: its own rows, a seed at a time."""
    v2 = Experiment(edition="v2", **choice)
    if v2.profile.starts:
        for seed in (0, 1, 2):
            other = Experiment(edition="v2", **choice | {"seed": seed})
            yield from ((other, other.solver(task, m)) for task in TASK_ORDER for m in ONE_FOLD_FIRST)
        return
    v1 = Experiment(edition="v1", **choice)
    yield from ((v2, v2.flow(noisy)) for noisy in (False, True))
    starts = {
        "inpainting": ("glow", "glow-noisy"),
        "denoising": ("glow-noisy", "glow"),
        "deblurring": ("glow", "glow-noisy"),
    }
    for task in TASK_ORDER:
        yield from ((v2, v2.solver(task, method)) for method in (starts[task][0], "unet", "resnet"))
    yield from ((v2, v2.solver(task, "glow-frozen")) for task in TASK_ORDER)
    yield from ((v2, v2.solver(task, starts[task][1])) for task in TASK_ORDER)
    for task in (*TASK_ORDER, "denoising-0.1"):
        yield from (
            (v1, v1.solver(task, m)) for m in ("glow", "glow-scratch", "unet", "resnet", "glow-noisy")
        )
    for network in ("unet", "resnet"):
        yield from ((v2, v2.solver(task, f"{network}-denoiser")) for task in ("inpainting", "deblurring"))
    for seed in (1, 2):
        other = Experiment(edition="v2", **choice | {"seed": seed})
        yield from ((other, other.solver(task, m)) for task in TASK_ORDER for m in ("glow", "unet", "resnet"))


def is_recorded(experiment: Experiment, run: Run) -> bool:
    path, _ = kept_place(experiment, run)
    return path.exists() and read([path])[0].get("settings_hash") == run.settings_hash


def work(experiment: Experiment, run: Run):
    """Makes and publishes one run, in a process of its own, unless another process makes it."""
    place = experiment.directory(run)
    try:
        with locked(place / "queue.lock"), open(place / "output.log", "ab") as log:
            if is_recorded(experiment, run):
                return
            print(experiment.place(run), flush=True)
            options = dict(run=run.name) | experiment.names | {"build": experiment.build}
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            done = subprocess.run([sys.executable, "-m", "companion", "run", *words], stdout=log, stderr=log)
            if done.returncode == 0:
                publish(experiment, run)
                publish_picture(experiment, run)
    except BlockingIOError:
        return


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--build", default="build")
    parser.add_argument(
        "--only", nargs="*", help="runs whose names end so, such as unet resnet (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="say what is recorded, and train nothing")
    args = parser.parse_args()
    for experiment, run in queue(profile=args.profile, dataset=args.dataset, build=args.build):
        if args.only and not any(run.name.endswith(ending) for ending in args.only):
            continue
        if args.list:
            print("recorded" if is_recorded(experiment, run) else "to do   ", experiment.place(run))
        elif not is_recorded(experiment, run):
            work(experiment, run)


if __name__ == "__main__":
    main()
