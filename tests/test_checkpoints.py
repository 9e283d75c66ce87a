"""Checkpoints: what is saved comes back, and every other file is refused with its fault named."""

import json
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils import prune

from flowlib import Glow, GlowProx, ResNetProx, UNetProx, UnfoldedPGD, load_checkpoint, save_checkpoint
from flowlib.checkpoints import load_tensors, save_tensors
from flowlib.glowip import load_glowip
from flowlib.operators import Inpainting
from flowlib.training import Training, fit
from tests.own_prox import Blurred, Counted, Mute, Scale, Strict
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


def test_loading_imports_no_compiler(tmp_path):
    """PyTorch imports it, for seconds, to draw random numbers that have no memory."""
    save_checkpoint(tmp_path / "a", Glow(num_levels=2, num_steps=1, hidden_channels=4))
    code = "import sys, flowlib; flowlib.load_checkpoint(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


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
    assert loaded.proxes[0].glow is loaded.proxes[1].glow
    assert torch.equal(loaded.proxes[1].glow(y)[1], glow(y)[1])
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
        ("torch.nn:Module.__subclasses__", "needs"),
        (5, "can be built"),
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


def shared_weights(net):
    """Another of the same weights, with averages of its own."""
    twin = UNetProx.from_config(net.config)
    for name, parameter in net.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, parameter)
    return twin


def test_weights_that_are_shared_and_averages_that_are_not(tmp_path):
    torch.manual_seed(0)
    first = randomize(UNetProx(2))
    solver, y = solver_of(first, shared_weights(first)), torch.rand(2, 3, 16, 16) - 0.5
    for prox, scale in zip(solver.proxes, (1, 3)):
        prox.train()(scale * y)
    solver.eval()
    loaded = saved_and_loaded(tmp_path, solver)
    assert torch.equal(loaded(y, Inpainting(5, 16)), solver(y, Inpainting(5, 16)))
    for ours, theirs in zip(*(prox.parameters() for prox in loaded.proxes)):
        assert ours is theirs
    averages = [prox.down[0][1].running_mean for prox in loaded.proxes]
    assert not torch.equal(*averages)
    save_checkpoint(tmp_path / "one", solver_of(first))
    assert (tmp_path / "m.safetensors").stat().st_size < 1.7 * (tmp_path / "one").stat().st_size


def test_a_part_that_folds_share_stays_shared(tmp_path):
    proxes = [Counted(1.0), Counted(2.0), Counted(3.0)]
    proxes[2].net = proxes[0].net
    solver, y = solver_of(*proxes), torch.rand(2, 3, 16, 16)
    loaded = saved_and_loaded(tmp_path, solver)
    assert loaded.proxes[0].net is loaded.proxes[2].net is not loaded.proxes[1].net
    assert torch.equal(loaded(y, Inpainting(5, 16)), solver(y, Inpainting(5, 16)))
    again = saved_and_loaded(tmp_path, loaded.double())
    assert again.proxes[0].net is again.proxes[2].net and again.step_size.dtype == torch.float64


def test_steps_that_a_flow_shares_stay_shared(tmp_path):
    glow = randomize(Glow(num_levels=1, num_steps=2, hidden_channels=4, last_level_steps=2))
    glow.levels[0][1] = glow.levels[0][0]
    save_checkpoint(tmp_path / "m", glow)
    loaded, x = load_checkpoint(tmp_path / "m"), torch.rand(1, 3, 8, 8)
    assert loaded.levels[0][1] is loaded.levels[0][0] and torch.equal(loaded(x)[1], glow(x)[1])


def test_files_that_name_equal_folds_as_before_are_read(tmp_path):
    prox = randomize(ResNetProx(4, 1))
    solver, y = solver_of(prox, prox), torch.rand(2, 3, 16, 16)
    tensors = {k: v for k, v in solver.state_dict().items() if not k.startswith("proxes.1.")}
    header = {"kind": "UnfoldedPGD", "folds": [{"prox": "resnet", "config": prox.config}, {"same_as": 0}]}
    header |= {"literal_last_fold": False, "image_shape": [3, 16, 16], "info": {}}
    save_tensors(tmp_path / "old", tensors, header)
    loaded = load_checkpoint(tmp_path / "old")
    assert loaded.proxes[0] is loaded.proxes[1]
    assert torch.equal(loaded(y, Inpainting(5, 16)), solver(y, Inpainting(5, 16)))


