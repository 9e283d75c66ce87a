"""How the runs of an experiment are trained: the flow by likelihood (14), solvers end to end by mean squared
error."""

import copy
import json
import os
from pathlib import Path

import torch

from companion.experiment import Experiment
from companion.paths import RESULTS
from companion.settings import TASKS, Run, Training
from flowlib import Glow, GlowProx, UnfoldedPGD, load_checkpoint, set_coupling
from flowlib.folds import find_nonfinite_fold
from flowlib.images import dequantize, to_tensor
from flowlib.prox import PROXES
from flowlib.training import fit, generator_for

NOISY_SIGMA = 0.25


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join_ranks():
    """Joins the other processes of torchrun, if it started this one, each with its own GPU if there are
    any."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def coupling_method() -> str:
    """How coupling nets are computed here: on a GPU by the fastest method in its benchmark record, else
    plain."""
    if device().type == "cuda":
        path = coupling_record()
        return json.loads(path.read_text(encoding="utf-8"))["choice"] if path.exists() else "plain"
    return "plain"


def coupling_record() -> Path:
    """The record of benchmarks/card.py for GPUs of this name."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
    return RESULTS / "benchmarks" / f"coupling-{name.replace(' ', '-')}.json"


def batches(images, size=50):
    for start in range(0, len(images), size):
        yield images[start : start + size]


