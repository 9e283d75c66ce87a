"""Training: a run that was killed resumes to the same weights, settings are checked, non-finite losses name
the fold."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from companion import results, runs, tables, training
from companion.experiment import Experiment
from companion.settings import Training as BookTraining
from companion.training import build_solver, model_path
from flowlib import Glow, ResNetProx, UNetProx, load_checkpoint
from flowlib.checkpoints import load_tensors, save_tensors
from flowlib.muon import Muon, nearest_orthogonal
from flowlib.operators import Denoising
from flowlib.training import (
    Diverged,
    Training,
    _train,
    batch_indices,
    fit,
    generator_for,
    learning_rate_factor,
    recalibrate,
)
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke experiment with a few prepared faces and a flow."""
    experiment = Experiment("smoke", build=tmp_path_factory.mktemp("build"))
    data.prepare_synthetic(experiment.build / "data" / "synthetic", num_images=40)
    runs.ensure(experiment, experiment.flow())
    return experiment


def changed(run, **settings):
    """The run with other settings of its training."""
    return replace(run, training=replace(run.training, **settings))


def test_batch_norm_is_recalibrated_to_the_present_weights():
    """Averages of other weights are forgotten; those of these batches take their place."""
    torch.manual_seed(0)
    net = UNetProx(width=2)
    norm = net.down[0][1]
    norm.running_mean.fill_(50.0)  # of weights long gone
    x = torch.rand(24, 3, 16, 16, generator=generator_for(0, "x")) - 0.5
    before = {name: p.clone() for name, p in net.named_parameters()}
    recalibrate(net, lambda x: net(x).square().mean(), [(batch,) for batch in x.split(8)])
    with torch.no_grad():
        features = torch.stack([net.down[0][0](batch).mean(dim=(0, 2, 3)) for batch in x.split(8)])
    torch.testing.assert_close(norm.running_mean, features.mean(0))
    assert norm.momentum == 0.1
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in net.named_parameters())
    with torch.no_grad():
        evaluated, as_trained = net.eval()(x), net.train()(x)
    assert (as_trained - evaluated).std() < 0.1 * as_trained.std()  # but for the batches' own spread


def test_a_flow_is_recalibrated_without_a_batch():
    recalibrate(Glow(num_levels=1, num_steps=1, hidden_channels=4), None, iter(lambda: 1 / 0, None))


RUN = """
import json, sys
from companion.experiment import Experiment
from companion.training import train
from flowlib.checkpoints import save_checkpoint
from tests.test_training import changed
experiment = Experiment("smoke", build=sys.argv[1])
run = changed(experiment.solver("inpainting", sys.argv[2]), **json.loads(sys.argv[3]))
model, summary = train(experiment, run)
save_checkpoint(sys.argv[4], model, steps=summary["steps"])
"""


@pytest.mark.parametrize("method,optimizer", [("glow", "muon"), ("unet", "adam")])
def test_a_killed_run_resumes_to_the_same_weights(smoke, tmp_path, method, optimizer):
    """One run is killed with SIGKILL after some steps and started again; another is left alone."""
    steps = 8
    changes = dict(num_steps=steps, checkpoint_minutes=0, optimizer=optimizer)
    run = changed(smoke.solver("inpainting", method), **changes)
    command = [sys.executable, "-c", RUN, str(smoke.build), method, json.dumps(changes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "alone")], env=environment, check=True)
    uninterrupted, _ = load_tensors(tmp_path / "alone")
    resume = smoke.directory(run) / "resume.safetensors"
    resume.unlink()

    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
    while not resume.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_tensors(resume)[1]["state"]["step"] < steps
    subprocess.run([*command, str(tmp_path / "killed")], env=environment, check=True)
    resumed, header = load_tensors(tmp_path / "killed")
    assert header["info"]["steps"] == steps and resume.exists()  # until its record is written
    assert all(torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted)


def test_foreign_resume_files_are_refused(smoke):
    run = changed(smoke.solver("denoising", "resnet"), num_steps=2)
    resume = smoke.directory(run) / "resume.safetensors"
    resume.parent.mkdir(parents=True)
    save_tensors(resume, {"x": torch.zeros(1)}, {"identity": {}, "finished": False})
    with pytest.raises(ValueError, match="other settings or images .*lr was None, is .*delete the file"):
        training.train(smoke, run)
    resume.unlink()


