"""Checkpoints: what is saved comes back, and every other file is refused with its fault named."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowlib import Glow, GlowProx, ResNetProx, UNetProx, UnfoldedPGD, load_checkpoint, save_checkpoint
from flowlib.checkpoints import load_tensors, save_tensors
from flowlib.glowip import load_glowip
from flowlib.operators import Inpainting
from flowlib.training import Training, fit
from tests.own_prox import Blurred, Mute, Scale
from tests.test_flow import randomize

FLOW = {"num_levels": 2, "num_steps": 1, "hidden_channels": 4}


@pytest.mark.parametrize("kind", ["flow", "glow", "unet", "resnet"])
def test_saved_models_come_back(tmp_path, kind):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 16, 16) - 0.5
    if kind == "flow":
        model = randomize(Glow(**FLOW))
    else:
        make = {
            "glow": lambda: GlowProx(Glow(**FLOW)),
            "unet": lambda: UNetProx(2),
            "resnet": lambda: ResNetProx(4, 1),
        }
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


def test_several_threads_load_at_once(tmp_path):
    save_checkpoint(tmp_path / "m", solver_of(*(GlowProx(Glow(**FLOW)) for _ in range(4))))
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(load_checkpoint, [tmp_path / "m"] * 16))
    assert all(torch.equal(m.step_size, loaded[0].step_size) for m in loaded)


def test_numbers_of_numpy_are_saved(tmp_path):
    save_checkpoint(tmp_path / "m", solver_of(Scale(np.float32(0.5), np.int64(2))), psnr=np.float32(3))
    assert load_checkpoint(tmp_path / "m").proxes[0].config == {"start": 0.5, "size": 2}
    assert load_tensors(tmp_path / "m")[1]["info"] == {"psnr": 3.0}


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_the_model_inside_a_wrapper_is_asked_for(tmp_path, wrap):
    with pytest.raises(TypeError, match=r"give model.module \(parallel\) or model._orig_mod"):
        save_checkpoint(tmp_path / "m", wrap(Glow(**FLOW)))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(path)
    save_checkpoint(path, Glow(**FLOW))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated.*delete it"):
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


def solver_of(*proxes):
    return UnfoldedPGD(proxes, torch.zeros(1, 3, 16, 16)).eval()


def saved_and_loaded(tmp_path, solver):
    save_checkpoint(tmp_path / "m.safetensors", solver)
    return load_checkpoint(tmp_path / "m.safetensors")


def test_unequal_folds_come_back(tmp_path):
    torch.manual_seed(0)
    flows = [randomize(GlowProx(Glow(**FLOW, scale=scale))) for scale in ("tanh", "sigmoid")]
    solver = solver_of(*flows, randomize(UNetProx(2)), randomize(UNetProx(3)), Scale(0.5), Scale(0.3, size=2))
    loaded = saved_and_loaded(tmp_path, solver)
    y = torch.rand(2, 3, 16, 16) - 0.5
    assert torch.equal(loaded(y, Inpainting(5, 16)), solver(y, Inpainting(5, 16)))
    assert [type(p) for p in loaded.proxes] == [type(p) for p in solver.proxes]
    assert [p.config for p in loaded.proxes] == [p.config for p in solver.proxes]


def test_one_prox_for_all_folds_is_written_once_and_stays_one(tmp_path):
    prox, other = GlowProx(Glow(num_levels=2, num_steps=2, hidden_channels=32)), ResNetProx(4, 1)
    loaded = saved_and_loaded(tmp_path, solver_of(prox, prox, other, prox))
    assert (
        loaded.proxes[0] is loaded.proxes[1] is loaded.proxes[3] and loaded.proxes[2] is not loaded.proxes[0]
    )
    y = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(y, Inpainting(5, 16)), solver_of(prox, prox, other, prox)(y, Inpainting(5, 16)))
    save_checkpoint(tmp_path / "once", solver_of(prox))
    save_checkpoint(tmp_path / "tied", solver_of(prox, prox, prox))
    assert (tmp_path / "tied").stat().st_size < 1.05 * (tmp_path / "once").stat().st_size
    glow = prox.glow  # two proxes of one flow
    loaded = saved_and_loaded(tmp_path, solver_of(GlowProx(glow), GlowProx(glow)))
    assert torch.equal(loaded.proxes[1].glow(y)[1], glow(y)[1]) and loaded.proxes[0] is loaded.proxes[1]
    folds = [Scale(1.0), Scale(2.0)]  # one weight, but proxes that differ
    folds[1].factor = folds[0].factor
    assert [p.config["start"] for p in saved_and_loaded(tmp_path, solver_of(*folds)).proxes] == [1.0, 2.0]


class Momentum(UnfoldedPGD):
    pass


class OtherFlow(Glow):
    pass


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: Momentum([Scale(1.0)], torch.zeros(1, 3, 8, 8)), TypeError),
        (lambda: OtherFlow(**FLOW), TypeError),
        (lambda: solver_of(GlowProx(OtherFlow(**FLOW))), ValueError),
    ],
)
def test_a_subclass_is_not_saved_as_its_base(tmp_path, make, error):
    with pytest.raises(error, match="Momentum.*no subclass|OtherFlow.*(no subclass|come back as a Glow)"):
        save_checkpoint(tmp_path / "m", make())


def test_a_buffer_of_doubles_does_not_make_all_double(tmp_path):
    loaded = saved_and_loaded(tmp_path, solver_of(Blurred(1.0)))
    assert loaded.step_size.dtype == torch.float32 and loaded.proxes[0].blur.kernel.dtype == torch.float64


def test_tied_folds_train(tmp_path):
    prox = ResNetProx(4, 1)
    solver, x = UnfoldedPGD([prox, prox], torch.zeros(1, 3, 16, 16)), torch.rand(4, 3, 16, 16) - 0.5
    operator = Inpainting(5, 16)

    def loss(x):
        return (solver(operator.A(x), operator) - x).square().mean()

    settings = Training(num_steps=3, batch_size=2, lr=1e-3, validate_every=1, bf16=False)
    groups = [{"params": list(solver.parameters()), "lr": 1e-3}]
    arguments = (groups, lambda i, s: (x[i],), loss, lambda: loss(x).item(), settings, 4, 0, tmp_path)
    assert fit(solver, *arguments)["steps"] == fit(solver, *arguments)["steps"] == 3


def test_files_from_before_unequal_folds_are_read(tmp_path):
    solver = solver_of(*(randomize(ResNetProx(4, 1)) for _ in range(2)))
    header = {"kind": "UnfoldedPGD", "prox": "resnet", "config": solver.proxes[0].config, "num_folds": 2}
    header |= {"literal_last_fold": False, "image_shape": [3, 16, 16], "info": {}}
    save_tensors(tmp_path / "old", solver.state_dict(), header)
    y = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_checkpoint(tmp_path / "old")(y, Inpainting(5, 16)), solver(y, Inpainting(5, 16)))


def test_a_prox_that_could_not_be_loaded_is_not_saved(tmp_path):
    class Local(Scale):
        pass

    main = type("Main", (Scale,), {"__module__": "__main__", "__qualname__": "Main"})
    for prox, message in (
        (Local(0.5), "cannot be imported again"),
        (main(0.5), "cannot be imported again"),
        (Mute(), "lacks `config` or `from_config`"),
    ):
        with pytest.raises(ValueError, match=message):
            save_checkpoint(tmp_path / "m", solver_of(prox))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name,message",
    [
        ("not_there.at_all:Prox", "needs `from not_there.at_all import Prox`"),
        ("tests.own_prox:Gone", "needs `from tests.own_prox import Gone`"),
        ("tests.own_prox:NoModule", "is no prox"),
        ("os:system", "is no prox"),
        ("torch.nn:Identity", "is no prox"),
        ("gone", "is no prox|needs"),
    ],
)
def test_classes_that_are_no_prox_are_refused(tmp_path, name, message):
    header = {"kind": "UnfoldedPGD", "folds": [{"prox": name, "config": {}}], "literal_last_fold": False}
    save_tensors(tmp_path / "m", {"x0": torch.zeros(1)}, header | {"image_shape": [3, 16, 16]})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "m")


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
    torch.testing.assert_close(
        torch.cat([z.flatten(1) for z in latents], 1), expected["z"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(log_det, expected["logdet"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(
        glow.bits_per_dim(expected["x"]).mean(), expected["nll_bits_per_dim"], atol=1e-5, rtol=0
    )
    shapes = glow.latent_shapes(16)
    parts = expected["z_sample"].split([torch.Size(s).numel() for s in shapes], dim=1)
    images, _ = glow.inverse([part.reshape(-1, *shape) for part, shape in zip(parts, shapes)])
    torch.testing.assert_close(images, expected["x_sample"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name,config",
    [
        ("default", {"last_zeros": False, "K": 1, "L": 2, "coupling": "affine"}),
        ("last_zeros", {"last_zeros": True}),
        ("squeeze_contig", {"squeeze_contig": True}),
        ("coupling_bias_0.1", {"coupling_bias": 0.1}),
        ("all", {"last_zeros": True, "squeeze_contig": True, "coupling_bias": 0.1}),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
@torch.no_grad()
def test_glowip_options(tmp_path, name, config, beside):
    path, _ = glowip_fixture()
    values = np.load(path.with_name("glowip_K1_L2_16px_options.npz"))
    if beside:
        shutil.copy(path, tmp_path / "glowmodel.pt")
        (tmp_path / "configs.json").write_text(json.dumps(config))
        glow = load_glowip(tmp_path / "glowmodel.pt")
    else:
        glow = load_glowip(path, config)
    latents, log_det = glow(torch.from_numpy(values["x"]))
    ours = torch.cat([z.flatten(1) for z in latents], 1)
    torch.testing.assert_close(ours, torch.from_numpy(values[f"{name}.z"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_det, torch.from_numpy(values[f"{name}.logdet"]), atol=1e-4, rtol=1e-6)
    shapes = glow.latent_shapes(16)
    parts = torch.from_numpy(values["z_sample"]).split([torch.Size(s).numel() for s in shapes], dim=1)
    images, _ = glow.inverse([part.reshape(-1, *shape) for part, shape in zip(parts, shapes)])
    torch.testing.assert_close(images, torch.from_numpy(values[f"{name}.x_sample"]), atol=1e-5, rtol=0)
    save_checkpoint(tmp_path / "m", glow)
    assert torch.equal(load_checkpoint(tmp_path / "m")(torch.from_numpy(values["x"]))[1], log_det)


def test_additive_couplings_are_refused():
    with pytest.raises(ValueError, match="only affine couplings can be loaded, not 'additive'"):
        load_glowip(glowip_fixture()[0], {"coupling": "additive"})


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
