"""What makes a flow solver learn: short trainings on one core that differ in one thing each.

A trial is one training of a solver; it may start from where another one ended. Its time is
processor time, with that of the trials it started from, but without the pre-training of the flow, which all
share. Trials are compared by PSNR on validation images, as the test images belong to the book's tables.

Run, one a core: OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.recipe --build build NAME ..."""

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.runs import ensure, load
from companion.settings import Run, Training
from companion.training import add_folds, fit_solver, parameter_groups
from flowlib import GlowProx, UnfoldedPGD, load_checkpoint, save_checkpoint
from flowlib.prox import PROXES
from flowlib.training import Diverged

VALIDATIONS = 6  # a trial


@dataclass(frozen=True)
class Trial:
    """One training. start: "flow", "flow-noisy", None (fresh weights) or the trial whose solver it starts
    from; its further folds do nothing at first (λ = μ = 0). x0: "zero" or "mode", g(0).
    fold_loss: weight of a loss on every fold, falling to 0 at half of the steps. tied: folds share one
    network. by_width: a convolution of more than 64 input channels has the rate times 64 / channels."""

    task: str
    num_steps: int
    batch_size: int
    lr: float
    network: str = "glow"
    num_folds: int = 1
    start: str | None = "flow"
    x0: str = "zero"
    step_size: float = 1.0
    shrinkage: float = 0.1
    scalar_lr: float = 1e-2
    optimizer: str = "adam"
    clip_norm: float = 0.1
    blind_sigma: float | None = None
    fixed_norms: float = 0.0
    fold_loss: float = 0.0
    tied: bool = False
    by_width: bool = False
    seed: int = 0


