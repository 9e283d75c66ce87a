"""Whether BatchNorm's two modes hold back a rival's training: goes on from a finished run's best weights with
BatchNorm normalising by its averages, as in evaluation.

python -m benchmarks.fixed_norms --run deblurring-unet --profile cpu --dataset celeba"""

import argparse
import math
import time

import torch
from torch import nn
from tqdm import trange

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.records import mean_and_interval, measured, reconstruct
from companion.runs import load
from companion.settings import TASKS
from flowlib import psnr
from flowlib.images import to_tensor
from flowlib.training import generator_for


def evaluate(solver, task, x):
    y, operator = measured(task, x, 0)
    return psnr(reconstruct(solver.eval(), operator, y)[0], x)


def go_on(solver, task, images, val, steps, lr, batch_size, every):
    """Trains by Adam, half a cosine to zero; [(step, loss, PSNR on val)], and leaves the best weights."""
    operator, generator = TASKS[task].make_operator(images.shape[-1]), generator_for(0, "fixed norms")
    optimizer = torch.optim.Adam(solver.parameters(), lr)
    norms = [module for module in solver.modules() if isinstance(module, nn.BatchNorm2d)]
    history, best, total = [], (-math.inf, None), 0.0
    for step in trange(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        solver.train()
        for norm in norms:
            norm.eval()
        x = images[torch.randint(len(images), (batch_size,), generator=generator)]
        loss = (solver(operator.measure(x, generator), operator) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
        optimizer.step()
        total += loss.item() / every
        if step % every == 0:
            quality = evaluate(solver, task, val).mean().item()
            history.append({"step": step, "loss": total, "val_psnr": quality})
            total = 0.0
            if quality > best[0]:
                best = quality, {name: value.clone() for name, value in solver.state_dict().items()}
    solver.load_state_dict(best[1])
    return history


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="deblurring-unet")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--edition", default="v2")
    parser.add_argument("--build", default="build")
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()
    experiment = Experiment(args.profile, args.dataset, args.edition, build=args.build)
    run = experiment.runs()[args.run]
    solver = load(experiment, run).requires_grad_(True)
    train, val, test = (to_tensor(experiment.split(part)) for part in ("train", "val", "test"))
    start = time.process_time()
    before = evaluate(solver, run.task, val[:128]).mean().item()
    history = go_on(solver, run.task, train, val[:128], args.steps, 1e-4, 8, min(150, args.steps))
    mean, half_width = mean_and_interval(evaluate(solver, run.task, test).numpy())
    record = {
        "steps": args.steps,
        "before": {"evaluation": before},
        "history": history,
        "test_psnr": {"mean": mean, "half_width": half_width, "images": len(test)},
        "cpu_seconds": time.process_time() - start,
        **provenance(),
    }
    write_json(RESULTS / "benchmarks" / f"{args.run}-fixed-norms.json", record)


if __name__ == "__main__":
    main()
