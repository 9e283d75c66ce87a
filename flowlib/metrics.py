"""Image quality, per image; means with confidence intervals; memory of a backward pass."""

import numpy as np
import scipy.stats
import skimage.metrics
import torch


def psnr(x_hat, x, peak=1.0):
    """Peak signal-to-noise ratio 10 log10(peak² / MSE) of each image, in dB, unclipped: (B, C, H, W) twice -> (B,)."""
    return 10 * torch.log10(peak**2 / (x_hat - x).square().mean(dim=(1, 2, 3)))


def ssim(x_hat, x, peak=1.0):
    """Structural similarity of each image (scikit-image, Gaussian window as Wang et al. 2004): (B, C, H, W) twice -> (B,)."""
    return torch.tensor(
        [
            skimage.metrics.structural_similarity(
                a, b, channel_axis=0, data_range=peak, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            for a, b in zip(x_hat.double().cpu().numpy(), x.double().cpu().numpy())
        ]
    )


def mean_and_interval(values, level=0.95):
    """Mean over images and half the width of its confidence interval (Student's t): (mean, half_width)."""
    values = np.asarray(values, dtype=float)
    half_width = scipy.stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half_width)


def kept_bytes(model, function):
    """Bytes that autograd keeps between function(model) and its backward pass, the parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held on to, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(model)
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
