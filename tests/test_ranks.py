"""Training on several ranks: two processes that talk over gloo, on one machine, do what one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
from flowlib.checkpoints import load_tensors, save_tensors
from flowlib.training import Training, fit
from tests.conftest import ROOT

CASES = ["glow-plain", "glow-reversible", "unet-plain"]
SCRIPT = """
import os, sys, json
import torch
from flowlib import Denoising, Glow, GlowProx, UNetProx, UnfoldedPGD, save_checkpoint, set_memory
from flowlib.ranks import rank_and_size
from flowlib.training import Training, fit, generator_for
steps, folder, *cases = sys.argv[1:]
torch.set_default_dtype(torch.float64)
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
rank, size = rank_and_size()
operator = Denoising(0.2)
images = torch.rand(32, 3, 16, 16, generator=generator_for(0, "images")) - 0.5


def train(network, memory, folder):
    torch.manual_seed(rank)  # rank 0's weights must win
    glow = Glow(num_levels=2, num_steps=2, hidden_channels=8)
    prox = UNetProx(width=2) if network == "unet" else GlowProx(glow)
    solver = UnfoldedPGD([prox], torch.zeros(1, 3, 16, 16))
    set_memory(solver, memory)
    seen = []

    def make_batch(indices, step):
        x = images[indices]
        return x, operator.measure(x, generator_for(0, "noise", step))

    def loss(x, y):
        seen.extend(float(value) for value in y[:, 0, 0, 0])
        return (solver(y, operator) - x).square().mean()

    def validation_loss():
        return (solver(images[:8], operator) - images[:8]).square().mean()

    options = dict(validate_every=5, bf16=False, checkpoint_minutes=0, cosine=False)
    settings = Training(int(steps), 4, 1e-3, **options)
    groups = [{"params": solver.parameters()}]
    summary = fit(solver, groups, make_batch, loss, validation_loss, settings, 32, 0, folder + "/run")
    save_checkpoint(f"{folder}/{size}-{rank}.safetensors", solver, steps=summary["steps"])
    with open(f"{folder}/{size}-{rank}.json", "w") as f:
        json.dump(seen, f)


for case in cases:
    os.makedirs(f"{folder}/{case}", exist_ok=True)
    train(*case.split("-"), f"{folder}/{case}")
"""


def run(tmp_path, ranks, *arguments, wait=True):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] * (ranks > 1)
    command = [sys.executable, *torchrun, str(tmp_path / "script.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if wait:
        _, error = process.communicate()
        assert process.returncode == 0, error
    return process


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{number of ranks: the folder of its trainings of CASES}."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        run(folder, ranks, 20, folder, *CASES)
    return folders


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process_does(trained, case):
    """The same weights after 20 steps; each rank has its own images, which together are those of one process.
    A U-Net's BatchNorm sees half of a batch, so that its weights differ, but not from rank to rank."""
    alone, together = (trained[ranks] / case for ranks in (1, 2))
    one = load_tensors(alone / "1-0.safetensors")[0]
    two = [load_tensors(together / f"2-{rank}.safetensors")[0] for rank in (0, 1)]
    for key, value in one.items():
        assert torch.equal(two[0][key], two[1][key]), key
        if case.startswith("glow"):
            torch.testing.assert_close(two[0][key], value, rtol=0, atol=1e-6)
    if case.startswith("glow"):
        all_images = json.loads((alone / "1-0.json").read_text())
        seen = [json.loads((together / f"2-{rank}.json").read_text()) for rank in (0, 1)]
        assert not set(seen[0]) & set(seen[1]) and len(set(all_images)) == 80
        assert sorted(all_images) == sorted(seen[0] + seen[1])
    assert len(list((together / "run").iterdir())) == 2  # log and resume file, of rank 0 alone


def test_a_killed_rank_ends_the_job_which_resumes_on_another_number(tmp_path):
    process = run(tmp_path, 2, 100000, tmp_path, "glow-plain", wait=False)
    resume = tmp_path / "glow-plain/run/resume.safetensors"
    while not resume.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and re.search(r"rank\s*:\s*1\b", error) and "SIGKILL" in error
    step = load_tensors(resume)[1]["state"]["step"]
    assert step > 0
    tensors, header = load_tensors(resume)
    header["identity"]["num_steps"] = step + 3
    save_tensors(resume, tensors, header)
    run(tmp_path, 1, step + 3, tmp_path, "glow-plain")
    assert load_tensors(tmp_path / "glow-plain/1-0.safetensors")[1]["info"]["steps"] == step + 3


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flowlib.training.rank_and_size", lambda: (0, 3))
    net = torch.nn.Linear(1, 1)
    settings, groups = Training(num_steps=1, batch_size=4, lr=0.1), [{"params": net.parameters()}]
    with pytest.raises(ValueError, match="a batch of 4 images is not shared evenly by 3 ranks"):
        fit(net, groups, None, None, None, settings, 8, 0, tmp_path)


@pytest.mark.long
def test_the_command_line_trains_on_several_ranks(tmp_path):
    """As the README has it: one record, with the weights of one process."""
    for ranks in (1, 2):
        build = tmp_path / str(ranks)
        data.prepare_synthetic(build / "data" / "synthetic", num_images=40)
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] * (ranks > 1)
        dashes = ["--"] * (ranks > 1)  # or torchrun takes --run for an option of its own
        command = [sys.executable, "-m", *torchrun, "companion", *dashes, "run", "--run", "inpainting-glow"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--profile", "smoke", "--build", str(build)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
    models = [
        load_tensors(next((tmp_path / ranks).glob("runs/*/v2/inpainting-glow-*/model.safetensors")))[0]
        for ranks in ("1", "2")
    ]
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, rtol=1e-3, atol=1e-4)
    assert len(list((tmp_path / "2").rglob("record.json"))) == 2  # the flow's and the solver's
