"""Training of a flow by likelihood or of a solver by mean squared error: a loop that resumes.

Every random draw of a step comes from a generator seeded by (seed, purpose, step), so a run that was killed
and resumed from its last checkpoint ends with the same weights, to the bit, as an uninterrupted one."""

import copy
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowlib.checkpoints import load_state, load_tensors, save_tensors, without_prefix
from flowlib.files import as_json, write_atomically
from flowlib.graphs import capture
from flowlib.muon import Muon
from flowlib.precision import bf16_pays, set_compute_dtype
from flowlib.ranks import any_rank, average, copy_from_first, rank_and_size

OPTIMIZERS = {"adam": torch.optim.AdamW, "muon": Muon}


@dataclass(frozen=True)
class Training:
    """Settings of one training. lr: the rate of parameter groups that name none. It rises over warmup_steps
    and, with cosine, falls to 0 at num_steps. clip_norm: the largest norm of a gradient (inf: any); patience:
    validations without improvement before it stops; max_restarts: how often a run that broke down resumes
    from its best weights at half the rate. bf16: networks compute in bfloat16 where the machine is faster so
    (precision.bf16_pays); fixed_norms: the last fraction of the steps, from 0 to 1, in which BatchNorm
    normalises by its averages, as it does afterwards; optimizer: "adam" or "muon".

    Raises ValueError for the first setting that has another type or is too small. A subclass with settings of
    its own adds their least values to LEAST."""

    num_steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 50
    cosine: bool = True
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    validate_every: int = 100
    patience: int = 10
    max_restarts: int = 3
    bf16: bool = True
    checkpoint_minutes: float = 5
    fixed_norms: float = 0.0
    optimizer: str = "adam"

    LEAST = dict(num_steps=1, batch_size=1, validate_every=1, clip_norm=1e-12)  # 0 for all others

    def __post_init__(self) -> None:
        for field in (field for field in fields(self) if field.type is not str):
            value, least = getattr(self, field.name), self.LEAST.get(field.name, 0)
            if not isinstance(value, Real if field.type is float else Integral) or not value >= least:
                kind = field.type.__name__
                raise ValueError(f"{field.name} must be of type {kind} and at least {least}, not {value!r}")
            object.__setattr__(self, field.name, field.type(value))  # JSON has no numbers of NumPy
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.fixed_norms > 1:
            raise ValueError(f"fixed_norms is a fraction of the steps, from 0 to 1, not {self.fixed_norms}")


class Diverged(FloatingPointError):
    """A training that broke down more than max_restarts times. message: why; summary: that of fit so far."""

    def __init__(self, message: str, summary: dict) -> None:
        super().__init__(message)
        self.summary = summary


