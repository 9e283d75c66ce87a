"""The command line: python -m flowlib {prepare, pretrain, train, evaluate, tabulate, publish}."""

import argparse
from pathlib import Path

from flowlib import data
from flowlib.experiments import EDITIONS, METHODS, PROFILES, TASKS, Experiment

SYNTHETIC_IMAGES = 2400  # enough for every profile that uses them


def main(argv=None):
    parser = argparse.ArgumentParser(prog="flowlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="pack a folder or zip of images (or a known data set) at 64x64")
    prepare.add_argument("source", help="synthetic, synthetic-ood, celeba, anime, or a path to a folder or zip")
    prepare.add_argument("--name", help="what to call the data set (default: from the source)")
    prepare.add_argument("--crop", choices=("celeba", "square"), default="square", help="for a path")
    prepare.add_argument("--build", default="build")

    for name, help in {
        "pretrain": "pre-train the flow by likelihood",
        "train": "train the unfolded solver for one task and prox, and evaluate it",
        "evaluate": "evaluate it again on the test images and write its record",
        "tabulate": "write the tables of all records",
        "publish": "copy the records of an experiment into results/",
    }.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("--profile", default="demo", choices=PROFILES)
        command.add_argument("--dataset", default="synthetic")
        command.add_argument("--edition", default="v2", choices=EDITIONS)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--build", default="build")
        if name == "pretrain":
            kinds = command.add_mutually_exclusive_group()
            kinds.add_argument("--noisy", action="store_true", help="noise-augmented, from the clean flow")
            kinds.add_argument("--denoiser", choices=("unet", "resnet"), help="no flow, but this network as a denoiser")
        if name in ("train", "evaluate"):
            command.add_argument("--task", required=True, choices=TASKS)
            command.add_argument("--prox", required=True, choices=METHODS)

    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    if command == "prepare":
        known = args["source"] in ("synthetic", "synthetic-ood", "celeba", "anime")
        name = args["name"] or (args["source"] if known else Path(args["source"]).stem)
        out = Path(args["build"]) / "data" / name
        if known:
            data.prepare_named(args["source"], out, num_images=SYNTHETIC_IMAGES)
        else:
            data.prepare(args["source"], out, crop=args["crop"], name=name)
        return print(f"{len(data.load(out))} images in {out}")

    # Imported late: preparing images and asking for help need no torch training code.
    from flowlib import results, tables, training

    noisy, denoiser, task, prox = (args.pop(k, None) for k in ("noisy", "denoiser", "task", "prox"))
    experiment = Experiment(**args)
    if denoiser:
        training.pretrain_denoiser(experiment, denoiser)
    elif command == "pretrain":
        training.pretrain(experiment, noisy)
        results.record_flow(experiment, noisy)
    elif command == "train":
        training.train_unfolded(experiment, task, prox)
        results.record_solver(experiment, task, prox)
    elif command == "evaluate":
        results.record_solver(experiment, task, prox)
    else:
        {"tabulate": tables.tabulate, "publish": results.publish}[command](experiment)


if __name__ == "__main__":
    main()
