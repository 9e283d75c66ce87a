"""Checkpoints: what is saved comes back, and every other file is refused with its fault named."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowlib import Glow, GlowProx, ResNetProx, UNetProx, UnfoldedPGD, load_checkpoint, save_checkpoint
from flowlib.glowip import load_glowip
from flowlib.operators import Inpainting
from tests.test_flow import randomize

FLOW = {"num_levels": 2, "num_steps": 1, "hidden_channels": 4}


@pytest.mark.parametrize("kind", ["flow", "glow", "unet", "resnet"])
def test_saved_models_come_back(tmp_path, kind):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16) - 0.5
    if kind == "flow":
        model = randomize(Glow(**FLOW))
    else:
        make = {"glow": lambda: GlowProx(Glow(**FLOW)), "unet": lambda: UNetProx(2), "resnet": lambda: ResNetProx(4, 1)}
        model = UnfoldedPGD([randomize(make[kind]()) for _ in range(2)], x[:1])
    save_checkpoint(tmp_path / "m.safetensors", model.eval(), note="kept")
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    run = (lambda m: m(x)[1]) if kind == "flow" else (lambda m: m(x, Inpainting(5, 16)))
    assert torch.equal(run(loaded), run(model))
    assert not loaded.training and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_half_precision_halves_the_file(tmp_path):
    glow = Glow(num_levels=2, num_steps=2, hidden_channels=64)
    save_checkpoint(tmp_path / "full", glow)
    save_checkpoint(tmp_path / "half", glow, dtype=torch.float16)
    assert (tmp_path / "half").stat().st_size < 0.55 * (tmp_path / "full").stat().st_size
    assert load_checkpoint(tmp_path / "half").levels[0][0].invconv.weight.dtype == torch.float32


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(path)
    save_checkpoint(path, Glow(**FLOW))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not written by flowlib"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, Glow(**FLOW))
    before = path.read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("flowlib.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, Glow(**FLOW))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def glowip_fixture():
    folder = Path(os.environ.get("FLOWLIB_FIXTURES", "fixtures"))
    if not (folder / "glowip_K1_L2_16px.pt").is_file():
        pytest.skip("no GlowIP fixture (set FLOWLIB_FIXTURES to the folder that holds glowip_K1_L2_16px.pt)")
    values = np.load(folder / "glowip_K1_L2_16px_io.npz")
    return folder / "glowip_K1_L2_16px.pt", {k: torch.from_numpy(values[k]) for k in values}


@torch.no_grad()
def test_glowip_outputs():
    path, expected = glowip_fixture()
    glow = load_glowip(path)
    latents, log_det = glow(expected["x"])
    torch.testing.assert_close(torch.cat([z.flatten(1) for z in latents], 1), expected["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_det, expected["logdet"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(glow.bits_per_dim(expected["x"]).mean(), expected["nll_bits_per_dim"], atol=1e-5, rtol=0)
    shapes = glow.latent_shapes(16)
    parts = expected["z_sample"].split([torch.Size(s).numel() for s in shapes], dim=1)
    images, _ = glow.inverse([part.reshape(-1, *shape) for part, shape in zip(parts, shapes)])
    torch.testing.assert_close(images, expected["x_sample"], atol=1e-5, rtol=0)


def test_foreign_glowip_files_are_refused(tmp_path):
    path, _ = glowip_fixture()
    state = torch.load(path, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.pt is truncated"):
        load_glowip(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="its key 'fc.weight' is not one of a flow step"):
        load_glowip({"fc.weight": torch.zeros(1)})
    missing = {k: v for k, v in state.items() if k != "glow_modules.4.coupling.net.conv2.bias"}
    with pytest.raises(ValueError, match="coupling.net.conv2.bias is missing"):
        load_glowip(missing)
    key = "glow_modules.4.actnorm.b"
    with pytest.raises(ValueError, match="actnorm.bias has shape"):
        load_glowip(state | {key: state[key][:, :5]})
