"""The learning rates that the three proximal mappings tolerate: short inpainting trainings from the same
start, validation PSNR along the way. Every mapping gets as many rates and about as much time as the others,
so all are tuned equally little.

Run, in a build that has its flow: python -m benchmarks.learning_rates --dataset celeba --build build"""

import argparse
import json
import math
from dataclasses import replace

from companion.experiment import Experiment
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.runs import ensure
from companion.training import train
from flowlib.training import Diverged

RATES = {"glow": (5e-5, 1e-4, 2e-4), "unet": (5e-4, 1e-3, 3e-3), "resnet": (5e-4, 1e-3, 3e-3)}
STEPS = {"glow": 100, "unet": 200, "resnet": 240}
TASK = "inpainting"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--edition", default="v2")
    parser.add_argument("--only", choices=RATES, help="this mapping alone; the others' rows are kept")
    parser.add_argument("--build", default="build")
    args = parser.parse_args()
    path = RESULTS / "benchmarks" / "learning_rates.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if args.only and path.exists() else []
    rows = [row for row in kept if row["method"] != args.only]
    experiment = Experiment("cpu", args.dataset, args.edition, build=args.build)
    for method, rates in RATES.items():
        for rate in rates if args.only in (None, method) else ():
            run, steps = experiment.solver(TASK, method), STEPS[method]
            if run.start:
                ensure(experiment, run.start)
            changes = dict(num_steps=steps, lr=rate, cosine=False, validate_every=steps // 4, val_images=50)
            run = replace(run, training=replace(run.training, warmup_steps=20, max_restarts=0, **changes))
            try:
                _, summary = train(experiment, run)
            except Diverged as error:
                rows.append({"method": method, "lr": rate, "diverged": str(error)})
                continue
            psnr = {row["step"]: -10 * math.log10(row["val_loss"]) for row in summary["history"]}
            rows.append({"method": method, "lr": rate, "psnr": psnr, "seconds": summary["cpu_seconds"]})
            print(rows[-1])
    record = {"task": TASK, "dataset": args.dataset, "edition": args.edition, "rows": rows, **provenance()}
    write_json(path, record)


if __name__ == "__main__":
    main()
