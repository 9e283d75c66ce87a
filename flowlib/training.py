"""Training: likelihood pre-training of the flow (14) and end-to-end training of the unfolded solver (MSE), in one loop.

Every random draw of a step comes from a generator seeded by (seed, purpose, step), so a run that was killed and resumed
from its last checkpoint ends with the same weights, to the bit, as one that was not."""

import copy
import math
import time
import zlib
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from flowlib.checkpoints import load_checkpoint, load_state, load_tensors, save_checkpoint, save_tensors
from flowlib.data import dequantize, to_tensor
from flowlib.experiments import METHODS, TASKS
from flowlib.files import write_csv, write_json
from flowlib.glow import Glow, set_compute_dtype
from flowlib.provenance import provenance
from flowlib.prox import PROXES, GlowProx
from flowlib.solver import UnfoldedPGD, find_nonfinite_fold


def generator_for(seed, purpose, step=0):
    """A torch.Generator that depends on all three; purpose is a word."""
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key) >> 1)


def batch_indices(step, batch_size, num_images, seed):
    """The images of one step: every epoch is a new permutation, and its incomplete last batch is dropped."""
    steps_per_epoch = num_images // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(num_images, generator=generator_for(seed, "epoch", epoch))
    return order[position * batch_size : (position + 1) * batch_size].numpy()


def learning_rate_factor(step, config, restarts=()):
    """Linear warm-up, then constant or half a cosine down to zero; each restart halves it, and warms up again."""
    start = restarts[-1]["step"] if restarts else 0
    warmup = min(1.0, (step - start + 1) / max(1, config.warmup_steps))
    return warmup * 0.5 ** len(restarts) * (0.5 * (1 + math.cos(math.pi * step / config.num_steps)) if config.cosine else 1.0)


