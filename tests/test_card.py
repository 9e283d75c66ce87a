"""The command for the minutes of a lent card, rehearsed: deadlines, a kill, another machine."""

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import data
from benchmarks import card, lent
from companion.experiment import Experiment
from companion.runs import ensure
from companion.settings import Training
from companion.training import build_solver, fit_solver
from flowlib.checkpoints import load_tensors, save_tensors
from tests.conftest import ROOT


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A folder of a build with drawn faces, and a clock for mice."""
    for name, number in {"synthetic": 40, "synthetic-ood": 6}.items():
        style = "ood" if number == 6 else "natural"
        data.prepare_synthetic(tmp_path / "build/data" / name, num_images=number, style=style)
    for name, value in {"EVERY": 0.2, "RESERVE": 0.5, "TRIED": 2}.items():
        monkeypatch.setattr(card, name, value)
    return tmp_path / "build"


def only(monkeypatch, *names):
    whole = card.queue
    monkeypatch.setattr(card, "queue", lambda *a: {n: t for n, t in whole(*a).items() if n in names})


def call(build, out, minutes=5.0, steps=8, optimizer="muon"):
    options = dict(minutes=minutes, out=out, steps=steps, optimizer=optimizer, profile="smoke")
    options |= dict(dataset="synthetic", build=build)
    card.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    return json.loads((out / "card.json").read_text())


def another_machine(build):
    """Which has the images, and nothing else."""
    for folder in ("card", "runs"):
        shutil.rmtree(build / folder, ignore_errors=True)


def forbid(monkeypatch, *names):
    def called(*_):
        raise AssertionError("this is done already")

    for name in names:
        monkeypatch.setattr(card, name, called)


def test_from_nothing_to_records(build, tmp_path, monkeypatch):
    names = ["denoising-1-fold", "denoising-4-folds"]
    only(monkeypatch, *names)
    notes = call(build, tmp_path / "out", steps=4)
    assert notes["check"]["plain"] < card.WRONG and notes["coupling"]["choice"] in ("plain", "products")
    for name, folds, images in zip(names, (1, 4), (64, 16)):
        record = notes[name]["record"]
        assert record["num_folds"] == folds and record["training"]["images_seen"] == images
        assert len(record["psnr"]["values"]) == 8 and len(record["ood_images"]["psnr"]["values"]) == 6
        assert record["card_minutes"] > 0 and record["trial"]["num_steps"] == record["training"]["steps"]
    another_machine(build)
    forbid(monkeypatch, "ensure", "fit_solver")  # what came home is enough
    assert call(build, tmp_path / "out")["denoising-1-fold"] == notes["denoising-1-fold"]


def test_what_is_cut_goes_on_elsewhere(build, tmp_path, monkeypatch):
    only(monkeypatch, "denoising-1-fold")
    monkeypatch.setattr(card.Card, "seconds_per_step", lambda *_: 1e-4)
    steps, whole = [], card.fit_solver

    def fit_solver(experiment, run, solver, *arguments):
        def loss(x, y, operator):
            steps.append(len(steps))
            if len(steps) == 5:
                signal.raise_signal(signal.SIGALRM)  # the deadline
            return (solver(y, operator) - x).square().mean()

        return whole(experiment, run, solver, *arguments, loss=loss)

    monkeypatch.setattr(card, "fit_solver", fit_solver)
    monkeypatch.setattr(card.Card, "left", lambda self: 0.2 if len(steps) == 5 else 100)
    cut = call(build, tmp_path / "out", steps=12)["denoising-1-fold"]
    assert cut["num_steps"] == 12 and len(steps) == 5 and "record" not in cut and cut["bits"] == 8
    another_machine(build)
    steps.append("elsewhere")
    forbid(monkeypatch, "ensure")  # not even the flow is needed
    found = call(build, tmp_path / "out")["denoising-1-fold"]["record"]
    assert found["training"]["steps"] == 12 and len(steps) == 12 + 1 and found["cut"] == cut["cut"]
    assert [row["step"] for row in found["training"]["history"]] == [2, 4, 6, 8, 10, 12]


def test_ctrl_c_saves_and_ends(build, tmp_path, monkeypatch):
    only(monkeypatch, "denoising-resnet")
    monkeypatch.setattr(card.Card, "seconds_per_step", lambda *_: 1e-4)
    monkeypatch.setattr(card.lent, "sending", lambda *_: contextlib.nullcontext(signal.raise_signal(2)))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            call(build, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])  # ignored in the background
def test_a_deadline_is_kept(ctrl_c):
    usual, start = signal.signal(signal.SIGINT, ctrl_c), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), lent.deadline(0.05):
            time.sleep(10)
        assert time.monotonic() - start < 5
        with lent.deadline(0.05, grace=0.05):
            pass
        time.sleep(0.2)  # nothing comes after it
        assert signal.getsignal(signal.SIGINT) is ctrl_c
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_kill_costs_a_minute_at_most(build, tmp_path, monkeypatch):
    """With -9, while it trains; another machine has what was written before."""
    out, name = tmp_path / "out", "denoising-resnet"
    script = f"""