def small_fit(directory, steps=12, at_step=lambda step: None, **changes):
    """(weights, summary) of a fit of a linear layer; at_step is called before every step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    x = torch.rand(8, 2, generator=generator_for(0, "x"))

    def make_batch(indices, step):
        at_step(step)
        return (x[indices],)

    def loss(x):
        return model(x).square().mean()

    settings = dict(num_steps=steps, batch_size=2, lr=0.1, validate_every=3) | changes.pop("settings", {})
    groups = [{"params": list(model.parameters()), "lr": changes.pop("rate", 0.1)}]
    arguments = dict(num_images=8, seed=0, identity=None, validation_loss=lambda: loss(x)) | changes
    functions = (model, groups, make_batch, loss)
    summary = fit(*functions, settings=Training(**settings), directory=directory, **arguments)
    return model.state_dict(), summary


@pytest.fixture(autouse=True)
def keyboard():
    """A process that was started in the background ignores Ctrl-C."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize("where", [4, 11])
def test_what_ctrl_c_stops_goes_on_where_it_was(tmp_path, where):
    whole, _ = small_fit(tmp_path / "whole")
    models = []

    def interrupt(step):
        if step == where:
            signal.raise_signal(signal.SIGINT)

    class Seen(torch.nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            models.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn, "Linear", Seen)
        with pytest.raises(KeyboardInterrupt, match=f"saved at step {where + 1}"):
            small_fit(tmp_path / "stopped", at_step=interrupt)
    assert not models[0].training and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    resumed, _ = small_fit(tmp_path / "stopped", at_step=seen.append)
    assert all(step > where for step in seen)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_what_fails_leaves_no_compute_dtype(tmp_path):
    glow = Glow(num_levels=1, num_steps=1, hidden_channels=4)
    groups = [{"params": list(glow.parameters()), "lr": 0.1}]
    settings = Training(num_steps=2, batch_size=1, lr=0.1)
    before = [getattr(module, "compute_dtype", None) for module in glow.modules()]
    with pytest.raises(ZeroDivisionError):
        fit(glow, groups, lambda i, step: 1 / 0, None, None, settings, 4, 0, tmp_path)
    assert [getattr(module, "compute_dtype", None) for module in glow.modules()] == before
    assert not glow.training


def test_numbers_of_numpy_and_tuples_are_as_good_as_any(tmp_path):
    identity = {"size": np.int64(3), "crop": (1, 2), "mean": torch.tensor(0.5)}
    _, expected = small_fit(tmp_path / "a", identity=identity)
    changes = dict(num_images=np.int64(8), seed=np.int64(0), settings=dict(lr=np.float32(0.1)))
    small_fit(tmp_path / "b", identity=identity, **changes)
    assert isinstance(expected["best_val_loss"], float)
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "c", at_step=lambda step: signal.raise_signal(signal.SIGINT), identity=identity)
    _, found = small_fit(tmp_path / "c", identity=identity, settings=dict(checkpoint_minutes=1))  # goes on
    assert found["best_val_loss"] == expected["best_val_loss"]
    with pytest.raises(TypeError, match="PosixPath|WindowsPath"):
        small_fit(tmp_path / "d", at_step=lambda step: 1 / 0, identity={"folder": tmp_path})


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(rate=0.2), "groups was .*'lr': 0.1.*, is .*'lr': 0.2"),
        (dict(settings=dict(batch_size=4)), "batch_size was 2, is 4"),
        (dict(identity={"pixels": "b"}), "pixels was None, is b"),
    ],
)
def test_the_setting_that_differs_is_named(tmp_path, change, message):
    def interrupt(step):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path, at_step=interrupt)
    with pytest.raises(ValueError, match=message):
        small_fit(tmp_path, **change)
    resume = tmp_path / "resume.safetensors"
    for content in (b"", resume.read_bytes()[:-20]):
        resume.write_bytes(content)
        with pytest.raises(ValueError, match="resume.safetensors .*truncated.*delete it"):
            small_fit(tmp_path)


