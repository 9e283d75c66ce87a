"""The command line: python -m flowlib {prepare, pretrain, train, evaluate, classical, tabulate, explorer, publish, verify}."""

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
        "classical": "run the classical methods of all tasks, and write their records",
        "tabulate": "write the tables of all records",
        "explorer": "write what the explorer of λ and μ shows",
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
            command.add_argument("--task", required=name == "train", choices=TASKS)
            command.add_argument("--prox", required=name == "train", choices=METHODS)
        if name == "evaluate":
            command.add_argument("--flow", choices=("flow", "flow-noisy"), help="this pre-trained flow, no solver")
        if name == "publish":
            command.add_argument("--ship", nargs="*", default=[], help="also keep these models, in half precision")
    verify = commands.add_parser("verify", help="evaluate every shipped checkpoint and compare with its record")
    verify.add_argument("--build", default="build")

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
    from flowlib import classical, results, tables, training

    if command == "verify":
        rows = results.verify(**args)
        for row in rows:
            print("  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        return 0 if all(row.get("agrees", True) for row in rows) else 1
    options = {k: args.pop(k, None) for k in ("noisy", "denoiser", "flow", "task", "prox", "ship")}
    experiment, task, prox = Experiment(**args), options["task"], options["prox"]
    if command == "pretrain" and options["denoiser"]:
        training.pretrain_denoiser(experiment, options["denoiser"])
    elif command == "pretrain":
        training.pretrain(experiment, options["noisy"])
        results.record_flow(experiment, options["noisy"])
    elif command == "evaluate" and options["flow"]:
        results.record_flow(experiment, options["flow"] == "flow-noisy")
    elif command == "evaluate" and not (task and prox):
        parser.error("evaluate needs --task and --prox, or --flow")
    elif command in ("train", "evaluate"):
        if command == "train":
            training.train_unfolded(experiment, task, prox)
        results.record_solver(experiment, task, prox)
    elif command == "classical":
        for task in TASKS:
            if experiment.names["edition"] in TASKS[task].editions:
                classical.record_classical(experiment, task)
    elif command == "explorer":
        from flowlib import explorer_page

        explorer_page.write_explorer(experiment)
    elif command == "publish":
        results.publish(experiment, options["ship"])
    else:
        tables.tabulate(experiment)


if __name__ == "__main__":
    raise SystemExit(main())
