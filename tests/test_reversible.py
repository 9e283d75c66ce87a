"""Invertible backpropagation: the gradients of plain backpropagation, in memory that does not grow with
depth."""

import pytest
import torch
from torch.nn.utils import parametrizations

from companion.memory import kept_bytes
from flowlib import Glow, GlowProx, Inpainting, UnfoldedPGD, set_memory
from tests.test_flow import randomize, small_glow


def gradients(model, loss, x, mode):
    set_memory(model, mode)
    x = x.clone().requires_grad_()
    model.zero_grad()
    loss(model, x).backward()
    return [x.grad, *[p.grad.clone() for p in model.parameters()]]


def assert_same_gradients(model, loss, x, tolerance):
    plain = gradients(model, loss, x, "plain")
    for mode in ("reversible", "checkpoint"):
        for expected, ours in zip(plain, gradients(model, loss, x, mode)):
            assert (ours - expected).norm() <= tolerance * expected.norm()


LOSSES = {
    "forward": lambda glow, x: glow.bits_per_dim(x).mean() + sum((z**3).mean() for z in glow(x)[0]),
    "inverse": lambda glow, x: sum(
        (t**3).mean() for t in glow.inverse([x, x[:, :, ::2, ::2].repeat(1, 4, 1, 1)])
    ),
    "both": lambda glow, x: (glow.inverse([z * 0.9 for z in glow(x)[0]])[0] ** 3).sum(),
}