from benchmarks import card
card.EVERY, card.RESERVE, whole = 0.2, 0.5, card.queue
card.queue = lambda *a: {{{name!r}: whole(*a)[{name!r}]}}
card.Card.seconds_per_step = lambda *_: 1e-4
card.main()"""
    words = f"--minutes 5 --out {out} --steps 100000 --profile smoke --dataset synthetic --build {build}"
    process = subprocess.Popen([sys.executable, "-c", script, *words.split()], cwd=ROOT)
    until = time.monotonic() + 200
    while not lent.fetch(out, name) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = lent.fetch(out, name)[1]["state"]["step"]
    another_machine(build)
    only(monkeypatch, name)
    found = []

    def fit_solver(experiment, run, solver, settings, folder):
        found.append((settings.num_steps, load_tensors(folder / "resume.safetensors")[1]["state"]["step"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(card, "fit_solver", fit_solver)
    with pytest.raises(KeyboardInterrupt):
        call(build, out)
    assert found == [(100000, step)] and step > 0


def test_nothing_is_started_that_cannot_finish(build, tmp_path, monkeypatch):
    only(monkeypatch, "denoising-1-fold", "denoising-4-folds", "denoising-unet")
    forbid(monkeypatch, "ensure", "fit_solver")
    monkeypatch.setattr(card.Card, "seconds_per_step", lambda *_: 1e3)
    notes = call(build, tmp_path / "out")
    assert "too long" in notes["flow"]["not_started"]
    assert notes["denoising-1-fold"]["not_started"] == "flow is not finished"
    assert notes["denoising-4-folds"]["not_started"] == "denoising-1-fold is not finished"
    assert notes["denoising-unet"]["not_started"] == "there is time for 0 steps alone"


def test_the_number_of_steps_is_what_there_is_time_for(build, tmp_path, monkeypatch):
    only(monkeypatch, "denoising-resnet")
    monkeypatch.setattr(card.Card, "seconds_per_step", lambda *_: 600)
    monkeypatch.setattr(card.Card, "left", lambda self: 6000)
    forbid(monkeypatch, "ensure")
    notes = call(build, tmp_path / "out", steps=12)
    assert notes["denoising-resnet"]["record"]["training"]["steps"] == 9


def test_a_card_that_computes_wrongly_trains_nothing(build, tmp_path, monkeypatch):
    forbid(monkeypatch, "ensure", "fit_solver")
    monkeypatch.setattr(card, "error_of", lambda method: 0.1)
    with pytest.raises(SystemExit, match="computes something else than a CPU"):
        call(build, tmp_path / "out")


def test_a_candidate_may_fail_or_be_wrong(build, tmp_path, monkeypatch):
    only(monkeypatch)

    def error_of(method):
        if method == "products":
            raise RuntimeError("no kernel")
        return 1e-6

    monkeypatch.setattr(card, "error_of", error_of)
    found = call(build, tmp_path / "out")["coupling"]
    assert found["choice"] == "plain" and "no kernel" in found["rows"]["products"]["failed"]
    forbid(monkeypatch, "fit_solver")
    (recorded,) = (tmp_path / "out").glob("coupling-*.json")
    recorded.write_text(recorded.read_text().replace('"choice": "plain"', '"choice": "products"'))
    assert call(build, tmp_path / "out")["coupling"]["choice"] == "products"


@pytest.fixture(params=["muon", "adam"])
def resume(request, build, tmp_path):
    """The state of a training of some steps, as fit saved it."""
    config = dict(num_levels=2, num_steps=1, hidden_channels=96)
    experiment = Experiment("smoke", "synthetic", build=build, flow=config)
    ensure(experiment, experiment.flow())
    run = replace(experiment.solver("denoising", "glow"), num_folds=1)
    settings = Training(4, 4, 1e-3, validate_every=2, bf16=False, optimizer=request.param)
    fit_solver(experiment, run, build_solver(experiment, run), settings, tmp_path / "training")
    return tmp_path / "training/resume.safetensors"


def test_the_state_of_a_training_comes_home_small(resume, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert lent.send(resume, out, "one") == 8
    exact, header = load_tensors(resume)
    back, same = lent.fetch(out, "one")
    assert set(back) == set(exact) and same["identity"] == header["identity"]
    assert (out / "one.1.safetensors").stat().st_size < resume.stat().st_size / 6
    for key, value in exact.items():
        large = value.is_floating_point() and value.ndim > 1 and value.numel() >= 1024
        kind = key.rpartition(".")[2] if key.startswith("optimizer.") else key.partition(".")[0]
        if kind in ("momentum", "exp_avg") and large:
            assert not back[key].any()
        elif kind == "exp_avg_sq" and large:
            torch.testing.assert_close(back[key].flatten(1).mean(1), value.flatten(1).mean(1))
        elif kind == "best":
            assert torch.equal(back[key], back[key.replace("best.", "model.")])
        elif large:
            rows = value.flatten(1)
            assert ((back[key].flatten(1) - rows).abs().amax(1) <= rows.abs().amax(1) / 250).all()
        else:
            assert torch.equal(back[key], value)
    assert same["state"]["best_loss"] == math.inf and same["state"]["step"] == 4


def test_files_are_small_and_fit_together(resume, tmp_path, monkeypatch):
    out, size = tmp_path / "out", resume.stat().st_size
    monkeypatch.setattr(lent, "FILE", size // 40)
    lent.send(resume, out, "flow")
    files = sorted(out.iterdir())
    numbers = [sum(t.nbytes for t in load_tensors(file)[0].values()) for file in files]
    assert len(files) > 2 and max(numbers) <= size // 40
    tensors, header = lent.fetch(out, "flow")
    header["state"]["step"] = 7
    save_tensors(tmp_path / "later", tensors, header)
    before = files[0].read_bytes()
    lent.send(tmp_path / "later", out, "flow")
    assert lent.fetch(out, "flow")[1]["state"]["step"] == 7
    files[0].write_bytes(before)  # as a kill leaves it
    assert lent.fetch(out, "flow") is None and lent.fetch(out, "other") is None
    lent.send(resume, out, "flow")
    monkeypatch.setattr(lent, "ALL", int(2.5 * sum(f.stat().st_size for f in files)))
    for name in ("first", "second"):
        lent.send(resume, out, name)
    assert lent.fetch(out, "flow") and lent.fetch(out, "second") and lent.fetch(out, "first") is None
    monkeypatch.setattr(lent, "ALL", int(0.75 * sum(numbers)))
    assert 4 <= lent.send(resume, out, "second") < 8 and lent.fetch(out, "flow") is None
    monkeypatch.setattr(lent, "ALL", int(0.3 * sum(numbers)))
    assert lent.send(resume, out, "second") == 0
