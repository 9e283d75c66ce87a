"""From a packed set to batches: which images train, validate and test, and how pixels become tensors."""

import numpy as np
import torch


def split_indices(num_images, train, val, test, held_out=None, seed=0):
    """Seeded, disjoint index arrays "train", "val", "test"; and "pretrain", all that is not held out.

    `held_out` is the size of each of the two pools from which val and test are taken (default: the larger of
    the two). Splits that share it and the seed nest: the smaller edition's test images lie inside the larger
    one's, and "pretrain" holds no val or test image of either. Raises ValueError if there are too few images.
    """
    held_out = max(val, test) if held_out is None else held_out
    if min(train, val, test) < 0 or held_out < max(val, test):
        raise ValueError(f"a pool of held_out={held_out} cannot hold val={val} or test={test} images: enlarge held_out")
    needed = train + 2 * held_out
    if num_images < needed:
        raise ValueError(
            f"{num_images} images are there, {needed} are needed ({train} train + 2 x {held_out} held out): "
            "prepare more images, or choose a smaller profile"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_images)
    rest = order[2 * held_out :]
    return {
        "pretrain": rest,
        "train": rest[:train],
        "val": order[held_out : held_out + val],
        "test": order[:test],
    }


def to_tensor(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-0.5, 0.5]: k / 255 - 0.5."""
    return _channels_first(images) / 255 - 0.5


def dequantize(images, generator=None):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W): (k + u) / 256 - 0.5 with u ~ U[0, 1), for likelihoods."""
    pixels = _channels_first(images)
    u = torch.rand(pixels.shape, generator=generator)
    # float32 steps by 2^-16 just below 256: without the factor, k + u may round up to k + 1.
    return (pixels + u * (1 - 2**-16)) / 256 - 0.5


def to_uint8(tensor):
    """float (B, 3, H, W) -> uint8 (B, H, W, 3), rounded and clipped: the inverse of `to_tensor`."""
    pixels = (tensor.detach().float().cpu() + 0.5) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _channels_first(images):
    # A copy, as packed sets are read-only maps and torch wants to own writable memory.
    return torch.from_numpy(np.array(images, dtype=np.uint8)).permute(0, 3, 1, 2).contiguous().float()
