"""Proximal mappings and the unfolded solver: the formula of one fold, gradients, fold reports, sizes."""

import numpy as np
import pytest
import torch

from flowlib import (
    Blur,
    Denoising,
    Glow,
    GlowProx,
    Inpainting,
    LinearOperator,
    ResNetProx,
    UNetProx,
    UnfoldedPGD,
    psnr,
    ssim,
)
from flowlib.folds import find_nonfinite_fold
from flowlib.images import dequantize, to_tensor, to_uint8
from tests.test_flow import randomize


def small_solver(num_folds=2, **options):
    torch.manual_seed(0)
    proxes = [
        GlowProx(randomize(Glow(num_levels=2, num_steps=1, hidden_channels=4).double(), seed=k))
        for k in range(num_folds)
    ]
    return UnfoldedPGD(proxes, proxes[0].glow.mode(16), **options)


def measurement():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) - 0.5
    operator = Inpainting(5, 16)
    return x, operator, operator.measure(x)


def test_folds_follow_the_formula():
    solver = small_solver(step_size=[0.5, 0.7], shrinkage=[0.1, -0.05])
    x, operator, y = measurement()
    expected = solver.x0.expand(2, -1, -1, -1)
    for prox, mu, lam in zip(solver.proxes, (0.5, 0.7), (0.1, -0.05)):
        x_tilde = expected + mu * (operator.mask * (y - operator.mask * expected))
        latents = prox.glow(x_tilde)[0]
        expected = prox.glow.inverse([z / (1 + lam) for z in latents])[0]
    torch.testing.assert_close(solver(y, operator), expected)
    solver.literal_last_fold = True
    torch.testing.assert_close(solver(y, operator), x_tilde)


def test_operators_may_differ_by_fold():
    solver = small_solver()
    x, operator, y = measurement()
    other = Inpainting(9, 16)
    x_1 = solver(y, operator, return_folds=True)[1][0].x
    x_tilde = x_1 + 0.5 * other.A_adjoint(y - other.A(x_1))
    torch.testing.assert_close(solver(y, [operator, other]), solver.proxes[1](x_tilde, solver.shrinkage[1]))
    with pytest.raises(ValueError):
        solver(y, [operator])


def test_the_step_descends_the_data_term():
    solver = small_solver(num_folds=1, shrinkage=0.0)
    x, operator, y = measurement()
    residual = (y - operator.A(solver.x0)).square().sum()
    assert (y - operator.A(solver(y, operator))).square().sum() < residual


def test_fold_reports_agree_with_the_flow():
    solver = small_solver()
    x, operator, y = measurement()
    x_hat, folds = solver(y, operator, return_folds=True)
    torch.testing.assert_close(x_hat, folds[-1].x)
    glow = solver.proxes[1].glow
    latents = glow(folds[1].x_tilde)[0]
    norm = torch.cat([z.flatten(1) for z in latents], dim=1).norm(dim=1)
    torch.testing.assert_close(folds[1].latent_norm_tilde, norm)
    torch.testing.assert_close(folds[1].latent_norm, norm / 1.1)
    torch.testing.assert_close(folds[1].log_prob, glow.log_prob(folds[1].x))


@pytest.mark.parametrize("kind", ["glow", "unet", "resnet"])
def test_every_parameter_gets_a_gradient(kind):
    if kind == "glow":
        solver = small_solver()
    else:
        torch.manual_seed(0)
        make = {"unet": lambda: UNetProx(width=2), "resnet": lambda: ResNetProx(width=4)}[kind]
        solver = UnfoldedPGD(
            [make().double() for _ in range(2)], torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        )
    x, operator, y = measurement()
    (solver(y, operator) - x).square().mean().backward()
    for name, parameter in solver.named_parameters():
        assert parameter.grad is not None, name
    assert solver.step_size.grad.abs().min() > 0
    assert kind != "glow" or solver.shrinkage.grad.abs().min() > 0


