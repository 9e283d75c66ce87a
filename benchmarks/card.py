"""The paper's size in the minutes that a card is lent for: one command, which resumes.

In this order, each with a deadline: a check that the card computes what a CPU does; the fastest way of
computing coupling nets, unless results/benchmarks has it; then the unfinished trainings of queue(), each with
as many steps as time allows, and evaluated. Nothing starts that cannot finish.

--out holds everything that must not be lost, written after each stage and each minute of training: card.json,
and models and states in few bits (benchmarks/lent.py), 64 MiB at most. On another machine, first copy them:

    cp -r home/. out && python -m benchmarks.card --minutes 14 --out out"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import data
from benchmarks import lent
from benchmarks.recipe import Trial, build, run_of, settings_of
from companion import records
from companion.experiment import Experiment
from companion.files import write_json
from companion.provenance import provenance
from companion.runs import ensure, is_finished
from companion.training import coupling_record, device, fit_solver, model_path
from flowlib import Glow, GlowProx, UnfoldedPGD, save_checkpoint, set_coupling
from flowlib.checkpoints import save_tensors
from flowlib.images import to_tensor
from flowlib.products import METHODS
from flowlib.prox import PROXES
from flowlib.training import Diverged

EVERY, RESERVE = 60, 60  # seconds: between two writings; for an evaluation and its files
RATES = {"muon": 5e-4, "adam": 1e-4}
LEAST = 0.25  # share of a training's steps: with time for less, it is not started
TRIED = 20  # steps of which the time is taken
WRONG = 1e-3  # relative error


def queue(optimizer: str, steps: int) -> dict[str, Trial]:
    """The trainings, in order. steps: of one fold from the flow; four folds have a quarter."""
    rates, tasks = dict(lr=RATES[optimizer], optimizer=optimizer), ("denoising", "inpainting")
    trials = {f"{task}-1-fold": Trial(task, steps, 16, **rates) for task in tasks}
    for task in tasks:
        trials[f"{task}-4-folds"] = Trial(task, steps // 4, 16, num_folds=4, start=f"{task}-1-fold", **rates)
    rival = dict(start=None, num_folds=4, step_size=0.5, clip_norm=1.0, fixed_norms=0.1)
    for network in ("unet", "resnet"):
        for task in tasks:
            trials[f"{task}-{network}"] = Trial(task, steps, 16, 5e-4, network=network, **rival)
    return trials


def error_of(method: str) -> float:
    """The largest relative error of a small flow's gradients on this device, against float64 on the CPU."""

    def gradients(where, method):
        torch.manual_seed(0)
        glow = Glow(num_levels=2, num_steps=2, hidden_channels=64)
        for p in glow.parameters():
            p.data += 0.05 * torch.randn(p.shape)
        x = (torch.rand(4, 3, 16, 16) - 0.5).to(**where).requires_grad_()
        set_coupling(glow.to(**where), method)
        latents, log_det = glow(x)
        loss = glow.inverse([0.9 * z for z in latents])[0].square().sum() + log_det.sum()
        return [g.cpu().double() for g in torch.autograd.grad(loss, [x, *glow.parameters()])]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = gradients(dict(device=device(), dtype=torch.float32), method)
    exact = gradients(dict(device="cpu", dtype=torch.float64), "plain")
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in zip(ours, exact)])
    return errors.nan_to_num(nan=1e9).clamp_max(1e9).max().item()  # JSON has no infinity