@pytest.mark.parametrize(
    "name,value",
    [
        *((name, 0) for name in ("num_steps", "batch_size", "validate_every", "val_images")),
        *((name, -1) for name in ("num_steps", "lr", "scalar_lr", "patience", "checkpoint_minutes")),
        *(
            ("num_steps", 2.5),
            ("lr", "fast"),
            ("lr", math.nan),
            ("mirror", "no"),
            ("shrinkage", -2),
            ("clip_norm", 0),
        ),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be of type .* and at least .*, not {value!r}"):
        BookTraining(**dict(num_steps=1, batch_size=1, lr=0.1) | {name: value})


def test_unknown_optimizers_and_parts_are_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adam, muon, not 'sgd'"):
        Training(num_steps=1, batch_size=1, lr=0.1, optimizer="sgd")
    with pytest.raises(ValueError, match="fixed_norms is a fraction of the steps"):
        Training(num_steps=1, batch_size=1, lr=0.1, fixed_norms=1.5)


def test_a_resume_file_of_other_images_is_refused(smoke, tmp_path):
    """The same settings, the same number of images, other pixels."""
    run = changed(smoke.solver("denoising", "resnet"), num_steps=3, checkpoint_minutes=0)
    training.train(smoke, run)
    resume = smoke.directory(run) / "resume.safetensors"
    tensors, header = load_tensors(resume)
    other = Experiment("smoke", build=tmp_path)
    data.prepare_synthetic(other.build / "data" / "synthetic", num_images=40, seed=1)
    save_tensors(other.directory(run) / "resume.safetensors", tensors, header | {"finished": False})
    with pytest.raises(ValueError, match="other settings or images"):
        training.train(other, run)
    resume.unlink()


def test_training_lowers_the_loss(smoke):
    run = changed(
        smoke.solver("denoising", "resnet"), num_steps=40, validate_every=10, warmup_steps=1, lr=1e-2
    )
    losses = [row["val_loss"] for row in training.train(smoke, run)[1]["history"]]
    assert losses[-1] < 0.8 * losses[0]


def test_early_stopping_keeps_the_best(smoke):
    settings = dict(num_steps=50, lr=0.0, scalar_lr=0.0, validate_every=1, patience=3)
    summary = training.train(smoke, changed(smoke.solver("denoising", "glow"), **settings))[1]
    assert summary["stopped_early"] and summary["best_step"] == 1 and summary["steps"] == 4


def test_a_loss_that_is_not_finite_names_the_fold(smoke, monkeypatch):
    def broken(*args):
        solver = build_solver(*args)
        with torch.no_grad():
            solver.proxes[2].glow.levels[0][0].actnorm.log_scale.fill_(1e4)
        return solver

    monkeypatch.setattr(training, "build_solver", broken)
    run = changed(smoke.solver("inpainting", "glow"), num_steps=2, max_restarts=0)
    with pytest.raises(Diverged, match="step 0: .* fold 3: the proximal mapping"):
        training.train(smoke, run)
    record = runs.ensure(smoke, run)
    assert record["kind"] == "failed" and record["training"]["steps"] == 0 and "fold 3" in record["reason"]
    row = next(
        r
        for r in tables.table(results.load([record]), "I", "v2")
        if (r["Task"], r["Method"]) == ("inpainting", "GLOW prox")
    )
    made = results.load([record], of_build=True)
    assert row["Ours, dB"] == "diverged"
    assert tables.provenance_rows(made, results.load([]))[0]["Steps"] == 0


def test_a_run_that_falls_apart_goes_on_from_its_best_weights(tmp_path):
    """Once by a loss that is not finite, once by a validation loss that explodes; the weights do not
    remember it."""
    model = torch.nn.Linear(1, 1)
    settings = Training(num_steps=12, batch_size=1, lr=0.1, warmup_steps=1, validate_every=2, bf16=False)
    seen = []

    def make_batch(indices, step):
        return (torch.tensor(math.nan if step == 5 else 1.0),)

    def loss(factor):
        seen.append(model.weight.item())
        return model.weight.square().sum() * factor

    def validation_loss():
        return 1e6 if len(seen) == 8 else model.weight.square().item()

    groups = [{"params": [model.weight], "lr": 0.1}]
    summary = fit(model, groups, make_batch, loss, validation_loss, settings, 1, 0, tmp_path)
    assert [restart["step"] for restart in summary["restarts"]] == [5, 8]
    assert "not finite" in summary["restarts"][0]["reason"] and "1e+06" in summary["restarts"][1]["reason"]
    best_at_4 = summary["history"][1]["val_loss"]
    assert seen[6] ** 2 == pytest.approx(best_at_4) and summary["steps"] == 12
    # At half the rate: Adam's first step is of the size of the rate.
    assert abs(seen[7] - seen[6]) < 0.6 * abs(seen[1] - seen[0])
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(
            model,
            groups,
            make_batch,
            lambda _: model.weight.sum() * math.nan,
            lambda: 0.0,
            settings,
            1,
            0,
            tmp_path / "b",
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_negative_loss_may_rise_and_fall(tmp_path, sign):
    """A log-likelihood or a PSNR as the loss: what is three times the best of a positive one."""
    values = iter([-5.0, -4.9, -4.95, 6.0] if sign < 0 else [5.0, 14.9, 4.0, 12.1])
    _, summary = small_fit(tmp_path, validation_loss=lambda: next(values))
    assert [restart["step"] for restart in summary["restarts"]] == [12]


def test_frozen_batch_norms_stay_as_they_are(tmp_path):
    net, x = ResNetProx(4, 1), torch.rand(8, 3, 8, 8)
    free = torch.nn.Parameter(torch.ones(()))
    net(x)
    net.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = Training(num_steps=2, batch_size=2, lr=0.1, validate_every=1)
    model = torch.nn.Module()
    model.net, model.free = net, free

    def loss(batch):
        return (free * net(batch)).square().mean()

    groups = [{"params": (p for p in [free])}]  # a generator, and no rate of its own, as torch.optim takes
    fit(model, groups, lambda i, _: (x[i],), loss, lambda: loss(x), settings, 8, 0, str(tmp_path))
    assert free != 1 and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "kind", [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm]
)
def test_every_kind_of_batch_norm_is_known(kind):
    """Frozen ones stay, others are recalibrated, and all are fixed where that is asked for."""
    net = torch.nn.Sequential(kind(2), kind(2, affine=False))
    net[0].requires_grad_(False)
    _train(net)
    assert [norm.training for norm in net] == [False, True]
    _train(net, fixed_norms=True)
    assert not any(norm.training for norm in net)
    seen = []
    recalibrate(net, lambda *_: seen.append(net[1].momentum), [()] * 3)
    assert seen == [None] * 3 and net[1].momentum == 0.1


def test_norms_are_fixed_in_the_last_part(tmp_path):
    """A BatchNorm then normalises as in evaluation, by averages made of the weights at that moment."""
    net, modes, averages = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1)), [], []

    def loss(x):
        modes.append(net[1].training)
        averages.append(net[1].running_mean.item())
        return (net(x) - x).square().mean()

    def make_batch(indices, step):
        return (torch.randn(8, 1, generator=generator_for(0, "x", step)),)

    settings = Training(num_steps=10, batch_size=8, lr=0.1, validate_every=10, bf16=False, fixed_norms=0.4)
    fit(net, [{"params": net.parameters()}], make_batch, loss, lambda: 1.0, settings, 8, 0, tmp_path)
    # six steps, 16 batches for the averages, four steps
    assert modes == [True] * 22 + [False] * 4
    assert len(set(averages[:22])) == 21 and len(set(averages[22:])) == 1  # 0 at the start and made anew


