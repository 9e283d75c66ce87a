"""Training: a run that was killed resumes to the same weights, settings are checked, non-finite losses name the fold."""

import dataclasses
import json
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
from flowlib.experiments import Experiment
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
    assert header["info"]["summary"]["steps"] == steps and not (directory / "resume.safetensors").exists()
    assert all(torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted)


def test_foreign_resume_files_are_refused(build):
    run = experiment(build, num_steps=2)
    directory = run.directory("denoising", "resnet")
    training.save_tensors(directory / "resume.safetensors", {"x": torch.zeros(1)}, {"fingerprint": {}, "state": {}})
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
    run = experiment(build, num_steps=2)

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


def test_noisy_pretraining_goes_on_from_the_clean_flow(build):
    run = Experiment("smoke", build=build)
    training.pretrain(run, noisy=True)
    clean, noisy = (load_checkpoint(run.flow_directory(n) / "model.safetensors") for n in (False, True))
    w, v = clean.levels[0][0].invconv.weight, noisy.levels[0][0].invconv.weight
    assert 0 < (w - v).abs().max() < 0.05


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
    with pytest.raises(FileNotFoundError, match="python -m flowlib prepare"):
        training.pretrain(Experiment("smoke", build=tmp_path))
    with pytest.raises(ValueError, match="unknown profile 'big'; choose one of: smoke, demo, cpu, paper"):
        Experiment("big")


def test_records_hold_what_the_tables_need(build, monkeypatch, tmp_path):
    run = experiment(build, num_steps=2)
    results.record_flow(run)
    for prox in ("glow", "unet"):
        training.train_unfolded(run, "denoising", prox)
        results.record_solver(run, "denoising", prox)
    record = json.loads((run.directory("denoising", "glow") / "record.json").read_text())
    assert len(record["psnr"]["values"]) == 8 and record["training"]["images_seen"] == 8
    assert record["psnr_measurement"]["mean"] == pytest.approx(14, abs=0.3)  # noise of 0.2: -20 log10(0.2) dB
    assert record["folds"][-1]["psnr"] == pytest.approx(record["psnr"]["mean"], abs=1e-3)
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
    assert f"GLOW prox over U-Net prox by {tables.signed(difference)} ±" in text and "(paper +0.06)" in text
    (run.directory("denoising", "unet") / "record.json").write_text("{")
    with pytest.raises(ValueError, match="is no result record"):
        results.build_records(run)


def test_verdicts():
    assert tables.verdict(0.5, 0.1, 2.0) == "replicated"
    assert tables.verdict(-0.5, 0.1, 2.0) == "the opposite"
    assert tables.verdict(0.05, 0.1, 2.0) == "not distinguishable"
