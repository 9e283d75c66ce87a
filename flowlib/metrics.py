"""Image quality, per image."""

import torch
from torch import Tensor

from flowlib.images import floating
from flowlib.precision import as_double, sum_dtype


def psnr(x_hat: Tensor, x: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(peak² / MSE) of each image, in dB, unclipped: (B, C, H, W) twice ->
    (B,). The mean is taken in float32 at least. ValueError where the shapes differ, or for integers."""
    _check(x_hat, x)
    return 10 * torch.log10(peak**2 / (x_hat - x).to(sum_dtype(x)).square().mean(dim=(1, 2, 3)))


def ssim(x_hat: Tensor, x: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity of each image (scikit-image, Gaussian window as Wang et al. 2004), of values in a
    range of peak: (B, C, H, W) twice -> (B,). Raises ValueError where the shapes differ, or for integers."""
    from skimage.metrics import structural_similarity  # here, as nothing else needs scikit-image

    _check(x_hat, x)
    options = dict(data_range=peak, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    pairs = zip(*(as_double(t.detach().cpu()).numpy() for t in (x_hat, x)))
    values = [structural_similarity(a, b, channel_axis=0, **options) for a, b in pairs]
    return torch.tensor(values, dtype=sum_dtype(x), device=x.device)


def _check(x_hat, x):
    if floating(x_hat).shape != floating(x).shape or x.ndim != 4:
        raise ValueError(f"expected two (B, C, H, W) of one shape, got {(*x_hat.shape,)} and {(*x.shape,)}")