class Card:
    """One call of the command: its files, what is known by now, and the time that is left."""

    def __init__(self, experiment, out, minutes, trials):
        self.end = time.monotonic() + 60 * minutes
        self.experiment, self.out, self.trials = experiment, Path(out), trials
        self.work, self.path = experiment.build / "card", self.out / "card.json"
        self.notes = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        flow = experiment.flow()
        self.flow = replace(flow, training=replace(flow.training, checkpoint_minutes=EVERY / 60))

    def left(self):
        return self.end - time.monotonic()

    def note(self, name, **found):
        self.notes[name] = self.notes.get(name, {}) | found
        write_json(self.path, self.notes)

    def places(self, name):
        """(model, resume file) of a training."""
        if name == "flow":
            model = model_path(self.experiment, self.flow)
            return model, model.with_name("resume.safetensors")
        return self.work / f"{name}.safetensors", self.work / name / "resume.safetensors"

    def restore(self):
        """Puts the copied files back in place, where this machine has nothing newer."""
        for name in ("flow", *self.trials):
            model, resume = self.places(name)
            found = None if model.exists() or resume.exists() else lent.fetch(self.out, name)
            if found:
                save_tensors(resume if "state" in found[1] else model, *found)
                if name == "flow" and "state" not in found[1]:
                    write_json(model.with_name("record.json"), self.notes["flow"]["record"])

    def check(self):
        """SystemExit where convolutions are computed wrongly: nothing else is worth a minute then."""
        self.note("check", plain=error_of("plain"), hardware=provenance()["hardware"])
        if not self.notes["check"]["plain"] < WRONG:
            raise SystemExit(f"{self.notes['check']}: this device computes something else than a CPU")

    def choose(self):
        """The fastest way to compute coupling nets, from a record of such a card or measured now."""
        recorded = [path for path in (coupling_record(), self.out / coupling_record().name) if path.exists()]
        if recorded:
            return self.note("coupling", **json.loads(recorded[0].read_text(encoding="utf-8")))
        rows, glow = {}, Glow(**self.experiment.profile.flow)
        glow.initialize(to_tensor(self.experiment.split("train")[:64]))
        solver, trial = UnfoldedPGD([GlowProx(glow)], torch.zeros(1, 3, 64, 64)), Trial("denoising", 1, 16, 1)
        on_card, until = device().type == "cuda", time.monotonic() + min(180, self.left() / 3)
        for method in METHODS if on_card else ("plain", "products"):  # compiling does not pay on a CPU
            try:
                with lent.deadline(min(60, until - time.monotonic())):
                    rows[method] = {"error": error_of(method)}
                    rows[method]["ms_per_step"] = 1000 * self.seconds_per_step(solver, trial, method)
            except (Exception, KeyboardInterrupt) as error:  # the others may serve all the same
                rows[method] = rows.get(method, {}) | {"failed": repr(error)[:500]}
            self.note("coupling", rows=rows)
        right = {m: r["ms_per_step"] for m, r in rows.items() if "failed" not in r and r["error"] < WRONG}
        if not right:
            raise SystemExit(f"a solver trains in no way on this device: {rows}")
        self.note("coupling", choice=min(right, key=right.get), **self.experiment.names, **provenance())
        for folder in [self.out, *([coupling_record().parent] if on_card else [])]:
            write_json(folder / coupling_record().name, self.notes["coupling"])

    def seconds_per_step(self, solver, trial, method):
        """Of a copy of the solver, whose weights stand still."""
        solver = copy.deepcopy(solver).to(device())
        set_coupling(solver, method)
        settings = replace(settings_of(trial), num_steps=2 * TRIED, validate_every=TRIED, val_images=1)
        settings = replace(settings, lr=0, scalar_lr=0, fixed_norms=0, checkpoint_minutes=1e9)
        with tempfile.TemporaryDirectory() as folder:
            summary = fit_solver(self.experiment, run_of(self.experiment, trial), solver, settings, folder)
        first, last = (row["seconds"] for row in summary["history"])
        return (last - first) / TRIED

    def train_flow(self):
        (model, resume), training, coupling = self.places("flow"), self.flow.training, self.notes["coupling"]
        # A step of one fold runs through the flow twice, with 16 images.
        seconds = coupling["rows"][coupling["choice"]]["ms_per_step"] / 1000 / 32
        seconds *= training.num_steps * training.batch_size
        if not resume.exists() and seconds > self.left() - RESERVE:
            return self.note("flow", not_started=f"{seconds:.0f} s are too long")
        record = self.until_the_end("flow", resume, lambda: ensure(self.experiment, self.flow))
        if record and not record.get("kept"):
            self.note("flow", record=record, bits=lent.send(model, self.out, "flow"))

    def until_the_end(self, name, resume, work):
        """The result of work(), or None if its time ran out. Meanwhile its state is saved to --out."""
        try:
            with lent.sending(resume, self.out, name, EVERY, self.note), lent.deadline(self.left() - RESERVE):
                return work()
        except KeyboardInterrupt:
            bits = lent.send(resume, self.out, name) if resume.exists() else 0
            self.note(name, cut=provenance()["date"], bits=bits)
            if self.left() > RESERVE:  # it was somebody's own Ctrl-C
                raise

    def train(self, name):
        """One training of the queue, and its record."""
        experiment, trial, method = self.experiment, self.trials[name], self.notes["coupling"]["choice"]
        model, resume = self.places(name)
        known, started = self.notes.get(name, {}), provenance()
        if "record" in known or "failed" in known or self.left() < 2 * RESERVE:
            return
        if resume.exists():  # which holds the weights
            config = getattr(experiment.profile, trial.network.replace("glow", "flow"))
            proxes = [PROXES[trial.network].from_config(config) for _ in range(trial.num_folds)]
            solver = UnfoldedPGD(proxes, torch.zeros(1, 3, 64, 64))
        else:
            if trial.start == "flow" and not is_finished(experiment, self.flow):
                self.train_flow()
            if trial.start and not self.places(trial.start)[0].exists():
                return self.note(name, not_started=f"{trial.start} is not finished")
            solver = build(experiment, trial, self.work)
            seconds = self.seconds_per_step(solver, trial, method)
            fits = int((self.left() - RESERVE) / (1.1 * seconds))
            if fits < LEAST * trial.num_steps:
                return self.note(name, not_started=f"there is time for {fits} steps alone")
            self.note(name, num_steps=min(fits, trial.num_steps), ms_per_step=1000 * seconds)
        trial = replace(trial, num_steps=self.notes[name]["num_steps"])
        settings = replace(settings_of(trial), max_restarts=3, checkpoint_minutes=EVERY / 60)
        run = replace(run_of(experiment, trial), training=settings, name=name)
        set_coupling(solver.to(device()), method)
        on_card = device().type == "cuda"
        if on_card:
            torch.cuda.reset_peak_memory_stats()

        def work():
            try:
                return fit_solver(experiment, run, solver, settings, resume.parent)
            except Diverged as error:
                self.note(name, failed=str(error), summary=error.summary)

        summary = self.until_the_end(name, resume, work)
        if summary:
            about = {"coupling": method, "trial": asdict(trial), "cut": known.get("cut")}
            about |= {"memory_bytes": torch.cuda.max_memory_allocated() if on_card else None}
            about |= {"card_minutes": summary["seconds"] / 60}
            save_checkpoint(model, solver)
            set_coupling(solver, "plain")  # the operations of which are counted
            record = records.evaluate(experiment, run, solver, summary, started) | about
            self.note(name, record=record, bits=lent.send(model, self.out, name))
            print(f"{name}: {record['psnr']['mean']:.2f} dB, {summary['images_seen']} images", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="in which all must be done")
    parser.add_argument("--out", type=Path, required=True, help="what comes home")
    parser.add_argument("--optimizer", default="muon", choices=RATES)
    parser.add_argument("--steps", type=int, default=6000, help="of one fold, at most")
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--dataset", default="celeba")
    parser.add_argument("--build", default="build")
    args = parser.parse_args(arguments)
    experiment = Experiment(args.profile, args.dataset, build=args.build)
    card = Card(experiment, args.out, args.minutes, queue(args.optimizer, args.steps))
    for name in (experiment.dataset, *(["anime"] if data.sources_of("anime") else [])):
        folder = experiment.build / "data" / name
        if not (folder / "manifest.json").exists():
            data.prepare_named(name, folder)
    card.restore()
    card.check()
    card.choose()
    for name in card.trials:
        card.train(name)


if __name__ == "__main__":
    main()
