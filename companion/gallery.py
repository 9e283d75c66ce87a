"""Two real faces, restored by recorded solvers: pictures for every build, whatever it was trained on. For
a solver too large to be kept with the code, its restored faces are kept instead."""

import functools

import numpy as np
import torch

from companion import figures
from companion.experiment import Experiment
from companion.paths import RESULTS
from companion.records import describe_folds, last_fold_only, measured, read, reconstruct, recorded
from companion.runs import is_finished, kept_experiments, kept_model, kept_place, load
from companion.settings import METHODS, TASKS, Run
from companion.words import say
from data.portraits import portraits
from data.synthetic import draw_faces
from flowlib import GlowProx, UnfoldedPGD, psnr
from flowlib.checkpoints import load_tensors, save_tensors
from flowlib.images import to_tensor, to_uint8

FLOWS = ("glow", "glow-noisy")


def faces():
    """The two portraits, (2, 3, 64, 64) in [-0.5, 0.5]."""
    return to_tensor(portraits())


def drawn_faces():
    """Two drawn faces, (2, 3, 64, 64) in [-0.5, 0.5]: no photograph has such eyes and colours."""
    return to_tensor(draw_faces(range(2), "ood"))


def kept_records(task: str, edition: str = "v2") -> dict[str, dict]:
    """{method: record} of the kept solvers for a task: of the experiment whose flow saw most images."""
    groups = {}
    for r in kept_experiments():
        if r["task"] == task and r["experiment"]["edition"] == edition:
            groups.setdefault(tuple(r["experiment"].values()), {})[r["method"]] = r
    seen = [
        max([g[m]["training"]["images_seen"] for m in FLOWS if m in g], default=0) for g in groups.values()
    ]
    found = list(groups.values())[int(np.argmax(seen))] if groups else {}
    return {method: found[method] for method in METHODS if method in found}


@functools.cache
def _model(key: tuple, task: str, method: str):
    experiment = Experiment(*key)
    return kept_model(experiment, experiment.solver(task, method)).eval()


def solver(record: dict) -> UnfoldedPGD:
    """The kept solver of a record."""
    return _model(tuple(record["experiment"].values()), record["task"], record["method"])


def flow_solver(task: str) -> tuple[dict, UnfoldedPGD]:
    """(record, solver) of the kept flow solver for a task. Raises FileNotFoundError without one."""
    found = kept_records(task)
    for method in FLOWS:
        if method in found:
            return found[method], solver(found[method])
    raise FileNotFoundError(
        f"no flow solver for {task} is in {RESULTS / 'checkpoints'}: get the whole project"
    )


def kept_flow(noisy: bool = False):
    """(Glow, record) of the kept flow that saw most images; None without one."""
    flows = [r for r in kept_experiments() if r["kind"] == "flow" and r["settings"]["noisy"] == noisy]
    if not flows:
        return None
    record = max(flows, key=lambda r: r["training"]["images_seen"])
    experiment = Experiment(**record["experiment"])
    return kept_model(experiment, experiment.flow(noisy)).eval(), record


@torch.no_grad()
def keep_samples(record: dict, glow, temperature: float = 0.7):
    """Keeps g(0) and 16 samples of a recorded flow, as 8-bit images."""
    samples = glow.sample(16, 64, temperature, torch.Generator().manual_seed(0))
    images = {"mode": glow.mode(64), "samples": samples}
    _picture(record).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(to_uint8(value)) for name, value in images.items()}
    save_tensors(_picture(record), tensors, record["trained"])


def largest_flow():
    """({"mode", "samples"}: uint8 images (N, H, W, 3), record) of the largest recorded flow whose
    picture is kept; None without one."""
    found = [r for r in recorded() if r["kind"] == "flow" and _picture(r).exists()]
    if not found:
        return None
    record = max(found, key=lambda r: r["num_parameters"])
    return {name: value.numpy() for name, value in load_tensors(_picture(record))[0].items()}, record