def fit(model, groups, batch_loss, validation_loss, config, num_images, seed, directory, explain=None):
    """Trains model in place, by Adam, to the weights that were best on validation; returns a summary of the run.

    groups: optimizer parameter groups with their own lr. batch_loss(indices, step) -> scalar tensor;
    validation_loss() -> float. Writes directory/log.csv and, every config.checkpoint_minutes and at the end,
    directory/resume.safetensors; where that file lies, training goes on from it, and ValueError is raised if it belongs
    to other settings. A run whose loss or gradient is not finite, or whose validation loss is more than three times its best,
    goes on from its best weights at half the rate, at most config.max_restarts times; then Diverged (a FloatingPointError) is
    raised, with explain(indices, step) as the reason."""
    if num_images < config.batch_size:
        raise ValueError(
            f"{num_images} training images are fewer than one batch of {config.batch_size}: use more images"
        )
    set_compute_dtype(model, torch.bfloat16 if config.bf16 else None)
    parameters = [p for group in groups for p in group["params"]]
    base_rates = [group["lr"] for group in groups]

    def new_optimizer():
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True)

    optimizer = new_optimizer()
    state = dict(step=0, best_loss=math.inf, best_step=0, seconds=0.0, cpu_seconds=0.0, history=[])
    state |= dict(restarts=[], stopped_early=False)
    fingerprint = {"training": asdict(config), "seed": seed, "num_images": num_images}
    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
    resume = directory / "resume.safetensors"

    tensors, header = load_tensors(resume) if resume.exists() else ({}, None)
    if header and header["fingerprint"] != fingerprint:
        if not header["finished"]:
            raise ValueError(f"{resume} belongs to a run with other settings: delete it, or choose another directory")
        header = None  # nothing is lost by starting anew
    if header:
        state = header["state"]
        load_state(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, resume)
        best = {k[5:]: v for k, v in tensors.items() if k.startswith("best.")}
        saved = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                if name != "step":  # the fused optimizer reads memory in its order, so that must be the parameter's
                    value = torch.empty_like(parameters[int(index)]).detach().copy_(value)
                saved["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(saved)

    def checkpoint():
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"best.{k}": v for k, v in best.items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        finished = state["step"] == config.num_steps or state["stopped_early"]
        save_tensors(resume, tensors, {"fingerprint": fingerprint, "state": state, "finished": finished})

    def restart(reason):
        """Back to the best weights, with half the rate and a warm-up; or Diverged."""
        if len(state["restarts"]) == config.max_restarts:
            raise Diverged(
                f"step {state['step']}: {reason}. Lower the learning rate, or start from a flow with the 'tanh' scale rule",
                summarize(config, state),
            )
        state["restarts"].append({"step": state["step"], "reason": reason})
        model.load_state_dict(best)
        return new_optimizer()

    last_saved, last_tick, last_cpu = time.monotonic(), time.monotonic(), time.process_time()
    progress = tqdm(total=config.num_steps, initial=state["step"], desc=directory.name, mininterval=2)
    while state["step"] < config.num_steps and not state["stopped_early"]:
        step = state["step"]
        indices = batch_indices(step, config.batch_size, num_images, seed)
        for group, rate in zip(optimizer.param_groups, base_rates):
            group["lr"] = rate * learning_rate_factor(step, config, state["restarts"])
        model.train()
        optimizer.zero_grad()
        loss = batch_loss(indices, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
        if finite:
            optimizer.step()
        else:
            where = explain(indices, step) if explain else None
            found = f"loss {loss.item():.4g}, gradient norm {norm.item():.4g}"
            optimizer = restart(f"{found}; first not finite: {where or 'the gradient'}")
        state["step"] = step + 1
        row = None
        if state["step"] % config.validate_every == 0 or state["step"] == config.num_steps:
            model.eval()
            with torch.no_grad():
                value = validation_loss()
            if value < state["best_loss"]:
                state |= dict(best_loss=value, best_step=state["step"])
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            elif not value <= 3 * state["best_loss"] and finite:
                optimizer = restart(f"validation loss {value:.4g} after {state['best_loss']:.4g}")
            row = dict(
                step=state["step"], images_seen=state["step"] * config.batch_size, loss=loss.item(), val_loss=value
            )
            state["stopped_early"] = state["step"] - state["best_step"] >= config.patience * config.validate_every
        now, cpu = time.monotonic(), time.process_time()
        state["seconds"] += now - last_tick
        state["cpu_seconds"] += cpu - last_cpu
        last_tick, last_cpu = now, cpu
        if row:
            # Not finite values have no place in JSON.
            row = {k: v if math.isfinite(v) else None for k, v in row.items()}
            state["history"].append(row | {k: round(state[k], 2) for k in ("seconds", "cpu_seconds")})
            write_csv(directory / "log.csv", state["history"])
            progress.set_postfix(val_loss=f"{value:.5f}")
        progress.update()
        if now - last_saved >= 60 * config.checkpoint_minutes:
            checkpoint()
            last_saved = now
    progress.close()
    checkpoint()  # whoever is killed while evaluating need not train again

    model.load_state_dict(best)
    model.eval()
    set_compute_dtype(model, None)
    return summarize(config, state)


def summarize(config, state):
    """What a record keeps of a training."""
    return dict(training=asdict(config), images_seen=state["step"] * config.batch_size) | {
        {"step": "steps", "best_loss": "best_val_loss"}.get(key, key): value for key, value in state.items()
    }


class Diverged(FloatingPointError):
    """A loss or gradient that is not finite; `summary` is what the record of such a run keeps."""

    def __init__(self, message, summary):
        super().__init__(message)
        self.summary = summary


def finish(model, directory, summary, **info):
    """Writes the trained model with its summary."""
    save_checkpoint(directory / "model.safetensors", model, summary=summary, **info)


def mirrored(x, seed, step):
    """x (B, C, H, W) with about half of its images mirrored left to right."""
    chosen = torch.rand(len(x), generator=generator_for(seed, "mirror", step)) < 0.5
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def batches(images, size):
    for start in range(0, len(images), size):
        yield images[start : start + size]


NOISY_SIGMA = 0.25


def pretrain(experiment, noisy=False):
    """Pre-trains the flow by maximum likelihood (14) on dequantised images; loss in bits per dimension.

    noisy: goes on from the clean flow, on images with Gaussian noise of a random σ in [0, NOISY_SIGMA] each."""
    profile, seed = experiment.profile, experiment.seed
    config = profile.noisy_pretraining if noisy else profile.pretraining
    images = experiment.images()
    train, val = experiment.split("pretrain", images), experiment.split("val", images)[: config.val_images]
    directory, started = experiment.flow_directory(noisy), provenance()

    def prepare(batch, purpose, step=0):
        generator = generator_for(seed, purpose, step)
        x = dequantize(batch, generator)
        if config.mirror and purpose == "pretrain":
            x = mirrored(x, seed, step)
        if noisy:
            sigma = NOISY_SIGMA * torch.rand(len(x), 1, 1, 1, generator=generator)
            x = x + sigma * torch.randn(x.shape, generator=generator)
        return x.to(device())

    torch.manual_seed(seed)
    if noisy:
        glow = load_checkpoint(experiment.flow_directory() / "model.safetensors").to(device())
    else:
        glow = Glow(**profile.flow).to(device())
        order = torch.randperm(len(train), generator=generator_for(seed, "initialize"))[:256].numpy()
        glow.initialize(prepare(train[order], "initialize"))

    def batch_loss(indices, step):
        return glow.bits_per_dim(prepare(train[indices], "pretrain", step)).mean()

    def validation_loss():
        values = [glow.bits_per_dim(prepare(b, "validation", i)) for i, b in enumerate(batches(val, 50))]
        return torch.cat(values).mean().item()

    groups = [{"params": list(glow.parameters()), "lr": config.lr}]
    summary = fit(glow, groups, batch_loss, validation_loss, config, len(train), seed, directory)
    finish(glow, directory, summary, noisy=noisy, provenance=started, experiment=experiment.names)


def fresh_prox(experiment, network):
    """An untrained prox of this profile's size; a flow's ActNorms are set from training images."""
    prox = PROXES[network].from_config(getattr(experiment.profile, "flow" if network == "glow" else network))
    if network == "glow":
        prox.glow.initialize(to_tensor(experiment.split("train")[:64]))
    return prox


def build_solver(experiment, prox):
    """The untrained solver: K folds that start from the same pre-trained network or each from fresh weights, and x_0 = g(0)
    for flows, 0 for the baselines."""
    method, num_folds = METHODS[prox], experiment.edition.num_folds
    torch.manual_seed(experiment.seed)
    if method.start is None:
        proxes = [fresh_prox(experiment, method.network) for _ in range(num_folds)]
    else:
        if method.start == "denoiser":
            [first] = load_checkpoint(experiment.denoiser_directory(method.network) / "model.safetensors").proxes
        else:
            noisy = method.start == "flow-noisy"
            first = GlowProx(load_checkpoint(experiment.flow_directory(noisy) / "model.safetensors"))
        proxes = [first, *(copy.deepcopy(first) for _ in range(num_folds - 1))]
    with torch.no_grad():
        x0 = proxes[0].glow.mode(64) if method.network == "glow" else torch.zeros(1, 3, 64, 64)
    solver = UnfoldedPGD(proxes, x0, shrinkage=experiment.profile.unfolding_of(prox).shrinkage)
    if method.frozen:
        solver.requires_grad_(False)
        solver.step_size.requires_grad_(True)
    return solver


def parameter_groups(solver, config):
    """The networks and the scalars μ and λ, each with its learning rate; frozen parameters are left out."""
    groups = {"networks": [], "scalars": []}
    for name, parameter in solver.named_parameters():
        if parameter.requires_grad:
            groups["scalars" if name in ("step_size", "shrinkage") else "networks"].append(parameter)
    rates = {"networks": config.lr, "scalars": config.scalar_lr}
    return [{"params": groups[name], "lr": rates[name]} for name in groups if groups[name]]


def train_unfolded(experiment, task, prox):
    """Trains the unfolded solver for one task end to end on the mean squared error to the clean image."""
    solver, config = build_solver(experiment, prox), experiment.profile.unfolding_of(prox)
    _train_solver(experiment, solver, task, prox, config, experiment.directory(task, prox))


def pretrain_denoiser(experiment, network):
    """Trains one prox as a denoiser, the start of the "pre-trained denoiser" rows of Table I: it is a solver of one fold with
    μ = 1 and x_0 = 0, for which x̃ = y."""
    torch.manual_seed(experiment.seed)
    solver = UnfoldedPGD([fresh_prox(experiment, network)], torch.zeros(1, 3, 64, 64), step_size=1.0)
    config, directory = experiment.profile.unfolding_of(network), experiment.denoiser_directory(network)
    _train_solver(experiment, solver, "denoising", network, config, directory)


def _train_solver(experiment, solver, task, prox, config, directory):
    seed, started = experiment.seed, provenance()
    solver.to(device())
    images = experiment.images()
    train, val = (
        to_tensor(experiment.split("train", images)),
        to_tensor(experiment.split("val", images)[: config.val_images]),
    )
    operator = TASKS[task].make_operator(train.shape[-1]).to(device())

    def measured(x, purpose, step=0):
        x = x.to(device())
        return x, operator.measure(x, generator_for(seed, purpose, step))

    def training_pair(indices, step):
        x = mirrored(train[indices], seed, step) if config.mirror else train[indices]
        return measured(x, "measure", step)

    def batch_loss(indices, step):
        x, y = training_pair(indices, step)
        return (solver(y, operator) - x).square().mean()

    def validation_loss():
        losses = []
        for i, batch in enumerate(batches(val, 50)):
            x, y = measured(batch, "validation", i)
            losses.append((solver(y, operator) - x).square().mean(dim=(1, 2, 3)))
        return torch.cat(losses).mean().item()

    def explain(indices, step):
        with torch.no_grad():
            return find_nonfinite_fold(solver(training_pair(indices, step)[1], operator, return_folds=True)[1])

    groups = parameter_groups(solver, config)
    about = dict(task=TASKS[task].name, setting=TASKS[task].setting, prox=prox, experiment=experiment.names)
    try:
        summary = fit(solver, groups, batch_loss, validation_loss, config, len(train), seed, directory, explain)
    except Diverged as error:
        # A run that diverged is a result too: its record says so in the tables.
        size = sum(p.numel() for p in solver.proxes[0].parameters())
        record = about | dict(kind="failed", name=directory.name, reason=str(error), num_parameters=size)
        write_json(directory / "record.json", record | dict(training=error.summary, trained=started))
        (directory / "model.safetensors").unlink(missing_ok=True)  # of an earlier run
        raise
    finish(solver, directory, summary, task=task, prox=prox, provenance=started, experiment=experiment.names)


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
