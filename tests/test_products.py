"""The coupling net as matrix products: what convolutions give, going forward and back."""

import pytest
import torch
from torch.func import functional_call, jvp, vmap

from companion.memory import kept_bytes
from flowlib import GlowProx, Inpainting, UnfoldedPGD, products, set_compute_dtype, set_coupling, set_memory
from flowlib.fused import fuse_nets
from flowlib.layers import AffineCoupling, CouplingNet
from tests.test_flow import randomize, small_glow

SHAPES = {"square": (3, 4, 6, 6), "flat": (2, 4, 3, 8), "one": (1, 6, 4, 2), "a pixel": (2, 4, 1, 1)}


method = pytest.mark.parametrize("method", ["products", "products-again"])


@pytest.fixture
def light_compiler(monkeypatch):
    """What torch.compile makes of a function is tested without generated code, which would take minutes."""
    monkeypatch.setattr(products, "COMPILER", {"dynamic": False, "backend": "aot_eager"})
    products._compiled.cache_clear()
    yield
    products._compiled.cache_clear()


def net_and_input(shape, dtype, out=None, hidden=5):
    torch.manual_seed(0)
    net = randomize(CouplingNet(shape[1], hidden, out or 2 * shape[1])).to(dtype)
    return net, torch.randn(shape, dtype=dtype, requires_grad=True)