def test_a_kill_among_fixed_norms_changes_nothing(tmp_path, monkeypatch):
    """A run that was stopped before, at and after norms are fixed ends with the same weights."""
    steps = dict(num_steps=10, batch_size=4, validate_every=5, fixed_norms=0.5)
    settings = Training(**steps, lr=0.1, bf16=False, checkpoint_minutes=0)

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

        def make_batch(indices, step):
            seen.append(step)
            if step == stop_at:
                raise KeyboardInterrupt
            return (torch.randn(4, 1, generator=generator_for(0, "x", step)),)

        groups, seen = [{"params": net.parameters()}], []
        loss = lambda x: (net(x) - x).square().mean()  # noqa: E731
        try:
            fit(net, groups, make_batch, loss, lambda: -seen[-1], settings, 4, 0, folder)
        except KeyboardInterrupt:
            pass
        return net.state_dict()

    whole = run(tmp_path / "whole")
    monkeypatch.setattr("flowlib.training.recalibrate", lambda *_: None)  # its batches would stop it, too
    plain = run(tmp_path / "plain")
    assert any(not torch.equal(whole[key], plain[key]) for key in whole)  # the averages matter
    for stop_at in (4, 5, 7):
        run(tmp_path / str(stop_at), stop_at)
        stopped = run(tmp_path / str(stop_at))
        assert all(torch.equal(plain[key], stopped[key]) for key in plain)


