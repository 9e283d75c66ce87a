"""The flow and its layers: round trips, log-determinants against the autograd Jacobian, initialisation,
clear errors."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowlib import (
    Blur,
    Glow,
    GlowProx,
    ResNetProx,
    UNetProx,
    UnfoldedPGD,
    psnr,
    set_compute_dtype,
    set_memory,
)
from flowlib.layers import ActNorm, AffineCoupling, CouplingNet, FlowStep, InvConv1x1, Split, Squeeze
from flowlib.precision import bf16_pays


def randomize(module, seed=0, scale=0.2):
    """Away from the start values, at which a coupling is linear and an ActNorm the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def jacobian_log_det(function, x):
    """log |det| of a map of one image (1, C, H, W), by autograd."""
    jacobian = torch.autograd.functional.jacobian(function, x).reshape(x.numel(), x.numel())
    return torch.linalg.slogdet(jacobian).logabsdet


LAYERS = {
    "actnorm": lambda: ActNorm(4),
    "invconv": lambda: InvConv1x1(4),
    "coupling tanh": lambda: AffineCoupling(4, 6, "tanh"),
    "coupling tanh 0.25": lambda: AffineCoupling(4, 6, "tanh", max_log_scale=0.25),
    "coupling sigmoid": lambda: AffineCoupling(4, 6, "sigmoid"),
    "coupling exp": lambda: AffineCoupling(4, 6, "exp"),
    "step": lambda: FlowStep(4, 6),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layer_round_trips_and_log_dets(make):
    torch.manual_seed(0)
    layer = randomize(make().double())
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    y, log_det = layer(x)
    back, inverse_log_det = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(layer(layer.inverse(x)[0])[0], x)
    torch.testing.assert_close(log_det[0], jacobian_log_det(lambda t: layer(t)[0], x))
    torch.testing.assert_close(inverse_log_det[0], jacobian_log_det(lambda t: layer.inverse(t)[0], y))


def test_squeeze_order_and_split_round_trip():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    y = Squeeze()(x)
    torch.testing.assert_close(y[:, 4 * 1 + 2 * 1 + 0], x[:, 1, 1::2, 0::2])  # (channel 1, row 1, column 0)
    torch.testing.assert_close(Squeeze().inverse(y), x)
    torch.testing.assert_close(Split().inverse(*Split()(y)), y)


def test_step_is_the_composition_of_its_layers():
    torch.manual_seed(0)
    step = randomize(FlowStep(4, 6).double())
    x = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    h, log_det = x, 0
    for layer in (step.actnorm, step.invconv, step.coupling):
        h, layer_log_det = layer(h)
        log_det = log_det + layer_log_det
    y, step_log_det = step(x)
    torch.testing.assert_close(y, h)
    torch.testing.assert_close(step_log_det, log_det)


def small_glow(dtype=torch.float64, **config):
    torch.manual_seed(0)
    return randomize(
        Glow(**{"num_levels": 2, "num_steps": 2, "hidden_channels": 6, **config}).to(dtype), scale=0.1
    )


@pytest.mark.parametrize("channels,size,batch", [(3, (8, 8), 2), (1, (4, 12), 1), (4, (16, 8), 3)])
def test_glow_round_trips(channels, size, batch):
    glow = small_glow(in_channels=channels)
    x = torch.rand(batch, channels, *size, dtype=torch.float64) - 0.5
    latents, log_det = glow(x)
    assert [z.shape[1:] for z in latents] == [torch.Size(s) for s in glow.latent_shapes(size)]
    assert sum(z[0].numel() for z in latents) == x[0].numel()
    back, inverse_log_det = glow.inverse(latents)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    for once, twice in zip(latents, glow(back)[0]):
        torch.testing.assert_close(once, twice)


def test_glow_log_prob_by_change_of_variables():
    glow = small_glow(in_channels=1)
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64) - 0.5

    def flat(t):
        return torch.cat([z.flatten() for z in glow(t)[0]])

    z = flat(x)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() + jacobian_log_det(flat, x)
    torch.testing.assert_close(glow.log_prob(x)[0], expected)
    bits = (
        -(expected - 16 * torch.log(torch.tensor(256.0, dtype=torch.float64)))
        / 16
        / torch.log(torch.tensor(2.0))
    )
    torch.testing.assert_close(glow.bits_per_dim(x)[0], bits, check_dtype=False)