def test_sizes_of_the_paper():
    assert sum(p.numel() for p in UNetProx().parameters()) == 31_037_763
    assert sum(p.numel() for p in ResNetProx(width=64).parameters()) == 156_995


def test_the_fold_that_broke_is_named():
    solver = small_solver()
    x, operator, y = measurement()
    with torch.no_grad():
        solver.proxes[1].glow.levels[0][0].actnorm.bias[0] = float("nan")
    assert find_nonfinite_fold(solver(y, operator, return_folds=True)[1]) == "fold 2: the proximal mapping"
    solver = small_solver()
    assert find_nonfinite_fold(solver(y, operator, return_folds=True)[1]) is None
    assert (
        find_nonfinite_fold(solver(y * float("nan"), operator, return_folds=True)[1])
        == "fold 1: the data-consistency step"
    )


def test_measurements_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="do not fit x0"):
        small_solver()(torch.zeros(1, 3, 8, 8, dtype=torch.float64), Denoising(0.1))
    with pytest.raises(ValueError, match="height 24 and width 16"):
        UNetProx(width=2)(torch.zeros(1, 3, 24, 16))


def test_psnr_and_ssim():
    x = torch.zeros(2, 3, 16, 16)
    noisy = torch.stack([x[0] + 0.1, x[1] + 0.01])
    torch.testing.assert_close(psnr(noisy, x), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    image = torch.rand(1, 3, 16, 16)
    assert ssim(image, image)[0] == 1 and ssim(image, 1 - image)[0] < 0.5
    for wrong in (image[:, :1], image.expand(3, -1, -1, -1), image[0]):
        for metric in (psnr, ssim):
            with pytest.raises(ValueError, match="of one shape"):
                metric(wrong, image)
    assert 79 < psnr(image.half() * 0 + 1e-4, image.half() * 0)[0] < 81 and psnr(
        image[:0], image[:0]
    ).shape == (0,)


class Clip(torch.nn.Module):
    """A user's own prox: just a forward."""

    def forward(self, x, shrinkage):
        assert shrinkage is None
        return x.clamp(-0.5, 0.5)


def test_a_prox_of_ones_own():
    x, operator, y = measurement()
    solver = UnfoldedPGD([Clip(), Clip()], torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    x_hat, folds = solver(y, operator, return_folds=True)
    assert torch.equal(x_hat, folds[-1].x) and folds[0].latent_norm is None and folds[0].log_prob is None
    assert [name for name, _ in solver.named_parameters()] == ["step_size"]


def test_folds_of_other_kinds():
    x, operator, y = measurement()
    glow = small_solver().proxes[0]

    class Unconcerned(Clip):
        def forward(self, x, shrinkage):
            return x.clamp(-0.5, 0.5)

    solver = UnfoldedPGD(
        [Unconcerned(), glow, UNetProx(2).double()], torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    )
    x_hat, folds = solver(y, operator, return_folds=True)
    assert [fold.latent_norm is None for fold in folds] == [True, False, True]
    assert folds[1].latent_norm.shape == (2,)


def test_a_solver_needs_a_prox():
    with pytest.raises(ValueError, match="one prox for each of its folds"):
        UnfoldedPGD([], torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("convert", [to_tensor, dequantize])
def test_only_grey_levels_become_tensors(convert):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    for wrong in (pixels / 255, pixels.astype(np.int64), pixels[0]):
        with pytest.raises(ValueError, match="expected uint8 images"):
            convert(wrong)
    assert np.array_equal(to_uint8(to_tensor(pixels)), pixels)


def test_a_nan_in_a_blocked_pixel_does_not_count():
    solver, (_, operator, y) = small_solver(), measurement()
    assert torch.equal(solver(torch.where(operator.mask.bool(), y, torch.nan), operator), solver(y, operator))


@pytest.mark.parametrize("shrinkage", [-1, -1.0, -3, [0.1, -1.0], float("nan")])
def test_shrinkage_that_divides_by_zero_is_refused(shrinkage):
    with pytest.raises(ValueError, match="shrinkage must be > -1"):
        small_solver(shrinkage=shrinkage)
    if not isinstance(shrinkage, list):
        with pytest.raises(ValueError, match="shrinkage must be > -1"):
            small_solver().proxes[0](measurement()[0], shrinkage)


def test_types_of_measurements():
    solver, (_, operator, y) = small_solver().float(), measurement()
    expected = solver(y.float(), operator)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(solver(y.to(dtype), operator), expected, atol=0.1, rtol=0)
        with pytest.raises(ValueError, match=f"torch.float32 do not fit a solver of {dtype}"):
            solver.to(dtype)(y.float(), operator)
        solver.float()
    for wrong in (torch.uint8, torch.int64, torch.float64):
        with pytest.raises(ValueError, match=f"{wrong} do not fit a solver of torch.float32: see flowlib"):
            solver(y.to(wrong), operator)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="floating-point images, got torch.uint8"):
            metric((255 * y).to(torch.uint8), (255 * y).to(torch.uint8))


class Fourier(LinearOperator):
    """As in MRI: complex measurements of real images."""

    def A(self, x):
        return torch.fft.fft2(x, norm="ortho")

    def A_adjoint(self, y):
        return torch.fft.ifft2(y, norm="ortho").real


class Doubled(LinearOperator):
    def A(self, x):
        return x.double()

    A_adjoint = A


def test_complex_measurements():
    solver, (x, _, _) = small_solver(), measurement()
    x_hat = solver(Fourier().measure(x), Fourier())
    torch.testing.assert_close(x_hat, solver(x, Denoising(0.0)))  # a unitary A: the step is that of A = 1
    with pytest.raises(ValueError, match="torch.complex128 do not fit a solver of torch.float32"):
        solver.float()(Fourier().measure(x), Fourier())


def test_an_operator_of_another_type_is_named():
    solver, (_, _, y) = small_solver().float(), measurement()
    with pytest.raises(ValueError, match="A_adjoint gave torch.float64, the solver is of torch.float32"):
        solver(y.float(), Doubled())


def test_operators_in_a_module_list():
    solver, (_, operator, y) = small_solver(), measurement()
    several = torch.nn.ModuleList([operator] * solver.num_folds)
    assert torch.equal(solver(y, several), solver(y, operator))


def test_scalars_lie_where_the_initial_guess_does():
    solver = UnfoldedPGD([GlowProx(Glow(1, 1, 4))], torch.zeros(1, 3, 8, 8, device="meta"))
    assert solver.step_size.device.type == solver.shrinkage.device.type == "meta"


def test_batches_of_no_image():
    solver, (x, operator, y) = small_solver(), measurement()
    assert solver(y[:0], operator).shape == (0, 3, 16, 16)
    x_hat, folds = solver(y[:0], operator, return_folds=True)
    assert folds[-1].log_prob.shape == (0,) and find_nonfinite_fold(folds) is None
    assert psnr(x_hat, x[:0]).shape == ssim(x_hat, x[:0]).shape == (0,)
    assert to_tensor(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 3, 8, 8)
    assert UnfoldedPGD([UNetProx(2)], torch.zeros(1, 3, 16, 16)).eval()(y[:0].float(), operator).shape[0] == 0


class Rows(LinearOperator):
    """A product of matrices, which autocast would make 16 bits wide."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def A(self, x):
        return x @ self.matrix

    def A_adjoint(self, y):
        return y @ self.matrix.T


class Conv(torch.nn.Conv2d):
    """A prox whose result autocast makes 16 bits wide."""

    def forward(self, x, shrinkage):
        return super().forward(x)


@pytest.mark.parametrize("operator", [Blur(), Inpainting(5, 16), Rows(torch.rand(16, 16) / 16)])
def test_autocast_leaves_the_data_step_alone(operator):
    torch.manual_seed(0)
    x0, y = torch.zeros(1, 3, 16, 16), torch.rand(2, 3, 16, 16) - 0.5
    flows = UnfoldedPGD([p.float() for p in small_solver().proxes], x0)
    expected = flows(y, operator)
    nets = UnfoldedPGD([Conv(3, 3, 1), Conv(3, 3, 1)], x0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flows(y, operator), expected)
        x_hat, folds = nets(y, operator, return_folds=True)
        data_step = nets.step_size[1].detach() * operator.A_adjoint(y - operator.A(folds[0].x))
    assert x_hat.dtype == torch.float32
    if not isinstance(operator, Rows):
        torch.testing.assert_close(folds[1].x_tilde, folds[0].x + data_step)


def test_a_step_size_for_ones_own_operator():
    """Means of four neighbours, the rest zeros: of norm 1/2. Steps of 4 take the whole residual."""
    matrix = torch.zeros(16, 16)
    for column in range(4):
        matrix[4 * column : 4 * column + 4, column] = 0.25
    operator, x = Rows(matrix), torch.rand(1, 3, 16, 16) - 0.5
    step_size = 1 / operator.norm_squared(x)
    assert 3.99 < step_size < 4.01
    y, x0 = operator.measure(x), torch.zeros_like(x)
    residuals = [
        (y - operator.A(UnfoldedPGD([Keep()], x0, step_size=mu)(y, operator))).norm() / y.norm()
        for mu in (0.5, step_size)
    ]
    assert residuals[1] < 0.05 < 0.5 < residuals[0]


class Keep(torch.nn.Module):
    def forward(self, x, shrinkage):
        return x


@pytest.mark.parametrize(
    "shrinkage",
    [np.float32(-2), np.int64(-1), np.array(-1.5), torch.tensor(-2.0), torch.tensor([[[0.1]], [[-3.0]]])],
)
def test_numbers_of_other_kinds_that_divide_by_zero_are_refused(shrinkage):
    with pytest.raises(ValueError, match="shrinkage must be > -1"):
        small_solver().proxes[0](measurement()[0], shrinkage)
    with torch.no_grad(), pytest.raises(ValueError, match="shrinkage must be > -1"):
        small_solver().proxes[0](measurement()[0], shrinkage)


def test_a_learnt_shrinkage_is_not_refused():
    """A training that goes astray is restarted, not stopped."""
    solver, (_, operator, y) = small_solver(), measurement()
    solver.shrinkage.data[:] = -2
    with torch.no_grad():
        assert solver(y, operator).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_images_are_not_drawn(value):
    image = torch.zeros(1, 3, 4, 4)
    image[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(image)
    with pytest.raises(ValueError, match="floating-point images, got torch.uint8"):
        to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    "make", [lambda: UNetProx(2), lambda: ResNetProx(4), lambda: GlowProx(Glow(3, 2, 1, hidden_channels=4))]
)
def test_images_of_a_wider_type_than_the_weights_are_named(make):
    prox, x = make().eval(), torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="torch.float64 do not fit weights of torch.float32: give x.to"):
        prox(x.double(), 0.1)
    with pytest.raises(ValueError, match="floating-point images, got torch.uint8"):
        prox((255 * x).to(torch.uint8), 0.1)
    torch.testing.assert_close(prox(x.half(), 0.1).float(), prox(x, 0.1), atol=0.01, rtol=0)


def test_scalars_do_not_depend_on_pytorchs_defaults():
    x0 = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    with torch.device("meta"):  # stands for a GPU as the default device
        solver = UnfoldedPGD([Keep()] * 2, x0, step_size=0.1)
        similarity = ssim(x0, x0)
    assert solver.step_size.tolist() == [0.1, 0.1] and similarity.tolist() == [1]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = dequantize(pixels, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        assert torch.equal(dequantize(pixels, torch.Generator("cpu").manual_seed(0)), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(dequantize(pixels, torch.Generator().manual_seed(0)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
