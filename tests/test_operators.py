"""Measurement operators: exact adjoints, hand-computed references, noise from its generator, clear errors."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from flowlib import Blur, Denoising, Inpainting

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
