"""From a packed set to batches: which images train, validate and test, and how pixels become tensors."""

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

Size = int | tuple[int, int]  # of an image: one number, or (H, W)


def split_indices(
    num_images: int, train: int, val: int, test: int, held_out: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Seeded, disjoint index arrays "train", "val", "test"; and "pretrain", all images not held out.

    train, val, test: how many of num_images. held_out: size of each of the pools that val and test are taken
    from (default: the larger of the two). Splits that share it and the seed nest: the smaller one's test lies
    inside the larger one's, and "pretrain" holds no val or test of either. ValueError for too few images."""
    held_out = max(val, test) if held_out is None else held_out
    if min(train, val, test) < 0 or held_out < max(val, test):
        pool = f"held_out={held_out} cannot hold val={val} or test={test} images"
        raise ValueError(f"a pool of {pool}: enlarge held_out")
    if num_images < train + 2 * held_out:
        needed = f"{train + 2 * held_out} are needed ({train} train + 2 x {held_out} held out)"
        raise ValueError(f"{num_images} images are there, {needed}: prepare more, or use a smaller profile")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_images)
    rest, val_pool = order[2 * held_out :], order[held_out : 2 * held_out]
    return {"pretrain": rest, "train": rest[:train], "val": val_pool[:val], "test": order[:test]}


def height_and_width(image_size: Size) -> tuple[int, int]:
    """(H, W) of an image size given as one number or two."""
    height, width = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    return operator.index(height), operator.index(width)


def floating(images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The images, in dtype where it is given; ValueError for integers, and for a wider type than dtype."""
    if not images.is_floating_point():
        raise ValueError(f"expected floating-point images, got {images.dtype}: see flowlib.images.to_tensor")
    if dtype and torch.promote_types(images.dtype, dtype) != dtype:
        what = f"inputs of {images.dtype} do not fit weights of {dtype}"
        raise ValueError(f"{what}: give x.to({dtype}), or use model.to({images.dtype})")
    return images.to(dtype) if dtype else images


def standard_normal(shape: Sequence[int], like: Tensor, generator: Generator | None = None) -> Tensor:
    """Noise N(0, I) in the type and on the device of like, whatever PyTorch's defaults are. It is drawn on
    the generator's device, without one on a CPU, so that a seed gives the same everywhere."""
    device = getattr(generator, "device", "cpu")
    return torch.randn(*shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-0.5, 0.5]: k / 255 - 0.5. Else ValueError."""
    return _channels_first(images) / 255 - 0.5


def dequantize(images: np.ndarray, generator: Generator | None = None) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W): (k + u) / 256 - 0.5 with u ~ U[0, 1), for likelihoods,
    equation (14). Raises ValueError for another type."""
    pixels = _channels_first(images)
    device = getattr(generator, "device", "cpu")
    u = torch.rand(pixels.shape, generator=generator, dtype=torch.float32, device=device).cpu()
    # float32 steps by 2^-16 just below 256: without the factor, k + u may round up to k + 1.
    return (pixels + u * (1 - 2**-16)) / 256 - 0.5


def to_uint8(tensor: Tensor) -> np.ndarray:
    """float (B, 3, H, W) -> uint8 (B, H, W, 3), rounded and clipped: the inverse of `to_tensor`. Raises
    ValueError for integers, and where a number is not finite."""
    pixels = (floating(tensor).detach().float().cpu() + 0.5) * 255
    if not bool(pixels.isfinite().all()):
        raise ValueError("an image holds numbers that are not finite: its solver or flow broke down")
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _channels_first(images):
    # A copy, as packed sets are read-only maps and torch wants to own writable memory.
    images = np.array(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 images (B, H, W, C), got {images.dtype} of shape {images.shape}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()
