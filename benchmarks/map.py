"""The estimate (7) of the kept flow of the profile cpu, without training, on the tables' test images.

Rate, weight and number of steps are chosen on validation images, then starts are compared on the same ones,
then the test images come, with the noise of the tables, and images out of distribution, a few at a time. A
stopped run resumes, also with a larger --images or --ood. The kept solvers are timed beside
it.

Run, one core each, in a build with prepared images (0.08 s an image and step: 7 to 17 s an image):
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.map denoising --images 500 --ood 100 --build build
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.map inpainting --images 100 --ood 40 --build build
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.map deblurring --images 100 --ood 40 --build build"""

import argparse
import json
import math
import time

import torch

from companion.classical import CLASSICAL
from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.records import data_of, measured, reconstruct, statistics
from companion.runs import kept_model, kept_place
from companion.settings import TASKS
from companion.training import device
from flowlib import map_estimate, psnr, ssim
from flowlib.images import dequantize, to_tensor
from flowlib.training import generator_for

# weights and rates: those tried, the first rate with every weight, the others with the best; num_steps: tried
# with the best of both, all with the first. start: a classical answer and its parameter, as the book has it.
GRIDS = {
    "denoising": dict(weights=(0.01, 0.02, 0.04), rates=(0.12, 0.24), num_steps=(90, 180)),
    "inpainting": dict(weights=(0.001, 0.003, 0.01), rates=(0.15, 0.3), num_steps=(200, 100)),
    "deblurring": dict(weights=(0.0003, 0.001, 0.003), rates=(0.15, 0.3), num_steps=(200, 100)),
}
CLASSICAL_START = {"denoising": ("nl-means", 0.9), "inpainting": ("biharmonic", None)}
CLASSICAL_START["deblurring"] = ("cg", 30)
CHUNK = 4  # images


def estimate(flow, operator, y, setting, start=None):
    """(x_hat, objective of x_hat) in chunks, and seconds of the processor for an image."""
    begun, parts = time.process_time(), []
    for i in range(0, len(y), CHUNK):
        first = None if start is None else start[i : i + CHUNK]
        x_hat, objective = map_estimate(flow, operator, y[i : i + CHUNK], start=first, **setting)
        parts.append((x_hat.cpu(), objective[-1].cpu()))
    x_hat, objective = map(torch.cat, zip(*parts))
    return x_hat, objective, (time.process_time() - begun) / len(y)


def validate(flow, operator, y, x, grid, record, save):
    """Fills record["validation"], one row a setting, and gives the best setting."""
    rows = record.setdefault("validation", [])

    def best():
        return max(rows, key=lambda row: row["psnr"])

    def settings():
        yield from ((w, grid["rates"][0], grid["num_steps"][0]) for w in grid["weights"])
        yield from ((best()["weight"], rate, grid["num_steps"][0]) for rate in grid["rates"][1:])
        yield from ((best()["weight"], best()["lr"], steps) for steps in grid["num_steps"][1:])

    for weight, lr, num_steps in settings():
        setting = dict(weight=weight, lr=lr, num_steps=num_steps)
        if any(setting.items() <= row.items() for row in rows):
            continue
        x_hat, objective, seconds = estimate(flow, operator, y, setting)
        rows.append(setting | found(psnr(x_hat, x).mean(), objective.mean(), seconds))
        print(rows[-1], flush=True)
        save()
    return {name: best()[name] for name in ("weight", "lr", "num_steps")}


def found(quality, objective, seconds):
    return {"psnr": round(float(quality), 3), "objective": round(float(objective), 2), "seconds": seconds}


def compare_starts(task, flow, operator, y, x, setting, record, save):
    """Fills record["starts"]: from z = 0, f(Aᵀy) and f of a classical answer."""
    name, value = CLASSICAL_START[task]
    answer = CLASSICAL[task][name](y.cpu(), operator, value).to(y)
    starts = {"z = 0": None, "f(Aᵀy)": operator.A_adjoint(y), f"f({name})": answer}
    for label, start in starts.items():
        if label not in record.setdefault("starts", {}):
            x_hat, objective, seconds = estimate(flow, operator, y, setting, start)
            row = found(psnr(x_hat, x).mean(), objective.mean(), seconds)
            if start is not None:
                row["psnr_of_start"] = round(float(psnr(start, x).mean()), 3)
            record["starts"][label] = row
            print(label, record["starts"][label], flush=True)
            save()


