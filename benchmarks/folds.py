"""The worth of each fold of the kept flow solvers: the PSNR without its prox (λ = 0), and the round trip of
its flow on its input.

Run, in a build with prepared images: python -m benchmarks.folds --build build"""

import argparse

import torch

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.records import measured, psnr_without_fold, reconstruct
from companion.runs import kept_experiments, kept_model
from flowlib import psnr
from flowlib.images import to_tensor

NUM_IMAGES = 100


@torch.no_grad()
def describe(record: dict, build: str) -> list[dict]:
    """One row a fold of a kept solver, on the first test images."""
    experiment = Experiment(**record["experiment"], build=build)
    run = experiment.solver(record["task"], record["method"])
    solver, x = kept_model(experiment, run), to_tensor(experiment.split("test"))
    y, operator = measured(run.task, x, run.seed)  # of all images, so that each has the noise of the tables
    x, y = x[:NUM_IMAGES], y[:NUM_IMAGES]
    whole = psnr(reconstruct(solver, operator, y)[0], x).mean().item()
    _, folds = solver(y[:50], operator, return_folds=True)
    rows = []
    for k, (prox, fold) in enumerate(zip(solver.proxes, folds)):
        latents, _ = prox.glow(fold.x_tilde)
        error = (prox.glow.inverse(latents)[0] - fold.x_tilde).abs().max().item()
        worth = whole - psnr_without_fold(solver, k, operator, y, x)
        rows.append({"fold": k + 1, "worth": worth, "round_trip": error})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", default="build")
    args = parser.parse_args()
    rows = []
    for record in kept_experiments():
        if record["kind"] == "solver" and record["settings"]["network"] == "glow":
            names = {key: record[key] for key in ("task", "method")} | {
                "profile": record["experiment"]["profile"]
            }
            rows += [
                names | {"edition": record["experiment"]["edition"]} | row
                for row in describe(record, args.build)
            ]
            print(*rows[-record["num_folds"] :], sep="\n", flush=True)
    write_json(RESULTS / "benchmarks/folds.json", {"rows": rows, "images": NUM_IMAGES, **provenance()})


if __name__ == "__main__":
    main()
