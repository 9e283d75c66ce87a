"""Training: a run that was killed resumes to the same weights, settings are checked, non-finite losses name the fold."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowlib import data, results, tables, training
from flowlib.checkpoints import load_checkpoint, load_tensors
from flowlib.experiments import METHODS, TASKS, Experiment, Training
from flowlib.operators import Denoising
from flowlib.training import batch_indices, generator_for, learning_rate_factor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder with a few prepared faces and a smoke flow."""
    build = tmp_path_factory.mktemp("build")
    data.prepare_synthetic(build / "data" / "synthetic", num_images=40)
    training.pretrain(Experiment("smoke", build=build))
    return build


def experiment(build, **changes):
    result = Experiment("smoke", build=build)
    unfolding = {k: dataclasses.replace(v, **changes) for k, v in result.profile.unfolding.items()}
    result.profile = dataclasses.replace(result.profile, unfolding=unfolding)
    return result


RUN = """
import dataclasses, sys
from tests.test_training import experiment
from flowlib import training
training.train_unfolded(experiment(sys.argv[1], num_steps=int(sys.argv[2]), checkpoint_minutes=0), "inpainting", "glow")
"""


def test_a_killed_run_resumes_to_the_same_weights(build, tmp_path):
    """One run is killed with SIGKILL after some steps and started again; another is left alone."""
    steps = 12
    training.train_unfolded(experiment(build, num_steps=steps, checkpoint_minutes=0), "inpainting", "glow")
    directory = Experiment("smoke", build=build).directory("inpainting", "glow")
    uninterrupted, _ = load_tensors(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "resume.safetensors").unlink()

    command = [sys.executable, "-c", RUN, str(build), str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment)
    while not (directory / "resume.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = load_tensors(directory / "resume.safetensors")[1]["state"]["step"]
    assert 0 < step < steps
    subprocess.run(command, env=environment, check=True)
    resumed, header = load_tensors(directory / "model.safetensors")
    assert header["info"]["summary"]["steps"] == steps and (directory / "resume.safetensors").exists()
    assert all(torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted)


def test_foreign_resume_files_are_refused(build):
    run = experiment(build, num_steps=2)
    directory = run.directory("denoising", "resnet")
    training.save_tensors(directory / "resume.safetensors", {"x": torch.zeros(1)}, {"fingerprint": {}, "finished": False})
    with pytest.raises(ValueError, match="other settings: delete it"):
        training.train_unfolded(run, "denoising", "resnet")
    (directory / "resume.safetensors").unlink()


def test_training_lowers_the_loss(build):
    run = experiment(build, num_steps=40, validate_every=10, warmup_steps=1, lr=1e-2)
    training.train_unfolded(run, "denoising", "resnet")
    summary = load_tensors(run.directory("denoising", "resnet") / "model.safetensors")[1]["info"]["summary"]
    losses = [row["val_loss"] for row in summary["history"]]
    assert losses[-1] < 0.8 * losses[0]


def test_early_stopping_keeps_the_best(build):
    run = experiment(build, num_steps=50, lr=0.0, scalar_lr=0.0, validate_every=1, patience=3)
    training.train_unfolded(run, "denoising", "glow")
    summary = load_tensors(run.directory("denoising", "glow") / "model.safetensors")[1]["info"]["summary"]
    assert summary["stopped_early"] and summary["best_step"] == 1 and summary["steps"] == 4


def test_a_loss_that_is_not_finite_names_the_fold(build, monkeypatch):
    run = experiment(build, num_steps=2, max_restarts=0)

    def broken(*args):
        solver = training_build_solver(*args)
        with torch.no_grad():
            solver.proxes[2].glow.levels[0][0].actnorm.log_scale.fill_(1e4)
        return solver

    training_build_solver = training.build_solver
    monkeypatch.setattr(training, "build_solver", broken)
    with pytest.raises(FloatingPointError, match="step 0: .* fold 3: the proximal mapping"):
        training.train_unfolded(run, "inpainting", "glow")
    record = results.read_records([run.directory("inpainting", "glow") / "record.json"])[0]
    assert record["kind"] == "failed" and record["training"]["steps"] == 0 and "fold 3" in record["reason"]
    row = next(r for r in tables.table("I", "v2", [record]) if (r["Task"], r["Method"]) == ("inpainting", "GLOW prox"))
    assert row["Ours, dB"] == "diverged" and tables.provenance_rows([record])[0]["Steps"] == "0"
    (run.directory("inpainting", "glow") / "record.json").unlink()


def test_a_run_that_falls_apart_goes_on_from_its_best_weights(build, tmp_path):
    """Once by a loss that is not finite, once by a validation loss that explodes; the weights do not remember it."""
    model = torch.nn.Linear(1, 1)
    config = Training(num_steps=12, batch_size=1, lr=0.1, warmup_steps=1, validate_every=2, bf16=False)
    seen = []

    def batch_loss(indices, step):
        seen.append(model.weight.item())
        return model.weight.square().sum() * (math.nan if step == 5 else 1.0)

    def validation_loss():
        return 1e6 if len(seen) == 8 else model.weight.square().item()

    groups = [{"params": [model.weight], "lr": 0.1}]
    summary = training.fit(model, groups, batch_loss, validation_loss, config, 1, 0, tmp_path)
    assert [restart["step"] for restart in summary["restarts"]] == [5, 8]
    assert "not finite" in summary["restarts"][0]["reason"] and "1e+06" in summary["restarts"][1]["reason"]
    best_at_4 = summary["history"][1]["val_loss"]
    assert seen[6] ** 2 == pytest.approx(best_at_4) and summary["steps"] == 12
    # At half the rate: Adam's first step is of the size of the rate.
    assert abs(seen[7] - seen[6]) < 0.6 * abs(seen[1] - seen[0])
    with pytest.raises(FloatingPointError, match="not finite"):
        training.fit(model, groups, lambda i, s: model.weight.sum() * math.nan, lambda: 0.0, config, 1, 0, tmp_path / "b")


def test_noisy_pretraining_goes_on_from_the_clean_flow(build):
    run = Experiment("smoke", build=build)
    training.pretrain(run, noisy=True)
    clean, noisy = (load_checkpoint(run.flow_directory(n) / "model.safetensors") for n in (False, True))
    w, v = clean.levels[0][0].invconv.weight, noisy.levels[0][0].invconv.weight
    assert 0 < (w - v).abs().max() < 0.05


def state(solver):
    return {k: v.clone() for k, v in solver.state_dict().items()}


def test_what_each_method_starts_from_and_trains(build):
    run = experiment(build, num_steps=2, lr=1e-2, warmup_steps=1)
    flow = load_checkpoint(run.flow_directory() / "model.safetensors").state_dict()
    pretrained = [training.build_solver(run, prox) for prox in ("glow", "glow-frozen")]
    for solver in pretrained:
        assert all(torch.equal(flow[k], fold.glow.state_dict()[k]) for fold in solver.proxes for k in flow)
    fresh = training.build_solver(run, "glow-scratch")
    weights = [fold.glow.levels[0][0].invconv.weight for fold in fresh.proxes]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], flow["levels.0.0.invconv.weight"])
    assert fresh.proxes[0].glow.initialized

    before = state(pretrained[1])
    training.train_unfolded(run, "inpainting", "glow-frozen")
    after = load_checkpoint(run.directory("inpainting", "glow-frozen") / "model.safetensors").state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"step_size"}


