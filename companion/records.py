"""Result records: one JSON file a run, written by an evaluation. All numbers in the book come from them."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit  # Student's t; scipy.stats is slow to import
from torch.utils.flop_counter import FlopCounterMode

from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.settings import TASKS, evaluation_code, training_code
from companion.training import batches, device
from flowlib import psnr, ssim
from flowlib.images import dequantize, to_tensor
from flowlib.training import generator_for

write = write_json


def read(paths) -> list[dict]:
    """The records in these files, in order; ValueError naming a file that is none."""
    found = []
    for path in paths:
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            record["kind"], record["experiment"]["edition"]  # KeyError where it is something else
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result record ({error!r}): delete it and evaluate that run again"
            ) from error
        found.append(record)
    return found


def recorded() -> list[dict]:
    """Records kept in results/runs/."""
    return read(sorted((RESULTS / "runs").rglob("*.json")))


def mean_and_interval(values, level: float = 0.95) -> tuple[float, float]:
    """Mean over images and half the width of its confidence interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    half_width = stdtrit(len(values) - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half_width)


def statistics(values, digits: int = 4) -> dict:
    """JSON-able mean, half width of its 95 % interval, and the values of all images; values that are not
    finite are None, and counted."""
    finite = [v for v in values if math.isfinite(v)]
    mean, half_width = mean_and_interval(finite) if len(finite) > 1 else (finite[0] if finite else None, None)
    result = dict(mean=mean, half_width=half_width)
    result["values"] = [round(float(v), digits) if math.isfinite(v) else None for v in values]
    return result if len(finite) == len(values) else result | {"not_finite": len(values) - len(finite)}


def data_of(experiment) -> dict:
    """A record's description of its images."""
    manifest = experiment.images().manifest
    return {k: manifest[k] for k in ("name", "source", "crop", "pixels_sha256")} | {
        "split": experiment.split_sizes
    }


def evaluate(experiment, run, model, summary, trained) -> dict:
    """The record of a trained model, evaluated on the test images."""
    model = model.to(device())
    found = (
        _evaluate_flow(experiment, run, model)
        if run.kind == "flow"
        else _evaluate_solver(experiment, run, model)
    )
    return _about(experiment, run, trained) | found | dict(training=summary, evaluated=provenance())


def _about(experiment, run, trained):
    return dict(
        name=run.name,
        kind="solver" if run.kind == "denoiser" else run.kind,
        experiment=experiment.names,
        settings=run.as_dict(),
        settings_hash=run.settings_hash,
        training_code=training_code(),
        evaluation_code=evaluation_code(),
        task=run.task,
        method=run.method,
        trained=trained,
        data=data_of(experiment),
    )


def write_failed(experiment, run, directory, reason, summary, trained) -> dict:
    """The record of a training that diverged."""
    record = _about(experiment, run, trained) | dict(kind="failed", reason=reason, training=summary)
    write(directory / "record.json", record)
    return record


@torch.no_grad()
def bits_per_dim(glow, images, seed):
    """Of uint8 images, (N,)."""
    x = dequantize(images, generator_for(seed, "test")).to(device())
    return torch.cat([glow.bits_per_dim(batch) for batch in batches(x)])


@torch.no_grad()
def _evaluate_flow(experiment, run, glow):
    """Bits per dimension of the test images, the flow's round trip, and the root-mean-square change of
    images, clean and not, when their latents are shrunk by 1 + λ."""
    images = experiment.split("test")
    some = dequantize(images[:50], generator_for(run.seed, "test")).to(device())
    noise = torch.randn(some.shape, generator=generator_for(run.seed, "round trip")).to(some)
    inputs = {"natural": some, "noise 0.2": some + 0.2 * noise, "constant": torch.zeros_like(some)}
    round_trip, response = {}, {}
    for name, image in inputs.items():
        latents, _ = glow(image)
        round_trip[name] = (glow.inverse(latents)[0] - image).abs().max().item()
        response[name] = {
            str(lam): (glow.inverse([z / (1 + lam) for z in latents])[0] - image)
            .square()
            .mean()
            .sqrt()
            .item()
            for lam in (0.001, 0.01, 0.1)
        }
    return dict(
        num_parameters=sum(p.numel() for p in glow.parameters()),
        bits_per_dim=statistics(bits_per_dim(glow, images, run.seed).tolist()),
        round_trip=round_trip,
        shrinkage_response=response,
    )


def measured(task: str, x, seed: int, **changes):
    """(y, operator) of images x (N, C, H, W), measured as all evaluations measure them; changes: other
    parameters of the operator, such as a task's ood_parameters."""
    operator = TASKS[task].make_operator(x.shape[-1], **changes).to(device())
    return operator.measure(x.to(device()), generator_for(seed, "test")), operator


def last_fold_only(operator, other, num_folds: int) -> list:
    """Operators of the folds such that only the last one knows of the other setting, as the paper words it
    for inpainting."""
    return [operator] * (num_folds - 1) + [other]


@torch.no_grad()
def reconstruct(solver, operator, y):
    """(x_hat, seconds) of measurements y, in batches."""
    x_hat, seconds = [], 0.0
    for batch in batches(y.to(device())):
        start = time.monotonic()
        x_hat.append(solver(batch, operator).cpu())
        seconds += time.monotonic() - start
    return torch.cat(x_hat), seconds


@torch.enable_grad()  # else the CPU's convolutions are fused ones, which PyTorch does not count
def _gflop(solver, operator, y):
    """Floating-point operations of one reconstruction, in units of 10^9; a multiplication and an addition
    are two."""
    with FlopCounterMode(display=False) as counter:
        solver(y[:1].to(device()), operator)
    return counter.get_total_flops() / 1e9