@torch.no_grad()
def test(task, flow, images, seed, setting, part, save, num_images):
    """Adds uint8 images to part until it has num_images: for each the quality and the objective, and for
    answer and original the squared norm of the code and the bits per dimension."""
    x, originals = to_tensor(images), dequantize(images, generator_for(seed, "test")).to(device())
    y, operator = measured(task, x, seed)  # of all images, so that each has the noise of the tables
    runs = part.setdefault("runs", [])
    runs.append({"images": 0, "seconds": 0.0, **provenance()})
    for i in range(len(part.get("psnr", {}).get("values", ())), min(num_images, len(x)), CHUNK):
        now = slice(i, min(i + CHUNK, num_images))
        x_hat, objective, seconds = estimate(flow, operator, y[now], setting)
        new = dict(psnr=psnr(x_hat, x[now]), ssim=ssim(x_hat, x[now]), objective=objective)
        new["psnr_measurement"] = psnr(y[now].cpu(), x[now])
        for suffix, image in (("", x_hat.to(y)), ("_original", originals[now])):
            new[f"norm_squared{suffix}"] = sum(z.square().flatten(1).sum(1) for z in flow(image)[0])
            new[f"bits_per_dim{suffix}"] = flow.bits_per_dim(image)
        for name, values in new.items():
            known = part.get(name, {}).get("values", [])
            part[name] = statistics([math.nan if v is None else v for v in known] + values.tolist())
        runs[-1]["images"] += len(x_hat)
        runs[-1]["seconds"] += seconds * len(x_hat)
        save()
        print(len(part["psnr"]["values"]), part["psnr"]["mean"], f"{seconds:.1f} s an image", flush=True)
    part["runs"] = [run for run in runs if run["images"]]
    save()


def time_solvers(task, experiment, operator, y):
    """Seconds of the processor for an image by the kept solvers, on this machine."""
    rows = {}
    for method in ("glow", "resnet", "unet"):
        run = experiment.solver(task, method)
        if kept_place(experiment, run)[1].exists():
            solver = kept_model(experiment, run).to(device()).eval()
            reconstruct(solver, operator, y)  # the first call is slower
            begun = time.process_time()
            reconstruct(solver, operator, y)
            rows[method] = (time.process_time() - begun) / len(y)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=GRIDS)
    parser.add_argument("--images", type=int, default=100, help="the first so many test images")
    parser.add_argument("--ood", type=int, default=0, help="the first so many images out of distribution")
    parser.add_argument("--validation", type=int, default=8, help="images that settings are chosen on")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--build", default="build")
    parser.add_argument("--out", help="another place of the record, such as for a trial")
    args = parser.parse_args()
    experiment = Experiment("cpu", args.dataset, "v2", build=args.build)
    flow, seed = kept_model(experiment, experiment.flow()).to(device()).eval(), experiment.seed
    path = args.out or RESULTS / "benchmarks/map" / f"{args.task}.json"
    about = {"task": args.task, "experiment": experiment.names, "data": data_of(experiment)}
    about |= {"flow": experiment.flow().settings_hash, "chunk": CHUNK}
    about |= {"grid": GRIDS[args.task], "num_validation": args.validation}
    record = go_on(path, json.loads(json.dumps(about)))

    def save():
        write_json(path, record | provenance())

    x_val = to_tensor(experiment.split("val")[: args.validation])
    operator = TASKS[args.task].make_operator(x_val.shape[-1]).to(device())
    y_val = operator.measure(x_val, generator_for(seed, "val")).to(device())
    setting = validate(flow, operator, y_val, x_val, GRIDS[args.task], record, save)
    record["chosen"] = setting
    compare_starts(args.task, flow, operator, y_val, x_val, setting, record, save)
    record["solver_seconds"] = time_solvers(args.task, experiment, operator, y_val)
    save()
    ood = experiment.ood_images()
    parts = {"test": (experiment.split("test"), args.images)}
    if args.ood and ood is not None:
        parts["ood_images"] = (ood.images[:100], args.ood)
    for name, (images, num_images) in parts.items():
        test(args.task, flow, images, seed, setting, record.setdefault(name, {}), save, num_images)


def go_on(path, about):
    """The record at path, if there is one; ValueError where it is about something else."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        return about
    differs = [name for name, value in about.items() if record.get(name) != value]
    if differs:
        raise ValueError(f"{path} is about another {', '.join(differs)}: delete it, or give --out")
    return record


if __name__ == "__main__":
    main()
