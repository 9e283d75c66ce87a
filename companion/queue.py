"""The trainings that the book's recorded numbers come from, in the order in which they are worth most.

One command, which goes on where it stopped; several may work side by side, for a lock that the kernel frees tells them what
is being trained. On a small machine, one thread and one core each:

    OMP_NUM_THREADS=1 taskset -c 0 python -m companion.queue --dataset celeba
"""

import argparse
import fcntl
import json
import subprocess
import sys
from typing import NamedTuple

from flowlib.experiments import METHODS, TASKS, Experiment

MAIN_ROWS = ("glow", "glow-noisy", "unet", "resnet")


class Run(NamedTuple):
    edition: str
    name: str  # "flow", "flow-noisy", "denoiser-unet", or task and method, such as "inpainting-glow"
    seed: int = 0


def runs():
    """Both flows; v2's main rows, then plug-and-play; v1's rows; v2's denoiser starts; more seeds."""
    v2 = ("inpainting", "denoising", "deblurring")
    v1 = ("inpainting", "denoising", "deblurring", "denoising-0.1")
    yield from (Run("v2", "flow"), Run("v2", "flow-noisy"))
    yield from (Run("v2", f"{task}-{method}") for task in v2 for method in MAIN_ROWS)
    yield from (Run("v2", f"{task}-glow-frozen") for task in v2)
    for task in v1:
        yield from (Run("v1", f"{task}-{method}") for method in ("glow", "glow-scratch", "unet", "resnet", "glow-noisy"))
    for network in ("unet", "resnet"):
        yield Run("v2", f"denoiser-{network}")
        yield from (Run("v2", f"{task}-{network}-denoiser") for task in ("inpainting", "deblurring"))
    for seed in (1, 2):
        yield Run("v2", "flow", seed)
        yield from (Run("v2", f"{task}-{method}", seed) for task in v2 for method in ("glow", "unet", "resnet"))


def command(run):
    """(what to run, the runs that must be finished before)."""
    if run.name in ("flow", "flow-noisy"):
        before = [run._replace(name="flow")] if run.name == "flow-noisy" else []
        return ["pretrain", *(["--noisy"] if before else [])], before
    if run.name.startswith("denoiser-"):
        return ["pretrain", "--denoiser", run.name.removeprefix("denoiser-")], []
    task = max((t for t in TASKS if run.name.startswith(f"{t}-")), key=len)
    method = run.name.removeprefix(f"{task}-")
    start = METHODS[method].start
    before = [run._replace(name=f"denoiser-{METHODS[method].network}" if start == "denoiser" else start)] if start else []
    return ["train", "--task", task, "--prox", method], before


def folder(run, args):
    experiment = Experiment(args.profile, args.dataset, run.edition, run.seed, args.build)
    return experiment.runs / run.name if run.name.startswith("flow") else experiment.runs / run.edition / run.name


def finished(run, args):
    """Whether it is recorded; a denoiser has no record of its own."""
    return (folder(run, args) / ("model.safetensors" if run.name.startswith("denoiser-") else "record.json")).exists()


def work(run, args):
    """Trains and evaluates one run, unless somebody else is at it."""
    place = folder(run, args)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if finished(run, args):
            return
        words, _ = command(run)
        choice = dict(profile=args.profile, dataset=args.dataset, edition=run.edition, seed=run.seed, build=args.build)
        words += [word for key, value in choice.items() for word in (f"--{key}", str(value))]
        with open(place / "output.log", "a") as log:
            print(json.dumps(run._asdict()), flush=True)
            subprocess.run([sys.executable, "-m", "flowlib", *words], stdout=log, stderr=log, check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--build", default="build")
    parser.add_argument("--only", nargs="*", help="methods, such as unet resnet (default: all)")
    parser.add_argument("--list", action="store_true", help="say what is finished, and train nothing")
    args = parser.parse_args()
    for run in runs():
        if args.only and not any(run.name.endswith(f"-{method}") for method in args.only):
            continue
        if args.list:
            print("finished" if finished(run, args) else "to do   ", run.edition, run.name, f"seed {run.seed}")
        elif not finished(run, args) and all(finished(earlier, args) for earlier in command(run)[1]):
            work(run, args)


if __name__ == "__main__":
    main()
