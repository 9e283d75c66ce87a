"""Faces cut differently than in training: the kept solvers and the likelihood of the flow on test images
whose square is larger or smaller, higher or lower, by parts of its side.

Run, in a build with prepared CelebA: python -m benchmarks.crops --build build"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from benchmarks.map import go_on
from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.records import data_of, measured, reconstruct, statistics
from companion.runs import kept_experiments, kept_model
from companion.training import device
from flowlib import psnr
from flowlib.images import dequantize, split_indices, to_tensor
from flowlib.training import generator_for

SCALES = (0.8, 0.9, 0.95, 1.05, 1.1, 1.2)  # sides of the square, by that of training
SHIFTS = (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)  # downwards, by its side
CROPS = [(1.0, 0.0), *((scale, 0.0) for scale in SCALES), *((1.0, shift) for shift in SHIFTS)]
OUT = RESULTS / "benchmarks" / "crops.json"


def position(width: int, height: int, scale: float, shift: float) -> tuple[float, float, float]:
    """(x, y, zoom), as data.decode takes it, of a square whose side is that of training times scale, moved
    down by shift of the side of training. ValueError where it leaves the image."""
    of_training = width * 148 / 178
    side = scale * of_training
    left, top = (width - side) / 2, (height - side) / 2 + shift * of_training
    if side > min(width, height) or not 0 <= top <= height - side:
        raise ValueError(f"the crop {scale}, {shift} leaves an image of {width} x {height}")
    share = [start / room if room else 0.5 for start, room in ((left, width - side), (top, height - side))]
    return *share, min(width, height) / side


def cut(source: Path, rows, scale: float, shift: float) -> np.ndarray:
    """These images of a folder or zip, counted in the order of their names: uint8 (N, 64, 64, 3)."""
    images = []
    with data.open_source(source) as (names, read):
        for name in (names[row] for row in rows):
            content = read(name)
            width, height = Image.open(io.BytesIO(content)).size
            images.append(data.decode(content, name, position(width, height, scale, shift)))
    return np.stack(images)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100, help="the first so many test images")
    parser.add_argument("--build", default="build")
    args = parser.parse_args()
    experiment = Experiment("cpu", "celeba", "v2", build=args.build)
    packed = experiment.images()
    rows = split_indices(len(packed), **experiment.split_sizes)["test"][: args.images]
    (source,) = map(Path, data.sources_of("celeba"))
    # Another order of the files, or another crop, would give other images than the tables'.
    difference = cut(source, rows[:8], 1.0, 0.0).astype(int) - packed.images[rows[:8]]
    if source.name != packed.manifest["source"] or abs(difference).max() > 2:
        raise ValueError(f"{source} is not what {experiment.build} was prepared from: prepare it again")
    flow = kept_model(experiment, experiment.flow()).to(device()).eval()
    kept = [r for r in kept_experiments() if r["kind"] == "solver" and r["experiment"] == experiment.names]
    about = {"images": args.images, "experiment": experiment.names, "data": data_of(experiment)}
    record = go_on(OUT, about)
    record.setdefault("crops", [])
    done = [(row["scale"], row["shift"]) for row in record["crops"]]
    for scale, shift in (crop for crop in CROPS if crop not in done):
        images = cut(source, rows, scale, shift)
        row = {"scale": scale, "shift": shift} | of_crop(experiment, flow, kept, images)
        record["crops"].append(row)
        write_json(OUT, record | provenance())
        means = {
            f"{task} {m}": round(v["mean"], 2) for task, of in row["psnr"].items() for m, v in of.items()
        }
        print(scale, shift, round(row["bits_per_dim"]["mean"], 3), means, flush=True)


@torch.no_grad()
def of_crop(experiment, flow, kept, images):
    x, seed = to_tensor(images), experiment.seed
    originals = dequantize(images, generator_for(seed, "test")).to(device())
    bits = torch.cat([flow.bits_per_dim(part) for part in originals.split(50)])
    found = {"bits_per_dim": statistics(bits.tolist()), "psnr": {}}
    for record in kept:
        solver = kept_model(experiment, experiment.solver(record["task"], record["method"]))
        y, operator = measured(record["task"], x, seed)
        estimate, _ = reconstruct(solver.to(device()).eval(), operator, y)
        of_task = found["psnr"].setdefault(record["task"], {})
        of_task[record["method"]] = statistics(psnr(estimate, x).tolist())
    return found


if __name__ == "__main__":
    main()