def test_types_that_do_not_hold_the_weights_are_refused(tmp_path):
    solver = solver_of(UNetProx(2))
    solver.proxes[0].down[0][1].running_var[0] = 1e6
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float16"):
        with pytest.raises(ValueError, match="choose torch.float16, bfloat16, float32 or float64"):
            save_checkpoint(tmp_path / "m", solver, dtype=dtype)
    with pytest.raises(ValueError, match=r"down.0.1.running_var holds numbers too large for torch.float16"):
        save_checkpoint(tmp_path / "m", solver, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "m", solver, dtype=torch.bfloat16)
    assert load_checkpoint(tmp_path / "m").proxes[0].down[0][1].running_var.dtype == torch.float32


def parametrised(wrap):
    def make():
        glow = Glow(**FLOW)
        wrap(glow.levels[0][0].invconv)
        return glow

    return make


UNLOADABLE = {
    "orthogonal": parametrised(torch.nn.utils.parametrizations.orthogonal),
    "weight_norm": parametrised(torch.nn.utils.parametrizations.weight_norm),
    "spectral_norm": parametrised(torch.nn.utils.parametrizations.spectral_norm),
    "old spectral_norm": parametrised(torch.nn.utils.spectral_norm),
    "pruning": parametrised(lambda m: prune.random_unstructured(m, "weight", amount=0.1)),
    "buffer": parametrised(lambda m: m.register_buffer("mean", torch.zeros(1))),
    "parameter": parametrised(lambda m: m.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))),
    "other size": parametrised(lambda m: setattr(m, "weight", torch.nn.Parameter(torch.eye(4)))),
}


@pytest.mark.parametrize("make", UNLOADABLE.values(), ids=UNLOADABLE)
def test_a_model_that_could_not_be_loaded_again_is_not_saved(tmp_path, make):
    for model in (make(), solver_of(GlowProx(make()))):
        message = "levels.0.0.invconv.*: remove parametrisations, pruning and buffers of your own"
        with pytest.raises(ValueError, match=message):
            save_checkpoint(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())


def test_a_prox_whose_config_does_not_fit_is_not_saved(tmp_path):
    prox = Scale(0.5, size=2)
    prox.config["size"] = 3
    with pytest.raises(ValueError, match=r"proxes.0.factor has shape \(2,\), not \(3,\)"):
        save_checkpoint(tmp_path / "m", solver_of(prox))
    prox.config = {"unknown": 1}
    with pytest.raises(ValueError, match="describes no model that can be built"):
        save_checkpoint(tmp_path / "m", solver_of(prox))


def test_undone_parametrisations_are_saved(tmp_path):
    glow = UNLOADABLE["orthogonal"]()
    torch.nn.utils.parametrize.remove_parametrizations(glow.levels[0][0].invconv, "weight")
    save_checkpoint(tmp_path / "m", glow)
    loaded, x = load_checkpoint(tmp_path / "m"), torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(x)[1], glow(x)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_pytorchs_default_type_does_not_matter(tmp_path, dtype):
    torch.manual_seed(0)
    solver = solver_of(randomize(GlowProx(Glow(**FLOW))), randomize(UNetProx(2)), Blurred(1.0))
    wide = dtype == torch.float64
    solver = solver.double() if wide else solver
    y = (torch.rand(2, 3, 16, 16) - 0.5).to(solver.x0.dtype)
    save_checkpoint(tmp_path / "m", solver, dtype=dtype if dtype == torch.float16 else None)
    expected = load_checkpoint(tmp_path / "m")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_checkpoint(tmp_path / "m")
        x_hat = loaded(y, Inpainting(5, 16))
    finally:
        torch.set_default_dtype(torch.float32)
    of_all = [{key: value.dtype for key, value in m.state_dict().items()} for m in (loaded, expected)]
    assert of_all[0] == of_all[1]
    assert loaded.step_size.dtype == loaded.x0.dtype == (torch.float64 if wide else torch.float32)
    assert torch.equal(x_hat, expected(y, Inpainting(5, 16)))