def generator_for(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A torch.Generator seeded by all three arguments; purpose is a word."""
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step]).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(key) >> 1)


def batch_indices(step: int, batch_size: int, num_images: int, seed: int) -> np.ndarray:
    """The images of one step: every epoch is a new permutation, and its incomplete last batch is dropped."""
    epoch, position = divmod(step, num_images // batch_size)
    order = torch.randperm(num_images, generator=generator_for(seed, "epoch", epoch), device="cpu")
    return order[position * batch_size : (position + 1) * batch_size].numpy()


def learning_rate_factor(step: int, settings: Training, restarts: Sequence[dict] = ()) -> float:
    """Linear warm-up, then constant or half a cosine to zero; each restart halves it and warms up again."""
    start = restarts[-1]["step"] if restarts else 0
    warmup = min(1.0, (step - start + 1) / max(1, settings.warmup_steps))
    decay = 0.5 * (1 + math.cos(math.pi * step / settings.num_steps)) if settings.cosine else 1.0
    return warmup * decay * 0.5 ** len(restarts)


def _batch_norms(model):
    """All BatchNorms: of one, two and three dimensions, and over several processes."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _train(model, fixed_norms=False):
    """model.train(), except frozen BatchNorms, whose averages must stay; with fixed_norms, except all."""
    model.train()
    for norm in _batch_norms(model):
        if fixed_norms or norm.affine and not norm.weight.requires_grad:
            norm.eval()


@torch.no_grad()
def recalibrate(model: nn.Module, loss: Callable[..., Tensor], batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Computes BatchNorm's averages anew, from these batches at the present weights. Averages of the training
    lag behind weights that still move, and in a chain of folds the lag multiplies. The model is in training
    mode afterwards."""
    _train(model)
    norms = [norm for norm in _batch_norms(model) if norm.training and norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    for batch in batches if norms else ():
        loss(*batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def fit(
    model: nn.Module,
    groups: list[dict],
    make_batch: Callable[[np.ndarray, int], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    validation_loss: Callable[[], float],
    settings: Training,
    num_images: int,
    seed: int,
    directory: str | Path,
    identity: dict | None = None,
    explain: Callable[..., str | None] | None = None,
) -> dict:
    """Trains model in place to its best weights on validation; returns a summary.

    groups: optimizer parameter groups, their lr by default settings.lr. make_batch(indices, step) draws a
    batch, a tuple of tensors, and ``loss(*batch)`` is a scalar; on a GPU a step is captured as a graph, so
    loss must neither draw nor wait. A BatchNorm whose weights are frozen stays as it is. Writes
    directory/log.csv and, every settings.checkpoint_minutes, at Ctrl-C and at the end, resume.safetensors.
    A training resumes from it; that of another, finished training is replaced. identity: further settings
    of the run, such as the images' hash. A run whose loss or gradient is not finite, or whose validation
    loss is three times its best (worse than a negative best by twice its size), resumes from its best
    weights at half the rate. Where torch.distributed is initialised, every rank calls fit alike: each takes
    its share of every batch, gradients are averaged, rank 0 writes, and the weights are those of one
    process.

    Raises ValueError for fewer images than a batch, a batch that ranks cannot share evenly, a model in
    DistributedDataParallel, or an unfinished resume file of another run; Diverged after settings.max_restarts
    restarts, with ``explain(*batch)``, the place that broke, as the reason."""
    from tqdm.auto import tqdm  # here, so that flowlib needs it only for training

    if num_images < settings.batch_size:
        raise ValueError(f"{num_images} training images are fewer than one batch of {settings.batch_size}")
    rank, num_ranks = rank_and_size()
    if settings.batch_size % num_ranks:
        raise ValueError(f"a batch of {settings.batch_size} images is not shared evenly by {num_ranks} ranks")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("fit averages the gradients of all ranks itself: give it the model, not its DDP")
    groups = [{"lr": settings.lr} | group | {"params": list(group["params"])} for group in groups]
    if not all(isinstance(p, Tensor) for group in groups for p in group["params"]):
        raise ValueError("a group's params must be parameters, as model.parameters() gives, without names")
    options = [group | {"params": len(group["params"])} for group in groups]
    own = asdict(settings) | {"groups": options, "seed": seed, "num_images": num_images} | (identity or {})
    del own["checkpoint_minutes"]  # changes no weight
    run = _Run(model, groups, loss, settings, as_json(own), Path(directory), num_ranks)
    run.resume()
    if num_ranks > 1:
        copy_from_first(list(model.state_dict().values()))
    state, fixed_from = run.state, round((1 - settings.fixed_norms) * settings.num_steps)
    bf16 = settings.bf16 and bf16_pays(run.parameters[0].device.type)
    set_compute_dtype(model, torch.bfloat16 if bf16 else None)
    run.note_precision("bfloat16" if bf16 else "float32")
    device, bar = run.parameters[0].device, dict(desc=Path(directory).name, mininterval=2, disable=rank > 0)
    bar = tqdm(total=settings.num_steps, initial=state["step"], **bar)

    def batch(step):
        whole = make_batch(batch_indices(step, settings.batch_size, num_images, seed), step)
        return tuple(values[rank::num_ranks] for values in whole) if num_ranks > 1 else whole

    def renew_averages():
        recalibrate(model, loss, map(batch, range(state["step"], state["step"] + 16)))
        averages = [b for norm in _batch_norms(model) for b in (norm.running_mean, norm.running_var)]
        if num_ranks > 1 and averages:
            average(averages)

    def stopped():
        return any_rank(bool(interrupted), device) if num_ranks > 1 else bool(interrupted)

    try:
        with bar, _interrupts() as interrupted:
            while not run.finished() and not stopped():
                fixed_norms = state["step"] >= fixed_from
                if state["step"] == fixed_from:
                    renew_averages()
                value = run.step(batch(state["step"]), explain, fixed_norms)
                if state["step"] % settings.validate_every == 0 or state["step"] == settings.num_steps:
                    if not fixed_norms:
                        renew_averages()
                    value = run.validate(validation_loss, value)
                    bar.set_postfix(val_loss=f"{value:.5f}")
                bar.update()
                if rank == 0 and time.monotonic() - run.last_saved >= 60 * settings.checkpoint_minutes:
                    run.save()
            if rank == 0:
                run.save()  # A kill from here on loses no training.
        if stopped():
            raise KeyboardInterrupt(f"saved at step {state['step']}: the same call goes on from there")
        model.load_state_dict(run.best)
        return run.summary()
    finally:
        model.eval()
        set_compute_dtype(model, None)


@contextmanager
def _interrupts() -> Iterator[list]:
    """A list that the first Ctrl-C fills, so that the step can end; a second Ctrl-C interrupts at once."""
    asked, usual = [], signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is usual
    if ours:
        signal.signal(signal.SIGINT, lambda *_: asked.append(signal.signal(signal.SIGINT, usual)))
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)


class _Run:
    """The state of one training: its steps, validations, restarts and files."""

    def __init__(self, model, groups, loss, settings, identity, directory, num_ranks):
        self.num_ranks = num_ranks
        self.model, self.groups, self.loss, self.settings = model, groups, loss, settings
        self.identity, self.directory, self.path = identity, directory, directory / "resume.safetensors"
        self.parameters = [p for group in groups for p in group["params"]]
        self.state = dict(step=0, best_loss=math.inf, best_step=0, seconds=0.0, cpu_seconds=0.0, history=[])
        self.state |= dict(restarts=[], stopped_early=False, precision=[])
        self.best = copy.deepcopy(model.state_dict())
        self.last_saved = time.monotonic()
        self._clocks = {}
        self._tick()
        self._make_optimizer()

    def _make_optimizer(self):
        self._captured = {}  # a step as a CUDA graph; the key: whether norms are fixed in it
        device = self.parameters[0].device
        # The rate is a tensor so that a captured step can read it.
        groups = [group | {"lr": torch.tensor(float(group["lr"]), device=device)} for group in self.groups]
        options = dict(weight_decay=self.settings.weight_decay, capturable=device.type == "cuda")
        self.optimizer = OPTIMIZERS[self.settings.optimizer](groups, fused=True, **options)

    def note_precision(self, name):
        """For the record: a run that moved to another machine may have had both precisions."""
        if name not in self.state["precision"]:
            self.state["precision"].append(name)

    def finished(self):
        return self.state["step"] >= self.settings.num_steps or self.state["stopped_early"]

    def step(self, batch, explain, fixed_norms=False):
        """One step of the optimizer; the loss."""
        factor = learning_rate_factor(self.state["step"], self.settings, self.state["restarts"])
        for group, given in zip(self.optimizer.param_groups, self.groups):
            group["lr"].fill_(given["lr"] * factor)
        _train(self.model, fixed_norms)
        if self.parameters[0].device.type == "cuda":
            if fixed_norms not in self._captured:
                update = capture(self._update, batch, self.model, self.optimizer)
                self._captured = {fixed_norms: update}
            outputs = self._captured[fixed_norms](batch)
        else:
            outputs = self._update(batch)
        loss, norm = (value.item() for value in outputs)
        if not math.isfinite(loss + norm):
            where = (explain and explain(*batch)) or "the gradient"
            self._restart(f"loss {loss:.4g}, gradient norm {norm:.4g}; first not finite: {where}")
        self.state["step"] += 1
        return loss

    def _update(self, batch):
        """The loss, and the norm of its gradient. If that is not finite, the optimizer changes no weight."""
        self.optimizer.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        loss = loss.detach()
        if self.num_ranks > 1:
            average([loss, *(p.grad for p in self.parameters if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.optimizer.found_inf = (~torch.isfinite(loss + norm)).float()
        self.optimizer.step()
        return loss, norm

    def validate(self, validation_loss, loss):
        """Keeps the best weights, or starts again from them if the model broke down; the validation loss."""
        state, settings = self.state, self.settings
        self.model.eval()
        with torch.no_grad():
            value = torch.tensor(float(validation_loss()), device=self.parameters[0].device)
        if self.num_ranks > 1:  # all must decide alike
            copy_from_first([value])
        value = value.item()
        if value < state["best_loss"]:
            state |= dict(best_loss=value, best_step=state["step"])
            self.best = copy.deepcopy(self.model.state_dict())
        elif not value <= state["best_loss"] + 2 * abs(state["best_loss"]):  # a loss may be negative
            self._restart(f"validation loss {value:.4g} after {state['best_loss']:.4g}")
        patience = settings.patience * settings.validate_every
        state["stopped_early"] = state["step"] - state["best_step"] >= patience
        self._tick()
        row = dict(step=state["step"], images_seen=state["step"] * settings.batch_size, loss=loss)
        row |= dict(val_loss=value) | {k: round(state[k], 2) for k in self._clocks}
        # JSON has no infinities.
        state["history"].append({k: v if math.isfinite(v) else None for k, v in row.items()})
        lines = [state["history"][0], *(row.values() for row in state["history"])]
        text = "".join(",".join("" if v is None else str(v) for v in line) + "\n" for line in lines)
        if rank_and_size()[0] == 0:
            write_atomically(self.directory / "log.csv", lambda path: path.write_text(text, encoding="utf-8"))
        return value

    def _restart(self, reason):
        """Back to the best weights, with half the rate and a warm-up; or Diverged."""
        state = self.state
        if len(state["restarts"]) == self.settings.max_restarts:
            advice = "Lower the learning rate, or start from a flow with the 'tanh' scale rule"
            raise Diverged(f"step {state['step']}: {reason}. {advice}", self.summary())
        state["restarts"].append({"step": state["step"], "reason": reason})
        self.model.load_state_dict(self.best)
        self._make_optimizer()

    def _tick(self):
        now = {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}
        for key, value in now.items():
            self.state[key] += value - self._clocks.get(key, value)
        self._clocks = now

    def summary(self):
        """The record of a training: its settings, history, restarts, times."""
        state, names = self.state, {"step": "steps", "best_loss": "best_val_loss"}
        summary = {names.get(key, key): value for key, value in state.items()}
        summary["best_val_loss"] = state["best_loss"] if math.isfinite(state["best_loss"]) else None
        images = state["step"] * self.settings.batch_size
        about = {"training": asdict(self.settings), "images_seen": images, "num_ranks": self.num_ranks}
        return about | summary

    def save(self):
        self._tick()
        parts = {"model": self.model.state_dict(), "best": self.best}
        parts |= {f"optimizer.{i}": moments for i, moments in self.optimizer.state_dict()["state"].items()}
        tensors = {f"{part}.{key}": v for part, values in parts.items() for key, v in values.items()}
        header = {"identity": self.identity, "state": self.state, "finished": self.finished()}
        save_tensors(self.path, tensors, header)
        self.last_saved = time.monotonic()

    def resume(self):
        """Loads the resume file, if there is one; that of a finished run with other settings is ignored."""
        if not self.path.exists():
            return
        tensors, header = load_tensors(self.path)
        saved = header.get("identity") or {}
        other = [key for key in self.identity | saved if saved.get(key) != self.identity.get(key)]
        if other and header.get("finished"):
            return
        if other:
            what = ", ".join(f"{key} was {saved.get(key)}, is {self.identity.get(key)}" for key in other)
            advice = "set it back, or choose another directory; or delete the file, to start anew"
            raise ValueError(f"{self.path} is of a run with other settings or images ({what}): {advice}")
        self.state |= header["state"]
        load_state(self.model, without_prefix(tensors, "model."), self.path)
        self.best = {k: v.to(self.best[k].device) for k, v in without_prefix(tensors, "best.").items()}
        saved = self.optimizer.state_dict()
        for key, value in without_prefix(tensors, "optimizer.").items():
            index, name = key.split(".")
            if name != "step":  # the fused optimizer reads memory in the order of its parameter
                value = torch.empty_like(self.parameters[int(index)]).detach().copy_(value)
            saved["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(saved)