@pytest.mark.parametrize("scale", ["tanh", "sigmoid", "exp"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_of_the_flow(loss, scale):
    glow = small_glow(scale=scale, last_level_steps=2)
    channels = 6 if loss is LOSSES["inverse"] else 3
    x = torch.rand(2, channels, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert_same_gradients(glow, loss, x, 1e-6)


def test_gradients_of_the_solver():
    proxes = [GlowProx(small_glow()) for _ in range(3)]
    solver = UnfoldedPGD(proxes, proxes[0].glow.mode(8))
    operator = Inpainting(3, 8)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    assert_same_gradients(solver, lambda s, x: (s(operator.A(x), operator) - x).square().mean(), x, 1e-6)


def test_memory_does_not_grow_with_depth():
    x = torch.rand(2, 3, 16, 16)

    def kept(mode, steps):
        torch.manual_seed(0)
        glow = randomize(Glow(num_levels=2, num_steps=steps, hidden_channels=16), scale=0.05)
        set_memory(glow, mode)
        return kept_bytes(glow, lambda flow: flow.bits_per_dim(x).mean())

    assert kept("reversible", 8) == kept("reversible", 2)
    assert kept("plain", 8) > 2.5 * kept("plain", 2)
    assert kept("reversible", 8) < kept("checkpoint", 8) < kept("plain", 8)


def test_the_callers_input_is_left_alone():
    glow = small_glow(torch.float32)
    set_memory(glow, "reversible")
    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    glow.bits_per_dim(x).mean().backward()
    assert torch.equal(x, before)


def test_hooks_on_parameters_fire_once():
    glow = small_glow()
    set_memory(glow, "reversible")
    fired = []
    for name, parameter in glow.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    glow.bits_per_dim(torch.rand(2, 3, 8, 8, dtype=torch.float64)).mean().backward()
    assert sorted(fired) == sorted(name for name, _ in glow.named_parameters())


def test_frozen_flows():
    """Plug-and-play: only some parameters are trained, or none and only the input's gradient is asked for."""
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    for trained in ([], ["levels.1.0.coupling.net.conv2.weight"], ["levels.0.1.invconv.weight"]):
        glow = small_glow().requires_grad_(False)
        for name in trained:
            glow.get_parameter(name).requires_grad_()

        def found(mode, glow=glow, trained=trained):
            set_memory(glow, mode)
            glow.zero_grad()
            t = x.clone().requires_grad_()
            LOSSES["both"](glow, t).backward()
            return [t.grad, *[glow.get_parameter(name).grad.clone() for name in trained]]

        for expected, ours in zip(found("plain"), found("reversible")):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_parametrised_weights(frozen):
    """Weights that are computed from others: an orthogonal 1x1 convolution, a weight-normalised net."""
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    glow = small_glow()
    parametrizations.orthogonal(glow.levels[0][0].invconv, "weight")
    parametrizations.weight_norm(glow.levels[1][0].coupling.net.conv2, "weight")
    if frozen:
        glow.levels[0][0].invconv.requires_grad_(False)
        glow.levels[1][0].coupling.net.conv2.parametrizations.weight.original0.requires_grad_(False)

    def found(mode):
        set_memory(glow, mode)
        glow.zero_grad(set_to_none=False)
        LOSSES["both"](glow, x).backward()
        return {name: p.grad.clone() for name, p in glow.named_parameters() if p.requires_grad}

    plain, ours = found("plain"), found("reversible")
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, msg=name)


@pytest.mark.parametrize("mode", ["plain", "reversible", "checkpoint"])
def test_autocast_leaves_the_affine_maps_alone(mode):
    """Also where the backward pass runs under it, or a layer before it gave 16 bits."""
    glow = small_glow(torch.float32)
    x = torch.rand(2, 3, 8, 8) - 0.5
    expected = gradients(glow, LOSSES["both"], x, mode)
    with torch.autocast("cpu", torch.bfloat16):
        set_memory(glow, mode)
        t = x.clone().requires_grad_()
        glow.zero_grad()
        loss = LOSSES["both"](glow, t)
        if mode == "reversible":
            loss.backward()
        latents, log_det = glow(x=x.bfloat16())  # as a keyword, too
        assert latents[0].dtype == log_det.dtype == torch.float32
        prox = GlowProx(glow)(x, 0.1)
    if mode != "reversible":  # what autograd itself does going back, autocast would do in 16 bits
        loss.backward()
    for ours, theirs in zip([t.grad, *[p.grad for p in glow.parameters()]], expected):
        assert torch.equal(ours, theirs)
    assert torch.equal(prox, GlowProx(glow)(x, 0.1))


@pytest.mark.parametrize("inverse", [False, True])
def test_half_precision_chain(inverse):
    """Log-determinants are summed in float32, images and gradients keep their 16 bits."""
    glow = small_glow(torch.bfloat16)
    set_memory(glow, "reversible")
    latents, log_det = glow(torch.rand(2, 3, 8, 8, dtype=torch.bfloat16) - 0.5)
    if inverse:
        latents, log_det = glow.inverse([z.detach() for z in latents])
    (log_det.sum() + latents[0].float().sum()).backward()
    assert log_det.dtype == torch.float32 and latents[0].dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.bfloat16 for p in glow.parameters())


def test_second_derivatives_are_refused():
    glow = small_glow()
    x = (torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5).requires_grad_()

    def penalty(mode):
        set_memory(glow, mode)
        score = torch.autograd.grad(glow.log_prob(x).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(score.square().mean(), x)[0]

    torch.testing.assert_close(penalty("checkpoint"), penalty("plain"))
    with pytest.raises(RuntimeError, match="no second derivatives: use set_memory"):
        penalty("reversible")


def test_weights_changed_before_the_backward_pass_are_noticed():
    glow = small_glow()
    set_memory(glow, "reversible")
    loss = glow.bits_per_dim(torch.rand(2, 3, 8, 8, dtype=torch.float64)).mean()
    with torch.no_grad():
        glow.levels[0][0].invconv.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("loss", [LOSSES["forward"], LOSSES["both"]])
def test_functional_call_is_refused(mode, loss):
    """Weights that are in the model only while it runs forward: plain backpropagation keeps them, others say
    that they do not."""
    glow, other = small_glow(), small_glow().requires_grad_(False)
    with torch.no_grad():
        weights = {k: v * 1.1 if v.is_floating_point() else v for k, v in other.state_dict().items()}
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64).requires_grad_()

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.glow = glow

        def forward(self, x):
            return loss(self.glow, x)

    def gradient(mode):
        set_memory(glow, mode)
        called = torch.func.functional_call(Loss(), {f"glow.{k}": v for k, v in weights.items()}, (x,))
        return torch.autograd.grad(called, x)[0]

    assert torch.isfinite(gradient("plain")).all()
    with pytest.raises(RuntimeError, match=f"'{mode}' knows no functional_call: use set_memory"):
        gradient(mode)


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="choose one of plain, reversible, checkpoint"):
        set_memory(small_glow(), "fast")
