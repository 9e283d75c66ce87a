"""Which blur fits the paper's six numbers? For each kernel size and boundary: what classical inverses recover, what they lose
from σ_b 5 to 8, and what each proximal mapping reaches after a short training at 5, tested at both.

Run: python benchmarks/blur.py --dataset celeba --flow build/runs/cpu-celeba-s0/flow
Trainings lie under build/blur; what is there is not trained again."""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch

from flowlib import data, experiments, psnr
from flowlib.checkpoints import load_checkpoint, load_tensors
from companion.classical import conjugate_gradients, tikhonov
from flowlib.data import to_tensor
from flowlib.experiments import TASKS, Experiment
from companion.files import write_json
from flowlib.operators import Blur
from companion.provenance import provenance
from companion.paths import RESULTS
from flowlib.tables import paper_table
from flowlib.training import device, train_unfolded

KERNELS = (3, 5, 7, 9, 15, 31)
PROXES = ("resnet", "unet", "glow")


@torch.no_grad()
def classical(operator, x):
    """Mean PSNR of the blurred image, and of conjugate gradients after few and many steps, in float64."""
    x = x.double()
    y = operator.double().A(x)
    steps = {str(n): psnr(conjugate_gradients(y, operator, n), x).mean().item() for n in (5, 20, 100)}
    return {"blurred": psnr(y, x).mean().item(), "conjugate_gradients": steps}


@torch.no_grad()
def transferred(kernel_size, boundary, x):
    """What an inverse made for σ_b 5 loses at 8: for each method of the paper the regularisation with which Tikhonov's inverse
    is exactly as good at 5, and the PSNR of that very inverse at 8. It needs no training, so nothing of it hangs on ours."""
    x, blurs = x.double(), {s: Blur(s, kernel_size, boundary).double() for s in (5.0, 8.0)}
    paper = {label: value for (task, _, label), value in paper_table("III", "v2").items() if task == "deblurring"}
    at_5 = {label: value for (task, _, label), value in paper_table("I", "v2").items() if task == "deblurring"}

    def found(s, alpha):
        return psnr(tikhonov(blurs[s].A(x), blurs[5.0], alpha), x).mean().item()

    rows = {}
    for label in paper:
        low, high = -20.0, 0.0  # decimal logarithms of alpha
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if found(5.0, 10**middle) > at_5[label] else (low, middle)
        rows[label] = {s: found(float(s), 10**low) for s in ("5.0", "8.0")}
        rows[label] |= {"paper": {"5.0": at_5[label], "8.0": paper[label]}, "alpha": 10**low}
    return rows


@torch.no_grad()
def tested(path, kernel_size, boundary, x):
    """Mean PSNR of a trained solver at σ_b 5 and 8."""
    solver, result = load_checkpoint(path).to(device()), {}
    for sigma_b in (5.0, 8.0):
        operator = Blur(sigma_b, kernel_size, boundary).to(device())
        x_hat = torch.cat([solver(operator.A(batch), operator) for batch in x.to(device()).split(50)])
        result[str(sigma_b)] = psnr(x_hat.cpu(), x).mean().item()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--edition", default="v1")
    parser.add_argument("--flow", required=True, help="folder of a pre-trained flow of the profile cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train", nargs="*", type=int, default=(3, 5, 9), help="kernel sizes that are trained")
    parser.add_argument("--build", default="build/blur")
    args = parser.parse_args()
    rows = []
    for boundary in Blur.BOUNDARIES:
        for kernel_size in KERNELS:
            experiment = Experiment(
                "cpu", args.dataset, args.edition, build=Path(args.build) / f"{boundary}-{kernel_size}"
            )
            out = Path(args.build) / "data" / args.dataset
            if not (out / "manifest.json").exists():
                data.prepare_named(args.dataset, out)
            x = to_tensor(
                data.load(out).images[data.split_indices(len(data.load(out)), **experiment.split_sizes)["test"]]
            )
            row = {"kernel_size": kernel_size, "boundary": boundary}
            row["classical"] = {str(s): classical(Blur(s, kernel_size, boundary), x[:50]) for s in (5.0, 8.0)}
            row["transferred"] = transferred(kernel_size, boundary, x[:50])
            rows.append(row)
            if boundary != "circular" or kernel_size not in args.train:
                continue
            # The task with this kernel, in a build of its own that shares images and flow.
            changed = dataclasses.replace(TASKS["deblurring"], parameters=dict(sigma_b=5.0, kernel_size=kernel_size))
            experiments.TASKS["deblurring"] = changed
            shutil.copytree(out, experiment.build / "data" / args.dataset, dirs_exist_ok=True)
            shutil.copytree(args.flow, experiment.flow_directory(), dirs_exist_ok=True)
            profile = experiment.profile
            short = {
                k: dataclasses.replace(v, num_steps=args.steps, validate_every=args.steps)
                for k, v in profile.unfolding.items()
            }
            experiment.profile = dataclasses.replace(profile, unfolding=short)
            row["trained"] = {}
            for prox in PROXES:
                path = experiment.directory("deblurring", prox) / "model.safetensors"
                if not path.exists():
                    train_unfolded(experiment, "deblurring", prox)
                summary = load_tensors(path)[1]["info"]["summary"]
                row["trained"][prox] = tested(path, kernel_size, boundary, x) | {"images_seen": summary["images_seen"]}
            print(row)
    record = {
        "rows": rows,
        "arguments": {"dataset": args.dataset, "steps": args.steps},
        "split": experiment.split_sizes,
        **provenance(),
    }
    write_json(RESULTS / "benchmarks" / "blur.json", record)


if __name__ == "__main__":
    main()
