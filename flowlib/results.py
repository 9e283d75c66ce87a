"""Result records: one JSON file a run, written by an evaluation and kept with the code. No number reaches the book otherwise."""

import json
import math
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowlib.checkpoints import load_checkpoint, load_tensors, save_checkpoint
from flowlib.data import dequantize, prepare_named, to_tensor
from flowlib.experiments import TASKS, Experiment
from flowlib.files import write_json
from flowlib.metrics import mean_and_interval, psnr, ssim
from flowlib.provenance import provenance
from flowlib.training import batches, device, generator_for

RESULTS = Path(__file__).parents[1] / "results"  # recorded runs and the paper's own numbers, kept in the repository


def statistics(values, digits=4):
    """JSON-able mean, half width of its 95 % interval, and the values of all images."""
    mean, half_width = mean_and_interval(values)
    return dict(mean=mean, half_width=half_width, values=[round(float(v), digits) for v in values])


def data_of(experiment):
    """What a record says of the images that it is about."""
    manifest = experiment.images().manifest
    return {k: manifest[k] for k in ("name", "source", "crop", "pixels_sha256")} | {"split": experiment.split_sizes}


def _record(experiment, directory, name, **content):
    info = load_tensors(directory / "model.safetensors")[1]["info"]
    record = dict(
        name=name,
        experiment=experiment.names,
        **content,
        training=info["summary"],
        trained=info["provenance"],
        evaluated=provenance(),
        data=data_of(experiment),
    )
    write_json(directory / "record.json", record)
    (directory / "resume.safetensors").unlink(missing_ok=True)  # not before: whoever is killed need not train again


@torch.no_grad()
def _bits_per_dim(glow, images, seed):
    x = dequantize(images, generator_for(seed, "test")).to(device())
    return torch.cat([glow.bits_per_dim(batch) for batch in batches(x, 50)])


@torch.no_grad()
def record_flow(experiment, noisy=False):
    """Writes the record of a pre-trained flow: bits per dimension of the test images, its round trip, and what shrinking
    the latents by 1 + λ does to images, clean and not: their root-mean-square change."""
    directory = experiment.flow_directory(noisy)
    glow = load_checkpoint(directory / "model.safetensors").to(device())
    images = experiment.split("test")
    bits = _bits_per_dim(glow, images, experiment.seed)
    some = dequantize(images[:50], generator_for(experiment.seed, "test")).to(device())
    noise = torch.randn(some.shape, generator=generator_for(experiment.seed, "round trip")).to(some)
    inputs = {"natural": some, "noise 0.2": some + 0.2 * noise, "constant": torch.zeros_like(some)}
    round_trip, response = {}, {}
    for name, image in inputs.items():
        latents, _ = glow(image)
        round_trip[name] = (glow.inverse(latents)[0] - image).abs().max().item()
        response[name] = {
            str(lam): (glow.inverse([z / (1 + lam) for z in latents])[0] - image).square().mean().sqrt().item()
            for lam in (0.001, 0.01, 0.1)
        }
    _record(
        experiment,
        directory,
        directory.name,
        kind="flow",
        num_parameters=sum(p.numel() for p in glow.parameters()),
        bits_per_dim=statistics(bits.tolist()),
        round_trip=round_trip,
        shrinkage_response=response,
    )


def _reconstruct(solver, operator, y):
    """(x_hat, seconds) of measurements y, in batches."""
    x_hat, seconds = [], 0.0
    for batch in batches(y.to(device()), 50):
        start = time.monotonic()
        x_hat.append(solver(batch, operator).cpu())
        seconds += time.monotonic() - start
    return torch.cat(x_hat), seconds