def test_baselines_start_from_a_denoiser(build):
    run = experiment(build, num_steps=2)
    training.pretrain_denoiser(run, "resnet")
    denoiser = load_checkpoint(run.denoiser_directory("resnet") / "model.safetensors")
    y = torch.rand(2, 3, 64, 64) - 0.5
    denoiser.step_size.data.fill_(1.0)
    torch.testing.assert_close(denoiser(y, Denoising(0.2)), denoiser.proxes[0](y))
    solver = training.build_solver(run, "resnet-denoiser")
    for fold in solver.proxes:
        assert all(torch.equal(v, fold.state_dict()[k]) for k, v in denoiser.proxes[0].state_dict().items())


def test_every_row_of_the_paper_is_trained_by_the_full_profiles():
    for (name, edition), (_, evaluation, _) in tables.PAPER_TABLES.items():
        trained = Experiment("cpu", "celeba", edition).trainings()
        settings = {
            (
                TASKS[t].name,
                getattr(TASKS[t], "shifted_setting" if evaluation == "shifted" else "setting"),
                METHODS[p].label,
            )
            for t, p in trained
        }
        assert set(tables.paper_table(name, edition)) <= settings


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
    config = Experiment("demo").profile.pretraining
    factors = [learning_rate_factor(step, config) for step in range(config.num_steps)]
    peak = factors.index(max(factors))
    assert factors[0] < 0.05 and peak <= config.warmup_steps and factors[-1] < 1e-3