def plugged_in(record: dict) -> UnfoldedPGD:
    """The solver of a plug-and-play record: only μ was trained, so the kept flow and the record's numbers
    define it."""
    experiment = Experiment(**record["experiment"])
    glow = kept_model(experiment, experiment.flow()).eval()
    scalars = {name: [fold[name] for fold in record["folds"]] for name in ("step_size", "shrinkage")}
    return UnfoldedPGD([GlowProx(glow)] * len(record["folds"]), glow.mode(64).detach(), **scalars)


@torch.no_grad()
def restored(task: str, ood: bool = False, solvers: dict | None = None, images: torch.Tensor | None = None):
    """(y, {method: x_hat}) of images, by default the two faces; ood: measured out of distribution, as the
    paper words it. solvers: {method: UnfoldedPGD}, by default the kept ones."""
    images = faces() if images is None else images
    if solvers is None:
        solvers = {method: solver(r) for method, r in kept_records(task).items()}
    changes = TASKS[task].ood_parameters if ood else {}
    y, operator = measured(task, images, 0, **changes)
    estimates = {}
    for method, model in solvers.items():
        operators = operator
        if ood and task == "inpainting":
            operators = last_fold_only(TASKS[task].make_operator(64), operator, model.num_folds)
        estimates[method] = reconstruct(model, operators, y)[0]
    return y, estimates


def _picture(record):
    """The kept file of the faces restored by this recorded solver, if there is one."""
    names = record["experiment"]
    folder = f"{names['profile']}-{names['dataset']}-s{names['seed']}"
    return RESULTS / "pictures" / folder / names["edition"] / f"{record['name']}.safetensors"


@torch.no_grad()
def keep_picture(record: dict, model: UnfoldedPGD):
    """Keeps the two faces as this recorded solver restores them, in half precision."""
    y, operator = measured(record["task"], faces(), 0)
    path = _picture(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"x_hat": reconstruct(model, operator, y)[0].half()}, record["trained"])


def publish_picture(experiment: Experiment, run: Run):
    """Keeps the picture of a published solver, or of a flow of clean images, whose weights are not kept."""
    record_path, kept = kept_place(experiment, run)
    if run.noisy or kept.exists() or not is_finished(experiment, run):
        return
    (record,) = read([record_path])
    keep = {"flow": keep_samples, "solver": keep_picture}.get(record["kind"])
    if keep:
        keep(record, load(experiment, run))


def pictured(task: str, edition: str = "v2", profile: str | None = None) -> dict[str, dict]:
    """{method: record} of the recorded solvers whose pictures are kept, of any seed: those of the experiment
    of the kept solvers that are not kept themselves, or all of another profile."""
    kept = kept_records(task, edition)
    names = next((r["experiment"] for r in kept.values()), {"profile": None})
    profile, hidden = profile or names["profile"], () if profile else kept
    found = {}
    for r in sorted(recorded(), key=lambda r: -r["experiment"]["seed"]):
        same = (r["experiment"]["profile"], r["experiment"]["edition"], r["task"]) == (profile, edition, task)
        if same and r["method"] not in hidden and _picture(r).exists():
            found[r["method"]] = r
    return {method: found[method] for method in METHODS if method in found}


def _restored_faces(shown):
    return {method: load_tensors(_picture(r))[0]["x_hat"].float() for method, r in shown.items()}


def paper_size(task: str):
    """Figure like that of examples, of networks of the paper's size (profile gpu-longer); None where no such
    picture is kept."""
    shown = pictured(task, profile="gpu-longer")
    return _figure(task, shown) if shown else None


def starts(task: str):
    """Figure 5 of v1: the flow solver with and without pre-training; None where a picture is missing."""
    shown = pictured(task, "v1", "cpu")
    shown = {method: r for method, r in shown.items() if METHODS[method].network == "glow"}
    return _figure(task, shown) if {"glow", "glow-scratch"} <= set(shown) else None


