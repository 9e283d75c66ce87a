"""Classical reconstructions, without training. Each maps measurements y (B, C, H, W) and
their operator to an estimate of the same shape, with at most one parameter, chosen on validation images by
mean PSNR."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, inpaint_biharmonic

from companion.files import write_json
from companion.provenance import provenance
from companion.records import data_of, read, recorded, statistics
from companion.settings import TASKS, evaluation_code, retrain
from companion.training import batches
from flowlib.images import to_tensor
from flowlib.metrics import psnr, ssim
from flowlib.training import generator_for


def measurement(y, operator):
    """The measurements themselves."""
    return y


def _each(function, y, *args, **options):
    """A scikit-image function on every image of y."""
    images = [function(image, *args, channel_axis=0, **options) for image in y.numpy()]
    return torch.from_numpy(np.stack(images)).to(y)


def tv_denoising(y, operator, weight):
    """argmin_x ½‖x − y‖² + weight TV(x), every channel on its own (Rudin, Osher and Fatemi 1992; Chambolle
    2004)."""
    return _each(denoise_tv_chambolle, y, weight=weight, eps=1e-5)


def nl_means(y, operator, h):
    """Means of pixels whose 5 x 5 patches are alike (Buades et al. 2005), with the known noise level; h:
    decay of the weights, in units of that level."""
    sigma = operator.sigma
    return _each(
        denoise_nl_means, y, patch_size=5, patch_distance=4, h=h * sigma, sigma=sigma, fast_mode=False
    )


def biharmonic(y, operator):
    """The hole is filled with the solution of Δ²x = 0 that continues the measured pixels (Damelin and Hoang
    2018)."""
    return _each(inpaint_biharmonic, y, (operator.mask == 0).numpy())


def tv_inpainting(y, operator, num_iterations=500):
    """argmin_x TV(x) where A x = y, every channel on its own, by the primal-dual algorithm of Chambolle and
    Pock (2011).

    Without noise no weight has to be chosen: this is the limit of ½‖A x − y‖² + weight TV(x) as the weight
    goes to zero."""
    step = 8**-0.5  # 8 bounds the squared norm of the differences
    x, x_bar, dual = y, y, y.new_zeros(2, *y.shape)
    for _ in range(num_iterations):
        dual[0, ..., :-1, :] += step * x_bar.diff(dim=-2)
        dual[1, ..., :-1] += step * x_bar.diff(dim=-1)
        dual /= torch.hypot(*dual).clamp(min=1)
        divergence = dual.sum(0)
        divergence[..., 1:, :] -= dual[0, ..., :-1, :]
        divergence[..., 1:] -= dual[1, ..., :-1]
        x_new = x + step * divergence
        x_new = x_new + operator.A_adjoint(y - operator.A(x_new))  # measured pixels keep their values
        x, x_bar = x_new, 2 * x_new - x
    return x


def tikhonov(y, operator, alpha):
    """argmin_x ‖A x − y‖² + alpha ‖x‖², exactly and in float64: with B = U S Vᵀ for each axis the singular
    values of the blur A x = B_H x B_Wᵀ are the products of the two. For a circular blur this is the Wiener
    filter of white images."""
    (u_h, s_h, vt_h), (u_w, s_w, vt_w) = (
        torch.linalg.svd(operator.matrix(n, y.double())) for n in y.shape[-2:]
    )
    singular = s_h[:, None] * s_w
    return (vt_h.T @ (singular / (singular**2 + alpha) * (u_h.T @ y.double() @ u_w)) @ vt_w).to(y)


def conjugate_gradients(y, operator, num_iterations):
    """Conjugate gradients on AᵀA x = Aᵀy from zero (Hestenes and Stiefel 1952), in float64; stopping early
    regularises."""

    def energy(v):  # of each image; no less than a number that can still be divided by
        return v.square().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-300)

    residual = y.double()
    x, gradient = torch.zeros_like(residual), operator.A_adjoint(residual)
    direction = gradient
    for _ in range(num_iterations):
        measured = operator.A(direction)
        length, before = energy(gradient) / energy(measured), energy(gradient)
        x, residual = x + length * direction, residual - length * measured
        gradient = operator.A_adjoint(residual)
        direction = gradient + energy(gradient) / before * direction
    return x.to(y)


@dataclass(frozen=True)
class Classical:
    """A method: its label, its function, and the name and grid of its parameter, if it has one."""

    label: str
    function: Callable
    parameter: str | None = None
    grid: tuple = ()

    def __call__(self, y, operator, value=None):
        arguments = [value] if self.parameter else []
        return torch.cat([self.function(batch, operator, *arguments) for batch in batches(y, 50)])


CLASSICAL = {
    "denoising": {
        "measurement": Classical("Noisy image", measurement),
        "tv": Classical(
            "Total variation", tv_denoising, "weight", (0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25)
        ),
        "nl-means": Classical("Non-local means", nl_means, "h / σₙ", (0.7, 0.8, 0.9, 1.0, 1.1)),
    },
    "inpainting": {
        "measurement": Classical("Masked image", measurement),
        "tv": Classical("Total variation", tv_inpainting),
        "biharmonic": Classical("Biharmonic", biharmonic),
    },
    "deblurring": {
        "measurement": Classical("Blurred image", measurement),
        "cg": Classical("Conjugate gradients", conjugate_gradients, "iterations", (10, 30, 100, 300)),
        "tikhonov": Classical("Tikhonov", tikhonov, "α", tuple(10.0**-k for k in range(12, 1, -1))),
    },
}
NUM_VALIDATION = 50  # images that a parameter is chosen on


def record_classical(experiment, task):
    """The records of the classical methods of a task, in order; missing ones are made, or copied from records
    of the same images that are kept with the code."""
    return [_record(experiment, task, key) for key in CLASSICAL[TASKS[task].kind]]


def _record(experiment, task, key):
    name = f"classical-{task}-{key}"
    path = experiment.build / "runs" / experiment.key / experiment.names["edition"] / f"{name}.json"
    about = data_of(experiment)

    def fits(record):
        same = record["name"] == name and record["experiment"]["edition"] == experiment.names["edition"]
        return same and all(record["data"][k] == about[k] for k in ("pixels_sha256", "split"))

    made = read([path]) if path.exists() else []
    made = [r for r in made if r.get("evaluation_code") == evaluation_code()]
    kept = [] if retrain() else recorded()
    record = next((r for r in [*made, *kept] if fits(r)), None) or _evaluate(
        experiment, task, key, name, about
    )
    write_json(path, record)
    return record


def _evaluate(experiment, task, key, name, about):
    """The method's parameter is chosen on validation images, then it runs once on the test images, on the
    very measurements that the learned solvers get."""
    method = CLASSICAL[TASKS[task].kind][key]
    x_val, x = to_tensor(experiment.split("val")[:NUM_VALIDATION]), to_tensor(experiment.split("test"))
    operator = TASKS[task].make_operator(x.shape[-1])
    y_val, y = (
        operator.measure(i, generator_for(experiment.seed, part)) for i, part in ((x_val, "val"), (x, "test"))
    )
    parameter = None
    if method.parameter:
        found = [psnr(method(y_val, operator, value), x_val).mean().item() for value in method.grid]
        best = method.grid[int(np.argmax(found))]
        parameter = dict(name=method.parameter, value=best, grid=method.grid, validation_psnr=found)
    start = time.monotonic()
    x_hat = method(y, operator, parameter and parameter["value"])
    seconds = time.monotonic() - start
    return dict(
        name=name,
        experiment=experiment.names,
        kind="classical",
        task=task,
        evaluation_code=evaluation_code(),
        method=method.label,
        parameter=parameter,
        psnr=statistics(psnr(x_hat, x).tolist()),
        ssim=statistics(ssim(x_hat, x).tolist()),
        milliseconds_per_image=1000 * seconds / len(x),
        evaluated=provenance(),
        data=about,
    )
