"""A flow that is only plugged in, done fairly: λ and μ, one number each for all folds, chosen on validation
images, beside the paper's way (λ = 0.1 fixed, μ trained: the recorded runs "glow-frozen"), beside the same
without a flow (λ = 0), and beside the measurement itself.

Run, some minutes a task on one core, in a build with prepared images:
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.plugged_in denoising --build build
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.plugged_in inpainting --build build
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.plugged_in deblurring --build build"""

import argparse

import torch

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.records import data_of, measured, reconstruct, statistics
from companion.runs import kept_model
from companion.settings import TASKS
from companion.training import device
from flowlib import GlowProx, UnfoldedPGD, psnr, ssim
from flowlib.images import to_tensor
from flowlib.training import generator_for

SHRINKAGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STEP_SIZES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


class Identity(torch.nn.Module):
    """The prox where λ = 0, without the way through the flow and back."""

    def forward(self, x, shrinkage=None):
        return x


def plugged_in(flow, setting, num_folds):
    """The solver whose folds all have this unchanged flow and these numbers."""
    prox = GlowProx(flow) if setting["shrinkage"] else Identity()
    return UnfoldedPGD([prox] * num_folds, flow.mode(64).detach(), **setting).to(device()).eval()


def quality(x_hat, x):
    return {"psnr": statistics(psnr(x_hat, x).tolist()), "ssim": statistics(ssim(x_hat, x).tolist())}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("denoising", "inpainting", "deblurring"))
    parser.add_argument("--validation", type=int, default=8, help="images that λ and μ are chosen on")
    parser.add_argument("--images", type=int, default=500, help="the first so many test images")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--build", default="build")
    parser.add_argument("--out", help="another place of the record, such as for a trial")
    args = parser.parse_args()
    experiment = Experiment("cpu", args.dataset, "v2", build=args.build)
    flow, num_folds = kept_model(experiment, experiment.flow()).to(device()), experiment.edition.num_folds
    x_val = to_tensor(experiment.split("val")[: args.validation])
    operator = TASKS[args.task].make_operator(x_val.shape[-1]).to(device())
    y_val = operator.measure(x_val, generator_for(experiment.seed, "val"))
    rows = []
    for shrinkage in SHRINKAGES:
        for step_size in STEP_SIZES:
            setting = {"shrinkage": shrinkage, "step_size": step_size}
            x_hat, _ = reconstruct(plugged_in(flow, setting, num_folds), operator, y_val)
            value = psnr(x_hat, x_val).mean().item()
            rows.append(setting | {"psnr": round(value, 3) if value == value else None})
        print(*rows[-len(STEP_SIZES) :], sep="\n", flush=True)

    def best(of):
        row = max((row for row in of if row["psnr"] is not None), key=lambda row: row["psnr"])
        return {name: row[name] for name in ("shrinkage", "step_size")}

    x = to_tensor(experiment.split("test"))
    y, _ = measured(args.task, x, experiment.seed)  # of all images, so that each has the noise of the tables
    x, y = x[: args.images], y[: args.images]
    record = {"task": args.task, "experiment": experiment.names, "data": data_of(experiment)}
    record |= {"flow": experiment.flow().settings_hash, "num_folds": num_folds}
    record |= {"validation": rows, "num_validation": args.validation, "measurement": quality(y.cpu(), x)}
    chosen = {"plugged_in": best(row for row in rows if row["shrinkage"])}
    chosen["without_flow"] = best(row for row in rows if not row["shrinkage"])
    for name, setting in chosen.items():
        x_hat, _ = reconstruct(plugged_in(flow, setting, num_folds), operator, y)
        record[name] = setting | quality(x_hat, x)
        print(name, setting, record[name]["psnr"]["mean"], flush=True)
    path = args.out or RESULTS / "benchmarks/plugged_in" / f"{args.task}.json"
    write_json(path, record | provenance())


if __name__ == "__main__":
    main()