def _quality(x_hat, x):
    return dict(psnr=statistics(psnr(x_hat, x).tolist()), ssim=statistics(ssim(x_hat, x).tolist()))


@torch.no_grad()
def psnr_without_fold(solver, k: int, operator, y, x) -> float:
    """Mean PSNR where the prox of fold k does nothing, λ = 0: the worth of its flow to the solver."""
    learnt = solver.shrinkage[k].clone()
    solver.shrinkage[k] = 0
    try:
        return psnr(reconstruct(solver, operator, y)[0], x).mean().item()
    finally:
        solver.shrinkage[k] = learnt


@torch.no_grad()
def describe_folds(solver, operator, y, x) -> list[dict]:
    """For every fold: μ, λ, and means over the images of its effects; for flows, on the first 100 images,
    also the loss of the result without its prox."""
    few = operator, y[:100], x[:100]
    whole = psnr(reconstruct(solver, *few[:2])[0], few[2]).mean().item()
    folds = [solver(batch, operator, return_folds=True)[1] for batch in batches(y.to(device()))]

    def over_images(k, key):
        return torch.cat([getattr(batch[k], key) for batch in folds]).cpu()

    rows = []
    for k, prox in enumerate(solver.proxes):
        row = dict(step_size=float(solver.step_size[k]))
        for name, key in (("psnr_tilde", "x_tilde"), ("psnr", "x")):
            row[name] = psnr(over_images(k, key), x).mean().item()
        if prox.uses_shrinkage:
            row["shrinkage"] = float(solver.shrinkage[k])
            row["worth"] = whole - psnr_without_fold(solver, k, *few)
            for suffix in ("_tilde", ""):
                row[f"latent_norm{suffix}"] = over_images(k, f"latent_norm{suffix}").mean().item()
                nats = over_images(k, f"log_prob{suffix}").mean().item() / x[0].numel()
                row[f"bits_per_dim{suffix}"] = 8 - nats / math.log(2)
        rows.append({key: value if math.isfinite(value) else None for key, value in row.items()})
    return rows


def _evaluate_solver(experiment, run, solver):
    """PSNR and SSIM of each test image, the effects of the folds, and the same, without training again, for
    measurements and, if prepared, for images out of distribution."""
    x, task = to_tensor(experiment.split("test")), TASKS[run.task]
    y, operator = measured(run.task, x, run.seed)
    x_hat, seconds = reconstruct(solver, operator, y)
    found = _quality(x_hat, x) | {"psnr_measurement": statistics(psnr(y.cpu(), x).tolist())}
    if task.ood_parameters:
        y_ood, other = measured(run.task, x, run.seed, **task.ood_parameters)
        found["ood_measurements"] = _quality(reconstruct(solver, other, y_ood)[0], x)
        operators = last_fold_only(operator, other, solver.num_folds)
        found["ood_measurements_last_fold"] = _quality(reconstruct(solver, operators, y_ood)[0], x)
    ood = experiment.ood_images()
    if ood is not None:
        x_ood = to_tensor(ood.images[: min(100, len(x))])
        estimate = reconstruct(solver, operator, measured(run.task, x_ood, run.seed)[0])[0]
        found["ood_images"] = {"dataset": ood.name} | _quality(estimate, x_ood)
    return found | dict(
        num_parameters=sum(p.numel() for p in solver.proxes[0].parameters()),
        num_folds=solver.num_folds,
        folds=describe_folds(solver, operator, y, x),
        milliseconds_per_image=1000 * seconds / len(x),
        gflop_per_image=_gflop(solver, operator, y),
    )


def psnr_on_test(experiment, run, solver):
    """Of each test image, measured as all evaluations measure them, (N,)."""
    x = to_tensor(experiment.split("test"))
    y, operator = measured(run.task, x, run.seed)
    return psnr(reconstruct(solver.to(device()), operator, y)[0], x)


def verify(build="build"):
    """Evaluates again every model that is kept with the code, if its images are there, and compares the
    result with its record. Rows: name, the recorded and the new result, and whether they agree to 0.02 dB
    (0.002 bits/dim for a flow)."""
    from companion.experiment import Experiment
    from companion.runs import kept_experiments, kept_model
    from data import prepare_named

    for record in kept_experiments():
        experiment = Experiment(**record["experiment"], build=build)
        row = {"checkpoint": experiment.place(_run_of(experiment, record))}
        out = experiment.build / "data" / experiment.dataset
        try:
            if not (out / "manifest.json").exists():
                prepare_named(experiment.dataset, out)
            images, x = experiment.images(), experiment.split("test")
        except FileNotFoundError as error:
            yield row | {"found": f"not evaluated: {error}"}
            continue
        if images.manifest["pixels_sha256"] != record["data"]["pixels_sha256"]:
            other = f"not evaluated: these are other images of {experiment.dataset} than the recorded ones"
            yield row | {"found": other}
            continue
        run = _run_of(experiment, record)
        model = kept_model(experiment, run).to(device())
        if record["kind"] == "flow":
            expected, tolerance = record["bits_per_dim"]["mean"], 0.002
            value = bits_per_dim(model, x, experiment.seed).mean().item()
        else:
            expected, tolerance = record["psnr"]["mean"], 0.02
            value = psnr_on_test(experiment, run, model).mean().item()
        yield row | {"recorded": expected, "found": value, "agrees": abs(value - expected) <= tolerance}


def _run_of(experiment, record):
    if record["kind"] == "flow":
        return experiment.flow(record["settings"]["noisy"])
    return experiment.solver(record["task"], record["method"])