def test_classes_are_built_on_the_default_device(tmp_path):
    save_checkpoint(tmp_path / "m", solver_of(Scale(1.0), Strict(2.0)))
    assert load_checkpoint(tmp_path / "m").proxes[1].factor.item() == 2
    with torch.device("meta"), pytest.warns(UserWarning, match="no-op"):
        assert load_checkpoint(tmp_path / "m").proxes[0].factor.device.type == "meta"


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_path_that_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    glow = randomize(Glow(**FLOW))
    save_checkpoint(folder / "m", glow)
    loaded, x = load_checkpoint(folder / "m"), torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded(x)[1], glow(x)[1])


def described(tmp_path, fold, tensors=None, **more):
    header = {"kind": "UnfoldedPGD", "folds": [fold], "literal_last_fold": False, "image_shape": [3, 16, 16]}
    tensors = tensors or {"x0": torch.zeros(1, 3, 16, 16), "step_size": torch.zeros(1)}
    save_tensors(tmp_path / "m", tensors, header | more)
    return tmp_path / "m"


def test_a_file_imports_only_what_it_may(tmp_path, monkeypatch):
    (tmp_path / "someones_module.py").write_text(
        "import pathlib\n"
        "from tests.own_prox import Scale\n"
        "pathlib.Path(__file__).with_name('ran').touch()\n"
        "class Prox(Scale): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state = solver_of(Scale(2.0)).state_dict()
    fold = {"prox": "someones_module:Prox", "config": {"start": 2.0}}
    path = described(tmp_path, fold, state)
    message = (
        r"needs `from someones_module import Prox`: import it first, or .* imports=\['someones_module'\]"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, imports=["someones_module.sub", "os"])
    assert not (tmp_path / "ran").exists()
    assert load_checkpoint(path, imports=["someones_module"]).proxes[0].factor == 2
    assert load_checkpoint(path).proxes[0].factor == 2  # it is loaded now


def test_a_module_that_loads_its_parts_late_loads_none(tmp_path):
    """As many packages do, by a function that getattr calls."""
    asked = []
    late = types.ModuleType("late_module")
    late.__getattr__ = lambda name: asked.append(name)
    sys.modules["late_module"] = late
    try:
        with pytest.raises(ValueError, match="needs `from late_module import Prox`"):
            load_checkpoint(described(tmp_path, {"prox": "late_module:Prox", "config": {}}))
    finally:
        del sys.modules["late_module"]
    assert asked == []


SCALE = {"prox": "tests.own_prox:Scale", "config": {"start": 1.0}}
HOSTILE = {
    "absurd size": lambda f: described(f, SCALE | {"config": {"start": 1.0, "size": 10**12}}),
    "absurd width": lambda f: described(f, {"prox": "resnet", "config": {"width": 10**9}}),
    "negative": lambda f: described(f, {"prox": "resnet", "config": {"width": -1}}),
    "other type": lambda f: described(f, {"prox": "unet", "config": "abc"}),
    "no config": lambda f: described(f, {"prox": "unet"}),
    "no mapping": lambda f: described(f, [1]),
    "image": lambda f: described(f, SCALE, image_shape=[10**9] * 3),
    "no image": lambda f: described(f, SCALE, image_shape="abc"),
    "folds": lambda f: described(f, SCALE, folds="abc"),
    "same as none": lambda f: described(f, {"same_as": 3}),
    "same as itself": lambda f: described(f, {"same_as": 0}),
    "same as text": lambda f: described(f, {"same_as": "x"}),
    "shared list": lambda f: described(f, SCALE, shared=[["a"]]),
    "shared numbers": lambda f: described(f, SCALE, shared={"proxes.0.factor": 3}),
    "shared with none": lambda f: described(f, SCALE, shared={"proxes.0.factor": "proxes.7.factor"}),
    "shared with itself": lambda f: described(f, SCALE, shared={"proxes.0.part": "proxes.0"}),
    "many": lambda f: described(f, SCALE, folds=[SCALE] * 10**4),
    "many blocks": lambda f: described(f, {"prox": "resnet", "config": {"width": 1, "num_blocks": 10**9}}),
    "many steps": lambda f: described(f, {"prox": "glow", "config": {"num_steps": 10**9}}),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_headers_that_lie_are_refused(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(ValueError, match="can be built|does not fit|damaged"):
        load_checkpoint(path)


def test_a_header_nested_without_end_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m", metadata={"flowlib": "[" * 10**5})
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path / "m")
