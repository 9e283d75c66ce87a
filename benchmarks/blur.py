"""Which blur fits the paper's six numbers? For each kernel size and boundary: the PSNR of classical
inverses, their loss from σ_b 5 to 8, and the PSNR of each proximal mapping after a short training at 5,
tested at both.

Run, in a build that has its flow: python -m benchmarks.blur --dataset celeba --build build"""

import argparse
from dataclasses import replace

import torch

from companion.classical import conjugate_gradients, tikhonov
from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.results import paper_table
from companion.runs import ensure
from companion.settings import METHODS
from companion.training import device, train
from flowlib import Blur, psnr
from flowlib.images import to_tensor

KERNELS = (3, 5, 7, 9, 15, 31)
TRAINED = ("resnet", "unet", "glow")


@torch.no_grad()
def classical(operator, x):
    """Mean PSNR of the blurred image, and of conjugate gradients after few and many steps, in float64."""
    x = x.double()
    y = operator.double().A(x)
    steps = {str(n): psnr(conjugate_gradients(y, operator, n), x).mean().item() for n in (5, 20, 100)}
    return {"blurred": psnr(y, x).mean().item(), "conjugate_gradients": steps}


@torch.no_grad()
def transferred(kernel_size, boundary, x):
    """The loss at σ_b 8 of an inverse made for 5: for each method of the paper the regularisation with which
    Tikhonov's inverse is exactly as good at 5, and the PSNR at 8 of that very inverse, and of one that knows
    the new blur. It does not depend on any training."""
    x, blurs = x.double(), {s: Blur(s, kernel_size, boundary).double() for s in (5.0, 8.0)}
    paper, at_5 = (
        {
            METHODS[method].label: value
            for (task, method), value in paper_table(name, "v2").items()
            if task == "deblurring"
        }
        for name in ("III", "I")
    )

    def found(s, alpha):
        return psnr(tikhonov(blurs[s].A(x), blurs[5.0], alpha), x).mean().item()

    rows = {}
    for label in paper:
        low, high = -20.0, 0.0  # decimal logarithms of alpha
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if found(5.0, 10**middle) > at_5[label] else (low, middle)
        rows[label] = {s: found(float(s), 10**low) for s in ("5.0", "8.0")}
        rows[label]["told"] = psnr(tikhonov(blurs[8.0].A(x), blurs[8.0], 10**low), x).mean().item()
        rows[label] |= {"paper": {"5.0": at_5[label], "8.0": paper[label]}, "alpha": 10**low}
    return rows


@torch.no_grad()
def tested(solver, kernel_size, boundary, x):
    """Mean PSNR of a trained solver at σ_b 5 and 8."""
    result = {}
    for sigma_b in (5.0, 8.0):
        operator = Blur(sigma_b, kernel_size, boundary).to(device())
        x_hat = torch.cat([solver(operator.A(batch), operator) for batch in x.to(device()).split(50)])
        result[str(sigma_b)] = psnr(x_hat.cpu(), x).mean().item()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--edition", default="v1")
    parser.add_argument("--profile", default="short")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--train", nargs="*", type=int, default=(3, 5, 9), help="kernel sizes that are trained"
    )
    parser.add_argument("--build", default="build")
    args = parser.parse_args()
    experiment, rows = Experiment(args.profile, args.dataset, args.edition, build=args.build), []
    x = to_tensor(experiment.split("test"))
    for boundary in Blur.BOUNDARIES:
        for kernel_size in KERNELS:
            row = {"kernel_size": kernel_size, "boundary": boundary}
            row["classical"] = {str(s): classical(Blur(s, kernel_size, boundary), x[:50]) for s in (5.0, 8.0)}
            row["transferred"] = transferred(kernel_size, boundary, x[:50])
            rows.append(row)
            if boundary != "circular" or kernel_size not in args.train:
                continue
            row["trained"] = {}
            for method in TRAINED:
                run = experiment.solver("deblurring", method)
                if run.start:
                    ensure(experiment, run.start)
                settings = replace(run.training, num_steps=args.steps, validate_every=args.steps)
                run = replace(run, training=settings, operator=dict(sigma_b=5.0, kernel_size=kernel_size))
                solver, summary = train(experiment, run)
                found = tested(solver, kernel_size, boundary, x)
                row["trained"][method] = found | {"images_seen": summary["images_seen"]}
            print(row)
    about = {"arguments": {"dataset": args.dataset, "steps": args.steps}, "split": experiment.split_sizes}
    write_json(RESULTS / "benchmarks" / "blur.json", {"rows": rows} | about | provenance())


if __name__ == "__main__":
    main()
