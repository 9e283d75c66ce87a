"""In which precision the networks inside a solver compute."""

import functools
import time

import torch
import torch.nn.functional as F
from torch import nn


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Lets every coupling net, U-Net and ResNet in the model compute in dtype (bfloat16; None: as the input).
    Weights, affine maps and log-determinants keep their precision."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype


@functools.cache
def bf16_pays(device_type: str = "cpu") -> bool:
    """Whether this processor or GPU has bfloat16 arithmetic and is faster with it than in float32.

    Many processors only emulate it (all x86 without AVX-512, several times slower). A CPU is therefore timed
    once, with one convolution of a coupling net, which takes some milliseconds."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32)


def _seconds(dtype):
    """Of one convolution on the CPU, the fastest of ten; infinite where it cannot be computed."""
    like = dict(device="cpu", dtype=dtype)
    x = torch.ones(4, 64, 32, 32, **like).contiguous(memory_format=torch.channels_last)
    weight, times = torch.ones(64, 64, 3, 3, **like), []
    try:
        with torch.inference_mode():
            for _ in range(10):
                start = time.perf_counter()
                F.conv2d(x, weight)
                times.append(time.perf_counter() - start)
    except RuntimeError:
        return float("inf")
    return min(times)