EVERY_PRECISION = """
import sys, tempfile, torch
from flowlib import Denoising, Glow, GlowProx, UNetProx, UnfoldedPGD, set_memory
from flowlib.precision import bf16_pays
from flowlib.training import Training, fit
glow = Glow(num_levels=2, num_steps=1, hidden_channels=32)
operator, x = Denoising(0.2), torch.rand(8, 3, 16, 16) - 0.5
for prox, memory in ((GlowProx(glow), "plain"), (GlowProx(glow), "reversible"), (UNetProx(width=4), "plain")):
    solver = UnfoldedPGD([prox], torch.zeros(1, 3, 16, 16))
    set_memory(solver, memory)
    error = lambda x: (solver(operator.measure(x), operator) - x).square().mean()
    settings = Training(num_steps=2, batch_size=4, lr=1e-3, validate_every=1)
    groups, rest = [{"params": solver.parameters()}], (settings, 8, 0, tempfile.mkdtemp())
    summary = fit(solver, groups, lambda i, step: (x[i],), error, lambda: error(x), *rest)
    assert summary["steps"] == 2 and not summary["restarts"]
    assert summary["precision"] == ["bfloat16" if bf16_pays() else "float32"]
print(bf16_pays())
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", ""])
def test_a_training_works_on_every_processor(isa):
    """With its default settings: in bfloat16 only where the processor is faster so."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    command = [sys.executable, "-W", "ignore", "-c", EVERY_PRECISION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isa != "AVX2" or done.stdout.strip() == "False"


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    """Of kernels alone; the rest are AdamW's. Both scale with the rate."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 20, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    near = nearest_orthogonal(matrices)
    torch.testing.assert_close(nearest_orthogonal(matrices.mT), near.mT)
    assert (torch.linalg.svdvals(near) - 1).abs().max() < 0.35
    assert (u @ v - near).abs().max() < 0.2
    nets = [torch.nn.Conv2d(3, 8, 3).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    before, x = nets[0].weight.detach().clone(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for net, optimizer in zip(nets, (Muon, torch.optim.AdamW)):
        optimizer = optimizer([{"params": net.parameters(), "lr": torch.tensor(1e-2)}], weight_decay=0.0)
        net(x).square().sum().backward()
        gradient = net.weight.grad.flatten(1)
        optimizer.step()
    expected = before - 1e-2 * 0.2 * 27**0.5 * nearest_orthogonal(gradient[None])[0].view_as(before)
    torch.testing.assert_close(nets[0].weight.detach(), expected)
    assert torch.equal(nets[0].bias, nets[1].bias) and not torch.equal(nets[0].weight, nets[1].weight)


def test_what_fit_cannot_train_is_named(tmp_path):
    net = torch.nn.Linear(1, 1)
    settings, rest = Training(num_steps=1, batch_size=1, lr=0.1), (None, None, None)
    with pytest.raises(ValueError, match="without names"):
        fit(net, [{"params": net.named_parameters()}], *rest, settings, 8, 0, tmp_path)
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match="averages the gradients"):
        fit(wrapped, [], *rest, settings, 8, 0, tmp_path)


def test_noisy_pretraining_goes_on_from_the_clean_flow(smoke):
    runs.ensure(smoke, smoke.flow(noisy=True))
    clean, noisy = (load_checkpoint(model_path(smoke, smoke.flow(n))) for n in (False, True))
    w, v = clean.levels[0][0].invconv.weight, noisy.levels[0][0].invconv.weight
    assert 0 < (w - v).abs().max() < 0.05


def test_what_each_method_starts_from_and_trains(smoke):
    flow = load_checkpoint(model_path(smoke, smoke.flow())).state_dict()
    frozen = changed(smoke.solver("inpainting", "glow-frozen"), num_steps=2, warmup_steps=1)
    pretrained = [build_solver(smoke, run) for run in (smoke.solver("inpainting", "glow"), frozen)]
    for solver in pretrained:
        assert all(torch.equal(flow[k], fold.glow.state_dict()[k]) for fold in solver.proxes for k in flow)
    fresh = build_solver(smoke, smoke.solver("inpainting", "glow-scratch"))
    weights = [fold.glow.levels[0][0].invconv.weight for fold in fresh.proxes]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(
        weights[0], flow["levels.0.0.invconv.weight"]
    )
    assert fresh.proxes[0].glow.initialized

    before = {k: v.clone() for k, v in pretrained[1].state_dict().items()}
    after = training.train(smoke, frozen)[0].state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"step_size"}


def test_baselines_start_from_a_denoiser(smoke):
    runs.ensure(smoke, smoke.denoiser("resnet"))
    denoiser = load_checkpoint(model_path(smoke, smoke.denoiser("resnet")))
    y = torch.rand(2, 3, 64, 64) - 0.5
    denoiser.step_size.data.fill_(1.0)
    torch.testing.assert_close(denoiser(y, Denoising(0.2)), denoiser.proxes[0](y))
    for fold in build_solver(smoke, smoke.solver("inpainting", "resnet-denoiser")).proxes:
        assert all(torch.equal(v, fold.state_dict()[k]) for k, v in denoiser.proxes[0].state_dict().items())


def test_every_row_of_the_paper_is_trained_by_the_full_profiles():
    for edition, name in results.PAPER_TABLES:
        full = Experiment("cpu", "celeba", edition)
        trained = {(run.task, run.method) for run in full.runs().values()}
        assert set(results.paper_table(name, edition)) <= trained


def test_epochs_are_permutations():
    seen = torch.cat([torch.from_numpy(batch_indices(step, 4, 18, seed=1)) for step in range(4)])
    assert len(set(seen.tolist())) == 16
    again = torch.cat([torch.from_numpy(batch_indices(step, 4, 18, seed=1)) for step in range(4, 8)])
    assert seen.tolist() != again.tolist()


def test_generators_differ_by_seed_purpose_and_step():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    draws = [torch.rand(1, generator=generator_for(*key)).item() for key in keys]
    assert len(set(draws)) == 4 and draws[0] == torch.rand(1, generator=generator_for(*keys[0])).item()


def test_learning_rate_rises_then_falls():
    settings = Experiment("demo").profile.pretraining
    factors = [learning_rate_factor(step, settings) for step in range(settings.num_steps)]
    peak = factors.index(max(factors))
    assert factors[0] < 0.05 and peak <= settings.warmup_steps and factors[-1] < 1e-3


def test_missing_data_and_names_are_named(tmp_path):
    empty = Experiment("smoke", "mine", build=tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m companion prepare"):
        runs.ensure(empty, empty.flow())
    with pytest.raises(
        ValueError,
        match="unknown profile 'big'; choose one of: smoke, demo, short, cpu, gpu, paper, gpu-longer",
    ):
        Experiment("big")
    with pytest.raises(ValueError, match="unknown override 'rate'; choose one of: num_folds"):
        Experiment("smoke", rate=1)


@pytest.mark.parametrize(
    "override, message",
    [
        *(
            (dict(num_folds=n), f"num_folds must be a whole number of at least 1, not {n}")
            for n in (0, 2.5, -1)
        ),
        (dict(lr="fast"), "lr must be a number of at least 0"),
        (dict(num_steps=2.5), "num_steps must be a whole number"),
        (dict(batch_size=0), "batch_size must be .* at least 1"),
        (dict(flow={"num_level": 3}), "unknown setting of flow 'num_level'; choose one of: .*num_levels"),
        (dict(flow={"num_levels": 3, "num_steps": "two", "hidden_channels": 8}), "describes no network"),
        (dict(flow="{num_levels: 3}"), "flow must be a mapping of its settings.*papermill: -y"),
        (dict(unet={"width": -1}), "unet=.* describes no network"),
    ],
)
def test_overrides_are_checked_before_any_work(override, message):
    with pytest.raises(ValueError, match=message):
        Experiment("smoke", **override)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a step is captured there alone")
def test_a_captured_step_equals_a_plain_one(tmp_path, monkeypatch):
    """Weights, losses and the best validation after a few steps, one of which is not finite."""

    def trained(folder):
        torch.manual_seed(0)
        glow = Glow(num_levels=2, num_steps=2, hidden_channels=16).cuda()
        x = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
        glow.initialize(x.cuda())

        def make_batch(indices, step):
            return x[indices].cuda(), torch.tensor(math.nan if step == 3 else 1.0, device="cuda")

        settings = Training(num_steps=8, batch_size=8, lr=1e-3, warmup_steps=2, validate_every=2, bf16=False)
        groups = [{"params": list(glow.parameters()), "lr": settings.lr}]
        functions = (make_batch, lambda x, factor: glow.bits_per_dim(x).mean() * factor)
        validate = lambda: glow.bits_per_dim(x.cuda()).mean().item()  # noqa: E731
        summary = fit(glow, groups, *functions, validate, settings, len(x), 0, tmp_path / folder)
        return glow.state_dict(), summary

    captured, summary = trained("captured")

    monkeypatch.setattr("flowlib.training.capture", lambda update, *_: update)
    plain, expected = trained("plain")
    assert [r["step"] for r in summary["restarts"]] == [r["step"] for r in expected["restarts"]] == [3]
    assert summary["best_val_loss"] == pytest.approx(expected["best_val_loss"], rel=1e-4)
    for key, value in captured.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)
