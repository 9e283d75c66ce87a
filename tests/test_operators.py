"""Measurement operators: exact adjoints, hand-computed references, noise from its generator, clear errors."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from flowlib import Blur, Denoising, Inpainting, LinearOperator

OPERATORS = {
    "denoising": Denoising(0.2),
    "inpainting": Inpainting(5, (16, 12)),
    "free mask": Inpainting.from_mask(torch.rand(16, 12) > 0.5),
    **{f"blur {b}": Blur(2.0, 7, b) for b in Blur.BOUNDARIES},
    "blurred, then masked": Inpainting(5, (16, 12)) @ Blur(2.0, 7, "reflect"),
}


INTEGERS = torch.zeros(1, 3, 16, 12, dtype=torch.uint8)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_adjoint(operator):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 3, 16, 12, dtype=torch.float64, generator=generator)
    torch.testing.assert_close((operator.A(x) * y).sum(), (x * operator.A_adjoint(y)).sum())
    _, by_autograd = torch.autograd.functional.vjp(operator.A, x, y)
    torch.testing.assert_close(operator.A_adjoint(y), by_autograd)


@pytest.mark.parametrize("boundary,mode", [("circular", "wrap"), ("zero", "constant"), ("reflect", "mirror")])
def test_blur_is_scipys(boundary, mode):
    x = np.random.default_rng(0).normal(size=(16, 12))
    offsets = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (offsets / 5) ** 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    expected = scipy.ndimage.convolve(x, kernel, mode=mode)
    ours = Blur(5.0, 9, boundary).A(torch.from_numpy(x)[None, None])[0, 0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


def test_inpainting_blocks_the_centre_and_adds_no_noise_there():
    operator = Inpainting(19, 64, sigma=0.3)
    assert int((operator.mask == 0).sum()) == 19 * 19
    y = operator.measure(torch.ones(1, 3, 64, 64), torch.Generator().manual_seed(0))
    assert (y[..., 22:41, 22:41] == 0).all()
    assert 0.28 < (y - 1)[operator.mask.expand_as(y) == 1].std() < 0.32


def test_noise_follows_its_generator_and_level():
    x = torch.zeros(4, 3, 32, 32)
    first, same, other = (Denoising(0.2).measure(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert 0.19 < first.std() < 0.21
    assert torch.equal(Blur(2.0, 7).measure(x), Blur(2.0, 7).A(x))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Denoising(-1), "sigma must be >= 0"),
        (lambda: Denoising(float("nan")), "sigma must be >= 0"),
        (lambda: Inpainting(80, 64), "mask_size 80 does not fit an image of 64x64"),
        (lambda: Inpainting.from_mask(torch.full((4, 4), 0.5)), "binary"),
        (lambda: Inpainting(5, 16).A(torch.zeros(1, 3, 8, 8)), "do not fit the mask"),
        (lambda: Blur(5.0, 8), "kernel_size must be odd"),
        (lambda: Blur(5.0, 9, "wrap"), "choose one of circular, zero, reflect"),
        (lambda: Blur(5.0, 33).A(torch.zeros(1, 3, 16, 16)), "reaches beyond"),
        *[(lambda sigma_b=b: Blur(sigma_b), "sigma_b must be positive") for b in (0.0, -1.0, float("nan"))],
        *[(lambda o=o: o.A(INTEGERS), "floating-point images, got torch.uint8") for o in OPERATORS.values()],
        *[(lambda o=o: o.A_adjoint(INTEGERS), "floating-point") for o in OPERATORS.values()],
        (lambda: Denoising().measure(INTEGERS), "floating-point"),
        (
            lambda: Inpainting.from_mask(torch.ones(2, 1, 8, 8)).A(torch.zeros(1, 3, 8, 8)),
            "do not fit the mask",
        ),
        (lambda: Inpainting.from_mask(torch.ones(3, 8, 8)).A(torch.zeros(1, 1, 8, 8)), "do not fit the mask"),
    ],
)
def test_errors_name_the_fault(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (1, 1, 8, 8), (2, 1, 8, 8), (2, 3, 8, 8)])
def test_masks_of_all_images_or_of_each(shape):
    mask = torch.rand(shape) > 0.5
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(Inpainting.from_mask(mask).A(x), x * mask)


def test_noise_of_a_composition_can_be_changed():
    composed, x = Inpainting(3, 8) @ Blur(), torch.zeros(1, 3, 8, 8)
    assert composed.measure(x).abs().max() == 0
    composed.sigma = 0.1
    assert composed.first.sigma == 0 and composed.second.sigma == composed.sigma == 0.1
    assert composed.measure(x, torch.Generator().manual_seed(0)).std() > 0.05


def test_a_mask_is_the_operators_own():
    mask = torch.ones(8, 8)
    operator = Inpainting.from_mask(mask)
    mask[:] = 0
    assert operator.mask.all()


def test_sizes_from_numpy():
    assert torch.equal(Inpainting(np.int64(3), np.int64(8)).mask, Inpainting(3, (8, 8)).mask)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_blocked_pixels_hold_does_not_count(value):
    operator, x = Inpainting(3, 8), torch.rand(2, 3, 8, 8)
    broken = torch.where(operator.mask.bool(), x, value)
    assert torch.equal(operator.A(broken), operator.A(x))
    assert torch.equal(operator.A_adjoint(broken), operator.A_adjoint(x))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_autocast_leaves_operators_alone(operator):
    x, y = torch.randn(2, 2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    expected = [f(x) for f in (operator.A, operator.A_adjoint)]
    measured = operator.measure(x, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(f(x), e) for f, e in zip((operator.A, operator.A_adjoint), expected))
        assert torch.equal(operator.measure(x, torch.Generator().manual_seed(1)), measured)


class Mixed(LinearOperator):
    """One's own, by a matrix for each row of pixels."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def A(self, x):
        return x @ self.matrix.to(x)

    def A_adjoint(self, y):
        return y @ self.matrix.to(y).T


def test_autocast_leaves_measurements_by_ones_own_operator_alone():
    operator, x = Mixed(torch.rand(12, 12)), torch.rand(1, 3, 16, 12)
    expected = operator.A(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator.measure(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_an_operator(dtype):
    matrix, like = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 16, 12)
    for operator, exact in (
        (Mixed(matrix), torch.linalg.matrix_norm(matrix, 2) ** 2),
        (Mixed(0 * matrix), 0),
    ):
        found = operator.norm_squared(like.to(dtype))
        assert found == operator.norm_squared(like.to(dtype)) and 0.95 * exact <= found <= 1.0001 * exact
    for operator in OPERATORS.values():
        exact = operator.norm_squared(like.double(), num_steps=300)
        assert 0.95 * exact <= operator.norm_squared(like.to(dtype)) <= 1.0001 * exact


def test_noise_does_not_depend_on_pytorchs_defaults():
    operators, x = (Denoising(0.2), Inpainting(3, 8, sigma=0.1), Blur(sigma=0.1)), torch.rand(1, 3, 8, 8)
    expected = [o.measure(x, torch.Generator().manual_seed(0)) for o in operators]
    with torch.device("meta"):  # stands for a GPU as the default device
        found = [o.measure(x, torch.Generator("cpu").manual_seed(0)) for o in operators]
        assert all(torch.equal(*pair) for pair in zip(found, expected))
        assert Denoising(0.2).measure(x).device.type == "cpu"
    assert Inpainting(3, 8).to("meta").A(x.to("meta")).shape == x.shape
    assert Inpainting(3, 8).A(x.to("meta")).device.type == Blur().A(x.to("meta")).device.type == "meta"