def _figure(task, shown):
    return figures.examples(faces(), measured(task, faces(), 0)[0], _restored_faces(shown))


def examples(task: str, ood: bool = False, images: torch.Tensor | None = None):
    """Figure: measurement, each kept method, original; a sentence where nothing is kept. The two faces
    measured as in training are also shown for methods of which only this picture is kept."""
    shown = pictured(task) if images is None and not ood else {}
    images = faces() if images is None else images
    y, estimates = restored(task, ood, images=images)
    if not estimates:
        return "No solver for this task is kept."
    estimates |= _restored_faces(shown)
    return figures.examples(images, y, {m: estimates[m] for m in METHODS if m in estimates})


def sources(task: str, profile: str | None = None) -> str:
    """HTML: the recorded solvers that a picture shows, each with its result on test images and its record.
    profile: see pictured."""
    shown = pictured(task, profile=profile) | ({} if profile else kept_records(task))
    told = say("sources", records=[shown[method] for method in METHODS if method in shown])
    return f"<p>{told}</p>" if told else ""


def hero():
    """Figures for the front page, {"hero": wide, "hero-narrow": for a telephone}: the two faces measured and
    restored by the kept solvers of the paper's method, task by task. None where one is not kept."""
    x, names, pairs = faces(), {"inpainting": "a hole", "denoising": "noise", "deblurring": "blur"}, {}
    for task, name in names.items():
        found = kept_records(task)
        if "glow" not in found:
            return None
        y, estimates = restored(task, solvers={"glow": solver(found["glow"])})
        pairs[name] = y, estimates["glow"]

    def decibels(images, originals):
        return [f"{value:.1f} dB" for value in psnr(images, originals)]

    wide = {f"{name}{', restored' * i}": pair[i] for name, pair in pairs.items() for i in (0, 1)}
    below = {title: decibels(images, x) for title, images in wide.items()}
    narrow, under = {}, {}
    for k, original in enumerate(x):
        for i, what in enumerate(("measured", "restored")):
            title = what + " " * k  # titles of columns must differ
            narrow[title] = torch.stack([pair[i][k] for pair in pairs.values()])
            under[title] = decibels(narrow[title], original.expand_as(narrow[title]))
    return {
        "hero": figures.image_grid(wide | {"original": x}, below, width=8.8),
        "hero-narrow": figures.image_grid(narrow, under, list(pairs), width=4.4),
    }


def plugged_in_examples(task: str):
    """Figure: the same flow plugged in and trained for the task; a sentence where one is missing."""
    found = kept_records(task)
    frozen = next(
        (r for r in recorded() if r["method"] == "glow-frozen" and _same_flow(r, found, task)), None
    )
    if frozen is None:
        return "No solver for this task is kept."
    method = next(m for m in FLOWS if m in found)
    solvers = {"glow-frozen": plugged_in(frozen), method: solver(found[method])}
    y, estimates = restored(task, solvers=solvers)
    return figures.examples(faces(), y, estimates)


def _same_flow(r, found, task):
    kept = [found[m] for m in FLOWS if m in found]
    return bool(kept) and r["task"] == task and r["experiment"] == kept[0]["experiment"]


@torch.no_grad()
def folds_figure(task: str):
    """The paper's Figure 1 with images and numbers: one face, fold by fold, in the kept flow solver."""
    found = kept_records(task)
    record = next((found[m] for m in FLOWS if m in found), None)
    if record is None:
        return "No solver for this task is kept."
    x, model = faces()[:1], solver(record)
    y, operator = measured(task, x, 0)
    _, folds = model(y, operator, return_folds=True)
    numbers = describe_folds(model, operator, y, x)
    return figures.as_svg(figures.fold_diagram(y[0], model.x0[0].detach(), folds, numbers, x[0]))
