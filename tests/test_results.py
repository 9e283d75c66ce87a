"""Records that are kept: publishing, shipping in half precision, and verifying what was shipped."""

import json

import pytest

from flowlib import data, results, training
from companion.__main__ import main
from flowlib.experiments import Experiment


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A smoke experiment with a trained flow and ResNet, whose results folder is a temporary one."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    run = Experiment("smoke", build=tmp_path / "build")
    data.prepare_synthetic(run.build / "data" / "synthetic", num_images=40)
    training.pretrain(run)
    results.record_flow(run)
    training.train_unfolded(run, "denoising", "resnet")
    results.record_solver(run, "denoising", "resnet")
    return run


def test_shipped_models_give_the_recorded_numbers(run, capsys):
    results.publish(run, ship=["flow", "denoising-resnet"])
    kept = results.RESULTS / "checkpoints" / "smoke-synthetic-s0"
    assert (kept / "flow.safetensors").is_file() and (kept / "v2" / "denoising-resnet.safetensors").is_file()
    rows = {row["checkpoint"]: row for row in results.verify(run.build)}
    assert all(row["agrees"] for row in rows.values()) and len(rows) == 2
    assert main(["verify", "--build", str(run.build)]) == 0

    path = results.RESULTS / "runs" / "smoke-synthetic-s0" / "v2" / "denoising-resnet.json"
    record = json.loads(path.read_text())
    record["psnr"]["mean"] += 0.03
    path.write_text(json.dumps(record))
    assert main(["verify", "--build", str(run.build)]) == 1
    assert "False" in capsys.readouterr().out


def test_nothing_to_ship_is_named(run):
    with pytest.raises(ValueError, match="no run inpainting-glow to ship; there are: flow, denoising-resnet"):
        results.publish(run, ship=["inpainting-glow"])


def test_images_that_are_not_there_are_no_failure(run, tmp_path, monkeypatch):
    record = run.directory("denoising", "resnet") / "record.json"
    content = json.loads(record.read_text())
    content["experiment"]["dataset"] = "celeba"
    record.write_text(json.dumps(content))
    results.publish(run, ship=["denoising-resnet"])
    monkeypatch.setenv("FLOWLIB_DATA", str(tmp_path))
    [row] = results.verify(tmp_path / "other")
    assert "not evaluated: no celeba images" in row["found"]
