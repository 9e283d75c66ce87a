"""Which learning rates the three proximal mappings bear: short inpainting trainings from the same start, validation PSNR along
the way. Every mapping gets as many rates and about as much time as the others, so all are tuned equally little.

Run: python benchmarks/learning_rates.py --dataset celeba --flow build/runs/cpu-celeba-s0/flow"""

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

from flowlib import data
from flowlib.experiments import Experiment
from companion.files import write_json
from companion.provenance import provenance
from companion.paths import RESULTS
from flowlib.training import Diverged, train_unfolded

RATES = {"glow": (5e-5, 1e-4, 2e-4), "unet": (5e-4, 1e-3, 3e-3), "resnet": (5e-4, 1e-3, 3e-3)}
STEPS = {"glow": 100, "unet": 200, "resnet": 240}
TASK = "inpainting"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--edition", default="v2")
    parser.add_argument("--only", choices=RATES, help="this mapping alone; the others' rows are kept")
    parser.add_argument("--flow", required=True, help="folder of a pre-trained flow of the profile cpu")
    parser.add_argument("--build", default="build/learning-rates")
    args = parser.parse_args()
    images = Path(args.build) / "data" / args.dataset
    if not (images / "manifest.json").exists():
        data.prepare_named(args.dataset, images)
    path = RESULTS / "benchmarks" / "learning_rates.json"
    kept = json.loads(path.read_text())["rows"] if args.only and path.exists() else []
    rows = [row for row in kept if row["prox"] != args.only]
    for prox, rates in RATES.items():
        if args.only not in (None, prox):
            continue
        for rate in rates:
            experiment = Experiment("cpu", args.dataset, args.edition, build=Path(args.build) / f"{prox}-{rate:g}")
            shutil.copytree(images, experiment.build / "data" / args.dataset, dirs_exist_ok=True)
            shutil.copytree(args.flow, experiment.flow_directory(), dirs_exist_ok=True)
            steps = STEPS[prox]
            changes = dict(
                num_steps=steps, lr=rate, cosine=False, validate_every=steps // 4, val_images=50, warmup_steps=20, max_restarts=0
            )
            chosen = dataclasses.replace(experiment.profile.unfolding[prox], **changes)
            experiment.profile = dataclasses.replace(experiment.profile, unfolding={prox: chosen})
            try:
                train_unfolded(experiment, TASK, prox)
            except Diverged as error:
                rows.append({"prox": prox, "lr": rate, "diverged": str(error)})
                continue
            log = (experiment.directory(TASK, prox) / "log.csv").read_text().splitlines()
            columns = log[0].split(",")
            history = [dict(zip(columns, map(float, line.split(",")))) for line in log[1:]]
            psnr = {int(row["step"]): -10 * math.log10(row["val_loss"]) for row in history}
            rows.append({"prox": prox, "lr": rate, "psnr": psnr, "seconds": history[-1]["seconds"]})
            print(rows[-1])
    record = {"task": TASK, "dataset": args.dataset, "edition": args.edition, "rows": rows, **provenance()}
    write_json(path, record)


if __name__ == "__main__":
    main()
