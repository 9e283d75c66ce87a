"""The command line: python -m companion {book, prepare, list, run, classical, tabulate, explorer, publish,
verify}."""

import argparse
import errno
import sys

import data
from companion.parameters import PROFILES, SYNTHETIC_IMAGES, TASKS
from companion.paths import build_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def main(argv=None):
    args = vars(_parser().parse_args(argv))
    return COMMANDS[args.pop("command")](**args) or 0


def _parser():
    parser = argparse.ArgumentParser(prog="companion", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser(
        "prepare", help="pack a folder or zip of images (or a known data set) at 64x64"
    )
    prepare.add_argument(
        "source", help="synthetic, synthetic-ood, celeba, anime, or a path to a folder or zip"
    )
    prepare.add_argument("--name", help="what to call the data set (default: from the source)")
    prepare.add_argument("--crop", choices=("celeba", "square"), default="square", help="for a path")
    prepare.add_argument("--build", default="build")
    for name, help in {
        "book": "build the book: train what is missing, execute the notebooks, render",
        "list": "name the runs of an experiment",
        "run": "make one run and what it starts from: train what is missing, evaluate it, write its record",
        "classical": "run the classical methods of all tasks, and write their records",
        "tabulate": "write the tables of all records",
        "explorer": "write what the explorer of λ and μ shows",
        "publish": "copy the records of an experiment's finished runs, and their pictures, into results/",
    }.items():
        command = commands.add_parser(name, help=help)
        command.add_argument("--profile", default="demo", choices=PROFILES)
        command.add_argument("--dataset", default="synthetic")
        command.add_argument("--edition", default="v2", choices=sorted(TASKS))
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--build", default="build")
        if name == "run":
            command.add_argument(
                "--run", required=True, help="flow, flow-noisy, or task and method: inpainting-glow"
            )
        if name == "publish":
            command.add_argument("--ship", nargs="*", default=[], help="also keep these models, small")
    verify = commands.add_parser(
        "verify", help="evaluate every model that is kept with the code, compare with its record"
    )
    verify.add_argument("--build", default="build")
    return parser


def _prepare(source, name, crop, build):
    out = data.prepare_into(
        source, build_folder(build) / "data", name=name, crop=crop, num_images=SYNTHETIC_IMAGES
    )
    print(f"{len(data.load(out))} images in {out}")


def _verify(build):
    from companion import records

    rows = []
    for row in records.verify(build):
        print(
            "  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()),
            flush=True,
        )
        rows.append(row)
    if not rows:
        print("no model is kept here: verify runs in a checkout of the project", file=sys.stderr)
        return 2
    return 0 if all(row.get("agrees", True) for row in rows) else 1


# Imported late, below: preparing images and asking for help need no torch.


def _experiment(profile, dataset, edition, seed, build):
    from companion.experiment import Experiment

    return Experiment(profile, dataset, edition, seed, build)


def _list(**choice):
    from companion.runs import is_finished

    experiment = _experiment(**choice)
    for name, run in experiment.runs().items():
        print(f"{'finished' if is_finished(experiment, run) else 'to do   '}  {name}")


def _run(run, **choice):
    from companion.parameters import choose
    from companion.runs import ensure
    from companion.training import join_ranks

    join_ranks()
    experiment = _experiment(**choice)
    record = ensure(experiment, choose(experiment.runs(), run, "run"))
    if record["kind"] == "failed":
        print(f"{run} diverged: {record['reason']}", file=sys.stderr)
        return 1


def _classical(**choice):
    from companion.classical import record_classical

    experiment = _experiment(**choice)
    for task in experiment.tasks():
        print(
            task,
            ", ".join(
                f"{r['method']} {r['psnr']['mean']:.2f} dB" for r in record_classical(experiment, task)
            ),
        )


def _tabulate(**choice):
    from companion.front import write_front
    from companion.tables import tabulate

    experiment = _experiment(**choice)
    tabulate(experiment)
    write_front(experiment.build / "tables")


def _explorer(**choice):
    from companion.explorer.page import write_explorer

    write_explorer(_experiment(**choice))


def _publish(ship, **choice):
    from companion.gallery import publish_picture
    from companion.parameters import choose
    from companion.runs import is_finished, publish_all, publish_classical

    experiment = _experiment(**choice)
    known = experiment.runs()
    shipped = [choose(known, name, "run") for name in ship]
    found = [run for run in known.values() if run in shipped or is_finished(experiment, run)]
    for run, path in zip(found, publish_all(experiment, found, shipped)):
        print(path)
        publish_picture(experiment, run)
    publish_classical(experiment)


def _book(build, **choice):
    from companion.book import build_book

    return build_book(build, **choice)


COMMANDS = {
    "book": _book,
    "prepare": _prepare,
    "list": _list,
    "run": _run,
    "classical": _classical,
    "tabulate": _tabulate,
    "explorer": _explorer,
    "publish": _publish,
    "verify": _verify,
}


def _told():
    """main, with one sentence for each error that the user can correct."""
    try:
        return main()
    except (ValueError, FileNotFoundError) as error:
        return f"error: {error}"
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        where = f" {error.filename}" if error.filename else ""
        remedy = "free some space" if error.errno in FULL else "make it writable"
        return f"error: cannot write{where} ({error.strerror}): {remedy}, or give a folder elsewhere (BUILD)"


if __name__ == "__main__":
    raise SystemExit(_told())
