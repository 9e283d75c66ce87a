"""Time of an answer by each solver, all in one run on one core, in float32; records of single runs, made on
several machines, do not compare.

Run: OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.inference. Weights are random, as they do not change
the time; the operator is a hole."""

import torch
from torch.utils.benchmark import Timer

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from flowlib import Inpainting, UnfoldedPGD
from flowlib.prox import PROXES

BATCHES = (1, 16)


@torch.no_grad()
def seconds_an_image(solver: UnfoldedPGD, batch: int, min_run_time: float) -> float:
    operator = Inpainting(19)
    y = operator.measure(torch.rand(batch, 3, 64, 64) - 0.5)
    timer = Timer("solver(y, operator)", globals={"solver": solver, "y": y, "operator": operator})
    return timer.blocked_autorange(min_run_time=min_run_time).median / batch


def build(profile: str, method: str) -> UnfoldedPGD:
    run = Experiment(profile).solver("inpainting", method)
    proxes = [PROXES[run.network].from_config(run.config) for _ in range(run.num_folds)]
    return UnfoldedPGD(proxes, torch.zeros(1, 3, 64, 64)).eval()


def measure(min_run_time: float = 3.0) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for profile in ("cpu", "paper"):
        for method in ("resnet", "unet", "glow", "resnet-1", "unet-1", "glow-1"):
            solver = build(profile, method)
            seconds = [seconds_an_image(solver, batch, min_run_time) for batch in BATCHES]
            parameters = sum(p.numel() for p in solver.parameters())
            about = dict(
                profile=profile, method=method, num_folds=solver.num_folds, num_parameters=parameters
            )
            rows.append(about | {"seconds": seconds})
            print(rows[-1], flush=True)
    return {"batches": BATCHES, "rows": rows} | provenance()


if __name__ == "__main__":
    write_json(RESULTS / "benchmarks/inference.json", measure())