@torch.enable_grad()  # without it the CPU's convolutions are fused ones, which PyTorch does not count
def _gflop(solver, operator, y):
    """Floating-point operations of one reconstruction, in units of 10^9; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        solver(y[:1].to(device()), operator)
    return counter.get_total_flops() / 1e9


def _quality(x_hat, x):
    return dict(psnr=statistics(psnr(x_hat, x).tolist()), ssim=statistics(ssim(x_hat, x).tolist()))


def _describe_folds(solver, operator, y, x):
    """For every fold: μ, λ, and means over the images of what it did."""
    folds = [solver(batch, operator, return_folds=True)[1] for batch in batches(y.to(device()), 50)]

    def over_images(k, key):
        return torch.cat([getattr(batch[k], key) for batch in folds]).cpu()

    rows = []
    for k, prox in enumerate(solver.proxes):
        row = dict(step_size=float(solver.step_size[k]))
        row |= {
            name: psnr(over_images(k, key), x).mean().item() for name, key in (("psnr_tilde", "x_tilde"), ("psnr", "x"))
        }
        if prox.uses_shrinkage:
            row["shrinkage"] = float(solver.shrinkage[k])
            for suffix in ("_tilde", ""):
                row[f"latent_norm{suffix}"] = over_images(k, f"latent_norm{suffix}").mean().item()
                nats = over_images(k, f"log_prob{suffix}").mean().item() / x[0].numel()
                row[f"bits_per_dim{suffix}"] = 8 - nats / math.log(2)
        rows.append(row)
    return rows


@torch.no_grad()
def record_solver(experiment, task, prox):
    """Writes the record of a trained solver: PSNR and SSIM of each test image, what the folds did, and, without training
    again, the same for measurements and, where they are prepared, for images out of distribution."""
    directory = experiment.directory(task, prox)
    solver = load_checkpoint(directory / "model.safetensors").to(device())
    x = to_tensor(experiment.split("test"))
    operator = TASKS[task].make_operator(x.shape[-1]).to(device())

    def measured(operator, x):
        return operator.measure(x.to(device()), generator_for(experiment.seed, "test"))

    y = measured(operator, x)
    x_hat, seconds = _reconstruct(solver, operator, y)
    evaluations = _quality(x_hat, x) | {"psnr_measurement": statistics(psnr(y.cpu(), x).tolist())}
    if TASKS[task].shifted:
        shifted = TASKS[task].make_operator(x.shape[-1], shifted=True).to(device())
        y_shifted = measured(shifted, x)
        setting = {"setting": TASKS[task].shifted_setting}
        evaluations["shifted"] = setting | _quality(_reconstruct(solver, shifted, y_shifted)[0], x)
        operators = last_fold_only(operator, shifted, solver.num_folds)
        evaluations["shifted_last_fold"] = setting | _quality(_reconstruct(solver, operators, y_shifted)[0], x)
    foreign = experiment.foreign_images()
    if foreign is not None:
        x_foreign = to_tensor(foreign.images[:100])
        estimate = _reconstruct(solver, operator, measured(operator, x_foreign))[0]
        about = {"dataset": foreign.name, "setting": TASKS[task].setting}
        evaluations["foreign"] = about | _quality(estimate, x_foreign)

    _record(
        experiment,
        directory,
        directory.name,
        kind="solver",
        task=TASKS[task].name,
        setting=TASKS[task].setting,
        prox=prox,
        num_parameters=sum(p.numel() for p in solver.proxes[0].parameters()),
        num_folds=solver.num_folds,
        **evaluations,
        folds=_describe_folds(solver, operator, y, x),
        milliseconds_per_image=1000 * seconds / len(x),
        gflop_per_image=_gflop(solver, operator, y),
    )


def last_fold_only(operator, shifted, num_folds):
    """Operators for each fold such that only the last one knows of the new setting, as the paper words it for inpainting."""
    return [operator] * (num_folds - 1) + [shifted]


@torch.no_grad()
def reconstruct(experiment, task, proxes, x, num, shifted=False):
    """(y, {prox: x_hat}) of the first num images of x, measured as evaluations measure them, by those of these proxes that
    are trained in this build."""
    operator = TASKS[task].make_operator(x.shape[-1], shifted)
    y = operator.measure(x, generator_for(experiment.seed, "test"))[:num]
    estimates = {}
    for prox in proxes:
        path = experiment.directory(task, prox) / "model.safetensors"
        if path.is_file():
            solver, operators = load_checkpoint(path), operator
            if shifted and task == "inpainting":
                operators = last_fold_only(TASKS[task].make_operator(x.shape[-1]), operator, solver.num_folds)
            estimates[prox] = solver(y, operators)
    return y, estimates


def record_files(experiment):
    """The record.json files of this build's experiment: its flows', then its solvers' and classical methods'."""
    edition = experiment.names["edition"]
    return [
        *sorted(experiment.runs.glob("flow*/record.json")),
        *sorted(experiment.runs.glob(f"{edition}/*/record.json")),
    ]


def publish(experiment, ship=()):
    """Copies all records of an experiment into results/runs/, to be kept with the code; and, in half precision into
    results/checkpoints/, the models named in ship (such as "flow" or "inpainting-glow")."""
    names = []
    for path in record_files(experiment):
        place = path.parent.relative_to(experiment.runs.parent)
        write_json(RESULTS / "runs" / f"{place}.json", json.loads(path.read_text()))
        names.append(place.name)
        if place.name in ship:
            source = path.parent / "model.safetensors"
            info = load_tensors(source)[1]["info"]
            save_checkpoint(
                RESULTS / "checkpoints" / f"{place}.safetensors", load_checkpoint(source), torch.float16, **info
            )
    if missing := set(ship) - set(names):
        raise ValueError(f"no run {', '.join(sorted(missing))} to ship; there are: {', '.join(names)}")


def verify(build="build"):
    """Evaluates every shipped checkpoint whose images are there again, and compares with its record. Rows: name, what was
    recorded, what is found, and whether they agree to 0.02 dB (0.002 bits/dim for a flow)."""
    rows = []
    for path in sorted((RESULTS / "checkpoints").rglob("*.safetensors")):
        place = path.relative_to(RESULTS / "checkpoints").with_suffix("")
        kept = json.loads((RESULTS / "runs" / f"{place}.json").read_text())
        experiment = Experiment(**kept["experiment"], build=build)
        out = experiment.build / "data" / experiment.dataset
        try:
            if not (out / "manifest.json").exists():
                prepare_named(experiment.dataset, out)
            x = experiment.split("test")
        except FileNotFoundError as error:
            rows.append({"checkpoint": str(place), "found": f"not evaluated: {error}"})
            continue
        model = load_checkpoint(path).to(device())
        if kept["kind"] == "flow":
            recorded_value, tolerance = kept["bits_per_dim"]["mean"], 0.002
            value = _bits_per_dim(model, x, experiment.seed).mean().item()
        else:
            recorded_value, tolerance = kept["psnr"]["mean"], 0.02
            x, task = to_tensor(x), kept["name"].removesuffix(f"-{kept['prox']}")
            operator = TASKS[task].make_operator(x.shape[-1]).to(device())
            y = operator.measure(x.to(device()), generator_for(experiment.seed, "test"))
            with torch.no_grad():
                value = psnr(_reconstruct(model, operator, y)[0], x).mean().item()
        agrees = abs(value - recorded_value) <= tolerance
        rows.append({"checkpoint": str(place), "recorded": recorded_value, "found": value, "agrees": agrees})
    return rows


def read_records(paths):
    """The records in these files, in order; ValueError naming a file that is none."""
    records = []
    for path in paths:
        try:
            record = json.loads(Path(path).read_text())
            record["kind"], record["experiment"]["edition"]  # KeyError where it is something else
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result record ({error!r}): delete it and evaluate that run again"
            ) from error
        records.append(record)
    return records


def load_solver(experiment, task, *proxes):
    """(prox, solver) of the first of these proxes whose training for this task did not diverge, in this build."""
    for prox in proxes:
        path = experiment.directory(task, prox) / "model.safetensors"
        if path.is_file():
            return prox, load_checkpoint(path).requires_grad_(False)
    raise FileNotFoundError(
        f"no {' or '.join(proxes)} solver for {task} in {experiment.runs}: train one (python -m flowlib)"
    )


def build_records(experiment):
    """Records of this build's experiment."""
    return read_records(record_files(experiment))


def recorded():
    """Records kept in results/runs/."""
    return read_records(sorted((RESULTS / "runs").rglob("*.json")))


def main_run(records, edition=None):
    """The records of the one experiment that has most solvers, with its flows and classical methods: profiles must not be
    mixed in a comparison."""

    def key(record, *names):
        return tuple(record["experiment"][name] for name in ("profile", "dataset", "seed", *names))

    solvers = [
        r for r in records if r["kind"] in ("solver", "failed") and edition in (None, r["experiment"]["edition"])
    ]
    most = Counter(key(r, "edition") for r in solvers).most_common(1)
    if not most:
        return []
    chosen = most[0][0]
    return [r for r in records if (key(r) == chosen[:3] if r["kind"] == "flow" else key(r, "edition") == chosen)]
