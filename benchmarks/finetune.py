"""The gain of a finished solver from 900 more steps at a tenth of its rate; with --fixed-norms, BatchNorm
then uses its averages, as in evaluation: its two modes differ, and a chain of folds multiplies that.

python -m benchmarks.finetune --run inpainting-unet --profile cpu --dataset celeba --fixed-norms"""

import argparse
from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.records import psnr_on_test, statistics
from companion.runs import ensure, load
from companion.training import device, fit_solver


class FixedNorm(nn.Module):
    """A BatchNorm2d that always normalises by its averages."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", norm.running_mean)
        self.register_buffer("var", norm.running_var)

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)


def fix_norms(model):
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, FixedNorm(child))
        else:
            fix_norms(child)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="deblurring-unet")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--edition", default="v2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", default="build")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--fixed-norms", action="store_true")
    args = parser.parse_args()
    experiment = Experiment(args.profile, args.dataset, args.edition, args.seed, args.build)
    run = experiment.runs()[args.run]
    ensure(experiment, run)
    solver = load(experiment, run).requires_grad_(True).to(device())
    before = statistics(psnr_on_test(experiment, run, solver).tolist())
    if args.fixed_norms:
        fix_norms(solver)
    name = f"{run.name}-{'fixed-norms' if args.fixed_norms else 'going-on'}"
    rates = dict(lr=run.training.lr / 10, scalar_lr=1e-4)
    settings = replace(run.training, num_steps=args.steps, validate_every=max(1, args.steps // 6), **rates)
    started = provenance()
    directory = experiment.directory(run).with_name(f"{name}-{args.steps}")
    summary = fit_solver(experiment, run, solver, settings, directory)
    record = {
        "experiment": experiment.names,
        "run": run.name,
        "settings_hash": run.settings_hash,
        "fixed_norms": args.fixed_norms,
        "before": before,
        "psnr": statistics(psnr_on_test(experiment, run, solver).tolist()),
        "training": summary,
        "trained": started,
    }
    write_json(RESULTS / "benchmarks/finetune" / experiment.key / f"{name}.json", record)


if __name__ == "__main__":
    main()