def mirrored(x: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """x (B, C, H, W) with about half of its images mirrored left to right."""
    chosen = torch.rand(len(x), generator=generator_for(seed, "mirror", step), device="cpu") < 0.5
    return torch.where(chosen[:, None, None, None].to(x.device), x.flip(3), x)


def train(experiment: Experiment, run: Run):
    """(trained model, summary) of a run whose start is trained. Raises Diverged."""
    train_part = _train_flow if run.kind == "flow" else _train_solver
    return train_part(experiment, run, experiment.directory(run))


def _identity(run, images):
    """Further settings that a saved training must share to be resumed."""
    return {"settings": run.settings_hash, "pixels": images.manifest["pixels_sha256"]}


def model_path(experiment, run):
    return experiment.directory(run) / "model.safetensors"


def _train_flow(experiment, run, directory):
    """Maximum likelihood (14) on dequantised images; the loss is in bits per dimension. A noisy run
    fine-tunes the clean flow on images that each have Gaussian noise of a random σ in [0, NOISY_SIGMA]."""
    settings, seed, images = run.training, run.seed, experiment.images()
    train, val = experiment.split("pretrain", images), experiment.split("val", images)[: settings.val_images]

    def prepare(batch, purpose, step=0):
        generator = generator_for(seed, purpose, step)
        x = dequantize(batch, generator)
        if settings.mirror and purpose == "pretrain":
            x = mirrored(x, seed, step)
        if run.noisy:
            sigma = NOISY_SIGMA * torch.rand(len(x), 1, 1, 1, generator=generator)
            x = x + sigma * torch.randn(x.shape, generator=generator)
        return x.to(device())

    torch.manual_seed(seed)
    if run.start:
        glow = load_checkpoint(model_path(experiment, run.start)).to(device())
    else:
        glow = Glow(**run.config).to(device())
        order = torch.randperm(len(train), generator=generator_for(seed, "initialize"))[:256].numpy()
        glow.initialize(prepare(train[order], "initialize"))

    set_coupling(glow, coupling_method())

    def make_batch(indices, step):
        return (prepare(train[indices], "pretrain", step),)

    def loss(x):
        return glow.bits_per_dim(x).mean()

    def validation_loss():
        values = [glow.bits_per_dim(prepare(batch, "validation", i)) for i, batch in enumerate(batches(val))]
        return torch.cat(values).mean().item()

    groups = [{"params": list(glow.parameters()), "lr": settings.lr}]
    arguments = (settings, len(train), seed, directory, _identity(run, images))
    return glow, fit(glow, groups, make_batch, loss, validation_loss, *arguments)


def _fresh_prox(experiment, run):
    """An untrained prox of this run's size; a flow's ActNorms are set from training images."""
    if run.network != "glow":
        return PROXES[run.network](**run.config)
    glow = Glow(**run.config)
    glow.initialize(to_tensor(experiment.split("train")[:64]))
    return GlowProx(glow)


def build_solver(experiment: Experiment, run: Run) -> UnfoldedPGD:
    """The untrained solver: K folds that start from the same pre-trained network or each from fresh weights,
    and x_0 = g(0) for flows, 0 for the baselines. A denoiser is a solver of one fold with μ = 1 and x_0 = 0,
    for which x̃ = y."""
    torch.manual_seed(run.seed)
    if run.start and run.start.kind == "solver":
        return add_folds(load_checkpoint(model_path(experiment, run.start)), run.num_folds)
    if run.start is None:
        proxes = [_fresh_prox(experiment, run) for _ in range(run.num_folds)]
    else:
        first = load_checkpoint(model_path(experiment, run.start))
        first = GlowProx(first) if run.network == "glow" else first.proxes[0]
        proxes = [first, *(copy.deepcopy(first) for _ in range(run.num_folds - 1))]
    with torch.no_grad():
        x0 = proxes[0].glow.mode(64) if run.network == "glow" else torch.zeros(1, 3, 64, 64)
    step_size = 1.0 if run.kind == "denoiser" else 0.5
    solver = UnfoldedPGD(proxes, x0, step_size=step_size, shrinkage=run.training.shrinkage)
    if run.frozen:
        solver.requires_grad_(False)
        solver.step_size.requires_grad_(True)
    return solver


def add_folds(solver: UnfoldedPGD, num_folds: int) -> UnfoldedPGD:
    """A solver of more folds with the same answers as this solver of flows: new folds copy the last network,
    and with μ = λ = 0 they change nothing."""
    more = num_folds - solver.num_folds
    proxes = [*solver.proxes, *(copy.deepcopy(solver.proxes[-1]) for _ in range(more))]
    zeros = solver.x0.new_zeros(more)
    scalars = (torch.cat([old.detach(), zeros]) for old in (solver.step_size, solver.shrinkage))
    return UnfoldedPGD(proxes, solver.x0, *scalars).requires_grad_(True)


def parameter_groups(solver: UnfoldedPGD, settings) -> list[dict]:
    """The trained parameters in two groups with their learning rates: networks, and the scalars μ and λ."""
    groups = {"networks": [], "scalars": []}
    for name, parameter in solver.named_parameters():
        if parameter.requires_grad:
            groups["scalars" if name in ("step_size", "shrinkage") else "networks"].append(parameter)
    rates = {"networks": settings.lr, "scalars": settings.scalar_lr}
    return [{"params": groups[name], "lr": rates[name]} for name in groups if groups[name]]


def _train_solver(experiment, run, directory):
    solver = build_solver(experiment, run).to(device())
    set_coupling(solver, coupling_method())
    return solver, fit_solver(experiment, run, solver, run.training, directory)


def fit_solver(
    experiment: Experiment, run: Run, solver: UnfoldedPGD, settings: Training, directory, loss=None, **options
) -> dict:
    """Trains a solver in place on the task and images of run; returns the summary. Raises Diverged.
    loss(x, y, operator) replaces the mean squared error; options: groups, and further arguments of fit."""
    seed, images = run.seed, experiment.images()
    train = to_tensor(experiment.split("train", images))
    val = to_tensor(experiment.split("val", images)[: settings.val_images])
    operator = TASKS[run.task].make_operator(train.shape[-1], **run.operator).to(device())

    def measured(x, purpose, step=0):
        x, generator = x.to(device()), generator_for(seed, purpose, step)
        if run.blind_sigma and purpose == "measure":
            sigma = run.blind_sigma * torch.rand(len(x), 1, 1, 1, generator=generator)
            return x, x + (sigma * torch.randn(x.shape, generator=generator)).to(x)
        return x, operator.measure(x, generator)

    def make_batch(indices, step):
        x = mirrored(train[indices], seed, step) if settings.mirror else train[indices]
        return measured(x, "measure", step)

    def training_loss(x, y):
        return loss(x, y, operator) if loss else (solver(y, operator) - x).square().mean()

    def validation_loss():
        losses = []
        for i, batch in enumerate(batches(val)):
            x, y = measured(batch, "validation", i)
            losses.append((solver(y, operator) - x).square().mean(dim=(1, 2, 3)))
        return torch.cat(losses).mean().item()

    @torch.no_grad()
    def explain(x, y):
        return find_nonfinite_fold(solver(y, operator, return_folds=True)[1])

    groups = options.pop("groups", None) or parameter_groups(solver, settings)
    functions = (make_batch, training_loss, validation_loss)
    arguments = (settings, len(train), seed, directory, _identity(run, images), explain)
    return fit(solver, groups, *functions, *arguments, **options)