def outcome(net, x, method, loss=lambda y: (y**3).mean() + y.square().sum()):
    """The net's output, and the gradients of x and of each parameter."""
    set_coupling(net, method)
    net.zero_grad()
    y = net(x)
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(loss(y), [t for t in inputs if t.requires_grad])]


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@method
def test_values_and_gradients(shape, dtype, method):
    net, x = net_and_input(shape, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_same(outcome(net, x, method), outcome(net, x, "plain"), tolerance)


@pytest.mark.parametrize("scale", ["tanh", "sigmoid", "exp"])
@method
def test_both_directions_of_a_coupling(scale, method):
    x = torch.randn(2, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    coupling = randomize(AffineCoupling(4, 5, scale)).double()

    def found(method, direction):
        set_coupling(coupling, method)
        y, log_det = direction(x)
        return [y, *torch.autograd.grad((y**3).sum() + log_det.sum(), [x, *coupling.parameters()])]

    for direction in (coupling, coupling.inverse):
        assert_same(found(method, direction), found("plain", direction), 1e-11)


@pytest.mark.parametrize("memory", ["plain", "reversible", "checkpoint"])
@method
def test_a_solver_in_every_memory_mode(memory, method):
    solver = UnfoldedPGD([GlowProx(small_glow(num_steps=1))], torch.zeros(1, 3, 8, 8).double())
    operator = Inpainting(3, 8)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5

    def found(memory, method):
        set_memory(solver, memory)
        set_coupling(solver, method)
        loss = (solver(operator.A(x), operator) - x).square().mean()
        return torch.autograd.grad(loss, list(solver.parameters()))

    assert_same(found(memory, method), found("plain", "plain"), 1e-7)


def test_against_finite_differences():
    net, x = net_and_input((1, 2, 2, 3), torch.float64, hidden=2)
    weights = [t.detach().requires_grad_() for conv in fuse_nets([net])[0] for t in conv]
    torch.autograd.gradcheck(products.METHODS["products"], (x, *weights), fast_mode=True)


@method
def test_in_bfloat16(method):
    net, x = net_and_input((2, 4, 6, 6), torch.float32, hidden=16)
    expected = outcome(net, x, "plain")
    set_compute_dtype(net, torch.bfloat16)
    outcomes = outcome(net, x, method), outcome(net, x, "plain"), expected
    for ours, theirs, exact in zip(*outcomes):
        assert ours.dtype == torch.float32  # and no worse than convolutions in bfloat16
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 0.004 * exact.norm()


@pytest.mark.parametrize("trained", [[], ["conv1.bias"], ["conv2.weight"], ["conv3.weight", "log_scale"]])
@pytest.mark.parametrize("with_x", [True, False])
@method
def test_frozen_parameters(trained, with_x, method):
    net, x = net_and_input((2, 4, 4, 4), torch.float64)
    net.requires_grad_(False)
    for name in trained:
        net.get_parameter(name).requires_grad_()
    x.requires_grad_(with_x)
    if trained or with_x:
        assert_same(outcome(net, x, method), outcome(net, x, "plain"), 1e-12)
    else:
        assert not net(x).requires_grad


def test_products_of_frozen_parameters_are_not_made():
    """A flow that is plugged in needs the gradient of its input alone."""
    net, x = net_and_input((2, 4, 4, 4), torch.float64)
    net.requires_grad_(False)
    set_coupling(net, "products")
    y = net(x)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["aten::mm"] == 2 and count["aten::bmm"] == 1


@method
def test_an_empty_batch_and_no_gradient(method):
    net, x = net_and_input((2, 4, 4, 4), torch.float32)
    with torch.no_grad():
        expected = net(x)
        set_coupling(net, method)
        torch.testing.assert_close(net(x), expected)
        assert net(x[:0]).shape == (0, *expected.shape[1:])


def test_a_layer_computed_again_is_not_kept():
    net, x = net_and_input((2, 4, 8, 8), torch.float32, hidden=64)

    def kept(method):
        set_coupling(net, method)
        return kept_bytes(net, lambda net: net(x))

    assert kept("products") - kept("products-again") == 2 * 8 * 8 * 64 * 4


@method
def test_second_derivatives_are_refused(method):
    net, x = net_and_input((2, 4, 4, 4), torch.float64)
    set_coupling(net, method)
    with pytest.raises(RuntimeError, match="no second derivatives: use set_coupling"):
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


@method
def test_transforms_take_the_convolutions(method):
    net, x = net_and_input((2, 4, 4, 4), torch.float64)
    x, tangent = x.detach(), torch.ones_like(x)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    calls = {
        "vmap": lambda: vmap(lambda image: net(image[None])[0])(x),
        "gradients by image": lambda: vmap(torch.func.grad(lambda image: net(image[None]).sum()))(x),
        "jvp": lambda: jvp(net, (x,), (tangent,))[1],
        "jvp of weights": lambda: jvp(lambda w: functional_call(net, w, x), (weights,), (weights,))[1],
    }
    expected = {name: call() for name, call in calls.items()}
    set_coupling(net, method)
    for name, call in calls.items():
        torch.testing.assert_close(call(), expected[name], msg=name)


@pytest.mark.parametrize("method", ["products-fused", "compiled"])
def test_compiled_methods(method, light_compiler):
    """Values, gradients and invertible backpropagation; transforms and frozen parameters."""
    net, x = net_and_input((2, 4, 3, 6), torch.float64)
    assert_same(outcome(net, x, method), outcome(net, x, "plain"), 1e-12)
    test_a_solver_in_every_memory_mode("reversible", method)
    set_coupling(net, method)
    vmap(lambda image: net(image[None])[0])(x.detach())
    with pytest.raises(RuntimeError, match="no second derivatives|double backward"):
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


def test_autocast_leaves_the_products_alone():
    net, x = net_and_input((2, 4, 4, 4), torch.float32)
    expected = outcome(net, x, "products")
    set_coupling(net, "products")
    weights = fuse_nets([net])[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, weights)
    assert torch.equal(y, expected[0])
    assert torch.equal(torch.autograd.grad((y**3).mean() + y.square().sum(), x)[0], expected[1])


def test_what_a_gpu_computes_in_one_kernel():
    rows, weight, bias = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    ours = torch._addmm_activation(bias, rows, weight.T)
    torch.testing.assert_close(ours, products._linear_relu(rows, weight, bias))


def test_unknown_methods_are_named():
    glow = small_glow()
    with pytest.raises(ValueError, match="unknown coupling method 'fast'; choose one of plain, products"):
        set_coupling(glow, "fast")
    set_coupling(glow, "products")
    assert {m.coupling_method for m in glow.modules() if isinstance(m, CouplingNet)} == {"products"}