def _trials() -> dict[str, Trial]:
    """Some minutes each for optimizer, rate and batch, of one fold; 20 minutes each for the rest."""

    def denoising(num_steps, batch_size=4, lr=1e-3, optimizer="muon", **changes):
        return Trial("denoising", num_steps, batch_size, lr, optimizer=optimizer, **changes)

    def inpainting(num_steps, batch_size=4, lr=5e-4, optimizer="muon", **changes):
        return Trial("inpainting", num_steps, batch_size, lr, optimizer=optimizer, **changes)

    trials = {f"screen-adam-{lr:g}": denoising(700, 4, lr, "adam") for lr in (2e-4, 4e-4, 8e-4)}
    trials |= {f"screen-muon-{lr:g}": denoising(600, 4, lr) for lr in (2.5e-4, 5e-4, 1e-3, 2e-3)}
    trials |= {
        "screen-adam-by-width": denoising(700, 4, 8e-4, "adam", by_width=True),
        "screen-batch-2": denoising(900, 2),
        "screen-batch-8": denoising(350, 8),
        "screen-noisy-flow": denoising(600, start="flow-noisy"),
    }
    trials |= {f"inpainting-screen-muon-{lr:g}": inpainting(600, 4, lr) for lr in (2.5e-4, 5e-4, 1e-3)}
    trials |= {f"inpainting-screen-adam-{lr:g}": inpainting(700, 4, lr, "adam") for lr in (2e-4, 4e-4)}
    slow = dict(shrinkage=0.6, scalar_lr=1e-3)  # λ starts where denoising ends, and moves slowly
    trials["inpainting-screen-adam-slow-lambda"] = inpainting(700, 4, 2e-4, "adam", **slow)
    trials["inpainting-screen-muon-slow-lambda"] = inpainting(600, 4, 5e-4, **slow)
    # At 1e-3 one fold of 1600 steps had a validation error of 1.6 at one third and at half of its steps.
    for name, task in {"denoising": partial(denoising, lr=5e-4), "inpainting": inpainting}.items():
        trials |= {
            f"{name}-1-fold": task(1600),
            f"{name}-1-fold-half": task(800),
            f"{name}-2-folds-from-1": task(400, start=f"{name}-1-fold-half", num_folds=2),
            f"{name}-4-folds-from-1": task(200, start=f"{name}-1-fold-half", num_folds=4),
            f"{name}-2-folds": task(800, num_folds=2, step_size=0.5),
            f"{name}-4-folds": task(400, num_folds=4, step_size=0.5, x0="mode"),
            f"{name}-4-folds-fold-loss": task(400, num_folds=4, step_size=0.5, x0="mode", fold_loss=0.3),
            f"{name}-4-folds-tied": task(400, num_folds=4, step_size=0.5, x0="mode", tied=True),
        }
        for network, steps in {"unet": 3000, "resnet": 2000}.items():
            for num_folds in (1, 4):
                rival = dict(network=network, start=None, num_folds=num_folds, clip_norm=1.0, fixed_norms=0.1)
                rival |= dict(step_size=1.0 if num_folds == 1 else 0.5)
                folds = f"{num_folds} fold{'s' * (num_folds > 1)}".replace(" ", "-")
                for optimizer in ("adam", "muon"):
                    trial = task(steps // num_folds, 8, lr=1e-3, optimizer=optimizer, **rival)
                    trials[f"{name}-{network}-{folds}-{optimizer}"] = trial
    return trials


TRIALS = _trials()


def build(experiment: Experiment, trial: Trial, models) -> UnfoldedPGD:
    """The solver that a trial trains. models: the folder of finished trials' solvers."""
    torch.manual_seed(trial.seed)
    if trial.start not in (None, "flow", "flow-noisy"):
        return add_folds(load_checkpoint(models / f"{trial.start}.safetensors"), trial.num_folds)
    if trial.network == "glow":
        flow = experiment.flow(trial.start == "flow-noisy")
        ensure(experiment, flow)
        first = GlowProx(load(experiment, flow).requires_grad_(True))
        proxes = [first, *(first if trial.tied else copy.deepcopy(first) for _ in range(trial.num_folds - 1))]
    else:
        config = getattr(experiment.profile, trial.network)
        proxes = [PROXES[trial.network](**config) for _ in range(trial.num_folds)]
    x0 = torch.zeros(1, 3, 64, 64) if trial.x0 == "zero" else first.glow.mode(64)
    return UnfoldedPGD(proxes, x0, step_size=trial.step_size, shrinkage=trial.shrinkage)


def groups_of(solver: UnfoldedPGD, trial: Trial, settings: Training) -> list[dict]:
    """As parameter_groups, with a rate for each width where the trial wants it."""
    networks, scalars = parameter_groups(solver, settings)
    if not trial.by_width:
        return [networks, scalars]
    groups = {}
    for p in networks["params"]:
        factor = min(1.0, 64 / p.shape[1]) if p.ndim == 4 else 1.0
        groups.setdefault(factor, {"params": [], "lr": factor * trial.lr})["params"].append(p)
    return [*groups.values(), scalars]


def fold_loss(solver: UnfoldedPGD, weight: float, num_steps: int) -> Callable:
    """The loss of x_K, and at first a share of the loss of all folds."""
    count = iter(range(10**9))

    def loss(x, y, operator):
        share = weight * max(0.0, 1 - 2 * next(count) / num_steps)
        estimate, errors = solver.x0.expand(len(y), -1, -1, -1), []
        for prox, mu, lam in zip(solver.proxes, solver.step_size, solver.shrinkage):
            estimate = prox(estimate + mu * operator.A_adjoint(y - operator.A(estimate)), lam)
            errors.append((estimate - x).square().mean())
        return errors[-1] + share * sum(errors[:-1])

    return loss


def run_of(experiment: Experiment, trial: Trial) -> Run:
    run = experiment.solver(trial.task, trial.network if trial.network != "glow" else "glow")
    return replace(run, num_folds=trial.num_folds, seed=trial.seed, blind_sigma=trial.blind_sigma)


def settings_of(trial: Trial) -> Training:
    every = math.ceil(trial.num_steps / VALIDATIONS)
    settings = Training(trial.num_steps, trial.batch_size, trial.lr, validate_every=every, mirror=True)
    changes = dict(clip_norm=trial.clip_norm, fixed_norms=trial.fixed_norms, max_restarts=0)
    changes |= dict(optimizer=trial.optimizer, scalar_lr=trial.scalar_lr)
    return replace(settings, warmup_steps=min(50, trial.num_steps // 10), **changes)


def carry_out(name: str, experiment: Experiment) -> dict:
    """Trains a trial, and writes its record."""
    trial, folder = TRIALS[name], experiment.build / "recipe"
    path = RESULTS / "benchmarks" / "recipe" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if trial.start in TRIALS:
        carry_out(trial.start, experiment)
    solver, started = build(experiment, trial, folder), provenance()
    settings = settings_of(trial)
    options = {"groups": groups_of(solver, trial, settings)}
    if trial.fold_loss:
        options["loss"] = fold_loss(solver, trial.fold_loss, trial.num_steps)
    diverged = None
    try:
        summary = fit_solver(
            experiment, run_of(experiment, trial), solver, settings, folder / name, **options
        )
    except Diverged as error:
        summary, diverged = error.summary, str(error)
    save_checkpoint(folder / f"{name}.safetensors", solver)
    record = {
        "name": name,
        "trial": asdict(trial),
        "psnr": {
            row["step"]: round(-10 * math.log10(row["val_loss"]), 3)
            for row in summary["history"]
            if row["val_loss"]
        },
        "seconds": {row["step"]: row["cpu_seconds"] for row in summary["history"]},
        "diverged": diverged,
        "step_size": solver.step_size.tolist(),
        "shrinkage": solver.shrinkage.tolist() if isinstance(solver.shrinkage, torch.Tensor) else None,
        "num_parameters": sum(p.numel() for p in solver.parameters()),
        "precision": summary["precision"],
        "restarts": summary["restarts"],
        "trained": started,
    }
    write_json(path, record)
    return record


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--build", default="build")
    args = parser.parse_args()
    experiment = Experiment("cpu", args.dataset, "v2", build=args.build)
    for name in args.names:
        record = carry_out(name, experiment)
        print(name, record.get("psnr"), record.get("seconds"), record.get("diverged"), flush=True)


if __name__ == "__main__":
    main()