def test_every_parameter_gets_a_gradient():
    glow = small_glow()
    glow.bits_per_dim(torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5).mean().backward()
    for name, parameter in glow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_parameters_of_the_paper():
    assert sum(p.numel() for p in Glow().parameters()) == 25_771_456


def test_initialize_whitens_once_and_only_when_asked():
    torch.manual_seed(0)
    glow = Glow(num_levels=2, num_steps=2, hidden_channels=8)
    x = 0.2 * torch.rand(64, 3, 8, 8) + 0.1
    before = {k: v.clone() for k, v in glow.state_dict().items()}
    glow.train()
    glow.inverse(glow(x)[0])
    assert all(torch.equal(v, before[k]) for k, v in glow.state_dict().items())
    glow.initialize(x)
    step = glow.levels[0][0]
    std, mean = torch.std_mean(step.actnorm(glow.squeezes[0](x))[0], dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(12), atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="initialised already"):
        glow.initialize(x)
    with pytest.raises(ValueError, match="standard deviation"):
        Glow(num_levels=2, num_steps=1, hidden_channels=8).initialize(torch.zeros(4, 3, 8, 8))


def test_sampling_follows_its_generator_and_temperature():
    glow = small_glow(torch.float32)
    first = glow.sample(2, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, glow.sample(2, 8, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, glow.sample(2, 8, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(glow.sample(1, (8, 4), temperature=0.0), glow.mode((8, 4)))


@pytest.mark.parametrize("max_log_scale", [1.0, 0.25])
@torch.no_grad()
def test_tanh_couplings_stay_well_conditioned(max_log_scale):
    """However large the input and the weights, log s keeps its bound, so that inverting loses no digits to
    the scale."""
    torch.manual_seed(0)
    coupling = randomize(AffineCoupling(4, 8, "tanh", max_log_scale), scale=3.0)
    x = 100 * torch.randn(2, 4, 6, 6)
    y = coupling(x)[0]
    log_s = coupling.log_scale_and_shift(x[:, 2:])[0]
    assert 0.5 * max_log_scale < log_s.abs().mean() and log_s.abs().max() <= max_log_scale
    assert (coupling.inverse(y)[0] - x).abs().max() < 1e-6 * y.abs().max()


def trained(glow, make_optimizer):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    optimizer = make_optimizer(glow.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        glow.bits_per_dim(x).mean().backward()
        optimizer.step()


def averaged(glow):
    for p in glow.parameters():
        p.data.mul_(0.9).add_(0.1 * torch.ones_like(p))


CHANGES = {
    "fused": lambda glow: trained(glow, lambda p: torch.optim.AdamW(p, lr=0.02, fused=True)),
    "foreach": lambda glow: trained(glow, lambda p: torch.optim.SGD(p, lr=0.02, foreach=True)),
    "data": averaged,
    "orthogonal": lambda glow: torch.nn.init.orthogonal_(glow.levels[0][0].invconv.weight.data),
    "load": lambda glow: glow.load_state_dict({k: v + 0.01 for k, v in glow.state_dict().items()}),
    "replaced": lambda glow: setattr(
        glow.levels[0][0].invconv, "weight", torch.nn.Parameter(torch.eye(12) * 1.1)
    ),
}


@pytest.mark.parametrize("mode", ["plain", "reversible"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_goes_stale(change, mode):
    """After any change of weights, by whatever means, a flow and its deep copy agree: values, inverse and
    gradients."""
    glow = small_glow(torch.float32)
    set_memory(glow, mode)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        before = glow.bits_per_dim(x)
        glow.inverse(glow(x)[0])
    change(glow)
    twin = copy.deepcopy(glow)
    with torch.no_grad():
        assert not torch.equal(glow.bits_per_dim(x), before)
        assert torch.equal(glow.bits_per_dim(x), twin.bits_per_dim(x))
        assert (glow.inverse(glow(x)[0])[0] - x).abs().max() < 1e-4
    for flow in (glow, twin):
        flow.zero_grad()
        flow.bits_per_dim(x).mean().backward()
    for ours, theirs in zip(glow.parameters(), twin.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


@torch.no_grad()
def test_forward_mode_agrees_with_and_without_gradients():
    glow = small_glow()
    x, t = torch.rand(2, 2, 3, 8, 8, dtype=torch.float64) - 0.5
    without = torch.func.jvp(lambda v: glow(v)[0][-1], (x,), (t,))[1]
    with torch.enable_grad():
        torch.testing.assert_close(torch.func.jvp(lambda v: glow(v)[0][-1], (x,), (t,))[1], without)


def test_folding_once_gives_the_same():
    glow = small_glow()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    fused = glow.fuse()
    latents, log_det = glow(x, fused)
    assert all(torch.equal(a, b) for a, b in zip(latents, glow(x)[0])) and torch.equal(log_det, glow(x)[1])
    assert torch.equal(glow.inverse(latents, fused)[0], glow.inverse(latents)[0])
    images, nothing = glow.inverse(glow(x, fused, log_det=False)[0], fused, log_det=False)
    assert nothing is None and torch.equal(images, glow.inverse(latents)[0])


def test_steps_and_channels_of_each_level():
    glow = Glow(num_levels=2, num_steps=(1, 3), hidden_channels=(4, 8))
    assert [len(level) for level in glow.levels] == [1, 3]
    assert [level[0].coupling.net.conv1.out_channels for level in glow.levels] == [4, 8]
    assert [level[0].coupling.max_log_scale for level in glow.levels] == [2, 2 / 3]
    with pytest.raises(ValueError, match="one number for each level"):
        Glow(num_levels=3, hidden_channels=(4, 8))


def test_meta_device_gives_shapes_without_memory():
    with torch.device("meta"):
        glow = Glow()
        latents, log_det = glow(torch.empty(2, 3, 128, 64))
        assert [tuple(z.shape[1:]) for z in latents] == glow.latent_shapes((128, 64))
        assert glow.inverse(latents)[0].shape == (2, 3, 128, 64) and log_det.device.type == "meta"


def test_bf16_coupling_nets_keep_the_round_trip():
    glow = small_glow(torch.float32, hidden_channels=16)
    x = torch.rand(2, 3, 8, 8) - 0.5
    exact = glow(x)[0]
    set_compute_dtype(glow, torch.bfloat16)
    latents = glow(x)[0]
    assert latents[0].dtype == torch.float32
    assert 0 < max((a - b).abs().max() for a, b in zip(exact, latents)) < 0.1
    assert (glow.inverse(latents)[0] - x).abs().max() < 0.02


class WithoutFusedConvolutions:
    """Stands for a build of PyTorch that lacks oneDNN's operators."""


fused_only = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_convolution_pointwise"), reason="this PyTorch has no fused convolution"
)


@fused_only
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("pays", [False, True])
@torch.no_grad()
def test_the_fused_convolution_is_the_plain_one(dtype, pays, tolerance, monkeypatch):
    """A private operator of PyTorch: it must do what the line beside it does, and be dispensable. In bfloat16
    it fails on processors that only emulate this."""
    if dtype == torch.bfloat16 and pays and not bf16_pays():
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr("flowlib.fused.bf16_pays", lambda: pays)
    expected = 1 if pays or dtype == torch.float32 else 3
    torch.manual_seed(0)
    net, x = randomize(CouplingNet(6, 32, 12)), torch.randn(2, 6, 8, 8)
    net.compute_dtype = dtype
    calls = []
    monkeypatch.setattr(torch.nn.functional, "conv2d", counted(torch.nn.functional.conv2d, calls))
    fused = net(x)
    assert len(calls) == expected  # the last one, which has no ReLU, or all
    monkeypatch.setattr(torch.ops, "mkldnn", WithoutFusedConvolutions())
    plain = net(x)
    assert len(calls) == expected + 3 and (fused - plain).abs().max() <= tolerance * plain.abs().max()


@fused_only
@pytest.mark.parametrize("dtype,tolerance", [(None, 1e-5), (torch.bfloat16, 0.02)])
@torch.no_grad()
def test_a_flow_does_without_the_fused_convolution(dtype, tolerance, monkeypatch):
    glow, x = small_glow(torch.float32, hidden_channels=16), torch.rand(2, 3, 8, 8) - 0.5
    set_compute_dtype(glow, dtype)
    latents, log_det = glow(x)
    monkeypatch.setattr(torch.ops, "mkldnn", WithoutFusedConvolutions())
    plain, plain_log_det = glow(x)
    assert all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(latents, plain))
    torch.testing.assert_close(log_det, plain_log_det, rtol=tolerance, atol=tolerance)
    assert (glow.inverse(plain)[0] - x).abs().max() < 2 * tolerance


def counted(function, calls):
    """function, which notes each of its calls."""

    def run(*args, **options):
        calls.append(function)
        return function(*args, **options)

    return run


@pytest.mark.parametrize(
    "x,message",
    [
        (torch.zeros(1, 3, 10, 12), "height 10 and width 12 must both be divisible by 2\\^num_levels = 4"),
        (torch.zeros(1, 1, 8, 8), "expected images \\(B, 3, H, W\\)"),
        (torch.zeros(3, 8, 8), "expected images"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating-point"),
    ],
)
def test_bad_images_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        Glow(num_levels=2, num_steps=1, hidden_channels=4)(x)


def test_unknown_scale_rule_is_named():
    with pytest.raises(ValueError, match="unknown scale rule 'softplus'; choose one of tanh, sigmoid, exp"):
        Glow(num_levels=1, num_steps=1, hidden_channels=4, scale="softplus")


def test_half_precision_flows_sum_in_float32():
    """The flow of 64x64 images has log-probabilities beyond the largest 16-bit number."""
    glow = small_glow(torch.float32)
    x = torch.zeros(1, 3, 64, 64)
    glow.levels[0][0].actnorm.log_scale.data += 5
    expected = glow.bits_per_dim(x)
    for dtype in (torch.float16, torch.bfloat16):
        bits = glow.to(dtype).bits_per_dim(x.to(dtype))
        assert bits.dtype == torch.float32 and (bits / expected - 1).abs() < 0.02
    assert 79 < psnr(x.half() + 1e-4, x.half())[0] < 81


def test_a_singular_convolution_is_named():
    glow = small_glow(torch.float32)
    weight = glow.levels[0][0].invconv.weight.data
    weight[0] = weight[1]
    weight[0, 0] += 1e-7
    x = torch.rand(1, 3, 8, 8) - 0.5
    with pytest.warns(UserWarning, match="1x1 convolution is nearly singular"):
        glow.inverse(glow(x)[0])
    weight[0] = weight[1]
    with pytest.warns(UserWarning, match="1x1 convolution is nearly singular"):
        glow.inverse(glow(x)[0])


def test_a_sound_convolution_is_not_warned_of():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            InvConv1x1(192).to(dtype).inverse(torch.ones(1, 192, 2, 2, dtype=dtype))


def test_a_failed_initialisation_can_be_repeated():
    torch.manual_seed(0)
    glow = Glow(num_levels=2, num_steps=2, hidden_channels=8)
    before = {k: v.clone() for k, v in glow.state_dict().items()}
    with pytest.raises(ValueError, match="standard deviation"):
        glow.initialize(torch.rand(1, 3, 4, 4))
    assert not glow.initialized and all(torch.equal(v, before[k]) for k, v in glow.state_dict().items())
    glow.initialize(torch.rand(16, 3, 8, 8))
    assert glow.initialized


def test_numpy_sizes_and_empty_batches():
    two = np.int64(2)
    glow = Glow(num_levels=two, num_steps=two, hidden_channels=np.array([4, 4]), last_level_steps=np.int32(1))
    assert len(glow.levels) == 2 and glow.latent_shapes(np.int64(8)) == glow.latent_shapes((8, 8))
    assert all(type(value) in (int, list, str, float, bool, type(None)) for value in glow.config.values())
    empty = torch.zeros(0, 3, 8, 8)
    for mode in ("plain", "reversible", "checkpoint"):
        set_memory(glow, mode)
        latents, log_det = glow(empty)
        assert glow.inverse(latents)[0].shape == (0, 3, 8, 8) and log_det.shape == glow.bits_per_dim(
            empty
        ).shape == (0,)
    with torch.no_grad():
        assert glow.sample(0, np.int64(8)).shape == (0, 3, 8, 8)


class WithoutFloat64(TorchDispatchMode):
    """Stands for a device that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("no float64 on this device")
        return result


def test_devices_without_float64():
    with WithoutFloat64():
        glow = small_glow(torch.float32)
        x = torch.rand(2, 3, 8, 8) - 0.5
        assert (glow.inverse(glow(x)[0])[0] - x).abs().max() < 1e-4
        blurred = Blur().A(x)
    torch.testing.assert_close(blurred, Blur().A(x))
    blur = Blur()
    with WithoutFloat64():
        blur.to(torch.device("meta"))  # as .to("mps") meets it
    assert blur.kernel.dtype == torch.float32


@torch.no_grad()
def test_function_transforms():
    glow = small_glow(torch.float32)
    x = torch.rand(3, 3, 8, 8) - 0.5
    torch.testing.assert_close(torch.func.vmap(lambda v: glow.log_prob(v[None])[0])(x), glow.log_prob(x))
    twins = [small_glow(torch.float32), glow]
    parameters, buffers = torch.func.stack_module_state(twins)
    run = torch.func.vmap(lambda p, b: torch.func.functional_call(glow, (p, b), (x,))[1])
    torch.testing.assert_close(run(parameters, buffers)[1], glow(x)[1])
    glow.requires_grad_(False)
    score = torch.func.grad(lambda v: glow.log_prob(v).sum())(x)
    assert score.shape == x.shape
    assert torch.equal(copy.deepcopy(glow)(x)[1], glow(x)[1])


@pytest.mark.parametrize(
    "make", [lambda: GlowProx(small_glow(torch.float32)), lambda: UNetProx(2), lambda: ResNetProx(4)]
)
def test_parameters_are_contiguous(make):
    """So that torch.optim.LBFGS and parameters_to_vector take them."""
    solver = UnfoldedPGD([make()], torch.zeros(1, 3, 16, 16))
    torch.nn.utils.parameters_to_vector(solver.parameters())
    x = torch.rand(2, 3, 16, 16)

    def closure():
        optimizer.zero_grad()
        loss = (solver.proxes[0](x, 0.1) - x).square().mean()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(solver.parameters(), max_iter=2)
    optimizer.step(closure)


def test_contiguous_squeeze_and_scale_bias():
    glow = small_glow(scale="sigmoid", scale_bias=(0.1, 1.0), contiguous_squeeze=(True, False))
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64) - 0.5
    latents, log_det = glow(x)
    torch.testing.assert_close(glow.inverse(latents)[0], x)
    flat = lambda t: torch.cat([z.flatten() for z in glow(t)[0]])  # noqa: E731
    torch.testing.assert_close(log_det[0], jacobian_log_det(flat, x))
    assert torch.equal(Squeeze(contiguous=True).inverse(Squeeze(contiguous=True)(x)), x)
    with pytest.raises(ValueError, match="scale_bias goes with sigmoid"):
        Glow(num_levels=1, scale_bias=0.1)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_autocast_leaves_layers_alone(make):
    torch.manual_seed(0)
    layer, x = randomize(make()), torch.randn(2, 4, 8, 8)
    (y, log_det), back = layer(x), layer.inverse(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], y) and torch.equal(layer(x)[1], log_det)
        assert torch.equal(layer.inverse(x)[0], back)


@pytest.mark.parametrize("autocast", [False, True])
def test_types_of_images_and_latents(autocast):
    glow, x = small_glow(torch.float32), torch.rand(1, 3, 8, 8) - 0.5
    latents = glow(x)[0]
    message = "torch.float64 do not fit weights of torch.float32: give x.to"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for call in (glow, glow.log_prob, glow.bits_per_dim, glow.initialize):
            with pytest.raises(ValueError, match=message):
                call(x.double())
            with pytest.raises(ValueError, match="floating-point images, got torch.uint8"):
                call(x.to(torch.uint8))
        with pytest.raises(ValueError, match=message):
            glow.inverse([z.double() for z in latents])
        torch.testing.assert_close(glow(x.half())[1], glow(x)[1], atol=0.1, rtol=0.01)


def test_samples_do_not_depend_on_pytorchs_defaults():
    glow = small_glow(torch.float32)
    expected = glow.sample(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):  # stands for a GPU as the default device
        assert torch.equal(glow.sample(2, 8, generator=torch.Generator("cpu").manual_seed(0)), expected)
        assert glow.sample(2, 8).device.type == glow.mode(8).device.type == "cpu"