def test_missing_data_and_flow_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m companion prepare"):
        training.pretrain(Experiment("smoke", build=tmp_path))
    with pytest.raises(ValueError, match="unknown profile 'big'; choose one of: smoke, demo, cpu, paper"):
        Experiment("big")


def test_records_hold_what_the_tables_need(build, monkeypatch, tmp_path):
    run = experiment(build, num_steps=2)
    data.prepare_synthetic(build / "data" / "synthetic-ood", num_images=6, style="ood")
    results.record_flow(run)
    for prox in ("glow", "unet"):
        training.train_unfolded(run, "denoising", prox)
        results.record_solver(run, "denoising", prox)
    record = json.loads((run.directory("denoising", "glow") / "record.json").read_text())
    assert len(record["psnr"]["values"]) == 8 and record["training"]["images_seen"] == 8
    assert record["psnr_measurement"]["mean"] == pytest.approx(14, abs=0.3)  # noise of 0.2: -20 log10(0.2) dB
    assert record["folds"][-1]["psnr"] == pytest.approx(record["psnr"]["mean"], abs=1e-3)
    assert record["shifted"]["setting"] == "sigma_n=0.25" and len(record["foreign"]["psnr"]["values"]) == 6
    assert record["shifted"]["psnr"]["mean"] < record["psnr"]["mean"] + 1
    rows = {r["Method"]: r for r in tables.table("III", "v2", [record]) if r["Task"] == "denoising"}
    assert rows["GLOW prox"]["Ours, dB"] == tables.plus_minus(record["shifted"]["psnr"])
    assert rows["U-Net prox"]["Ours, dB"] == "not run"
    tables.tabulate(run)
    row = next(r for r in tables.table("I", "v2", results.build_records(run)) if r["Method"] == "GLOW prox")
    assert row["Paper, dB"] == "28.24" and row["Ours, dB"].startswith(f"{record['psnr']['mean']:.2f}\u00a0±")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    shutil.copy(ROOT / "results/paper.csv", tmp_path)
    results.publish(run)
    kept = {r["name"]: r for r in results.recorded()}
    assert sorted(kept) == ["denoising-glow", "denoising-unet", "flow"]
    assert results.main_run(list(kept.values())) == list(kept.values())
    text = "\n".join(tables.findings(list(kept.values())))
    difference = record["psnr"]["mean"] - kept["denoising-unet"]["psnr"]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("| I | GLOW over U-Net |"))
    assert f" {tables.signed(difference)} ±" in row and "(+0.06) | – | – |" in row
    (run.directory("denoising", "unet") / "record.json").write_text("{")
    with pytest.raises(ValueError, match="is no result record"):
        results.build_records(run)


def test_verdicts():
    assert tables.verdict(0.5, 0.1, 2.0) == "replicated"
    assert tables.verdict(-0.5, 0.1, 2.0) == "the opposite"
    assert tables.verdict(0.05, 0.1, 2.0) == "not distinguishable"
