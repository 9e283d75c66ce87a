"""In which precision everything computes: networks perhaps in bfloat16, sums in float32 at least."""

import functools
import time
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sum_dtype(x: Tensor) -> torch.dtype:
    """The type of sums over pixels: float32, as 16 bits overflow, or float64 where x has that."""
    return torch.promote_types(x.dtype, torch.float32)


def as_double(x: Tensor) -> Tensor:
    """x in float64, or in float32 on a device that has no float64."""
    try:
        return x.double()
    except (TypeError, RuntimeError):
        return x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context without torch.autocast, for linear maps that must fit their inverse or adjoint exactly."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes every coupling net, U-Net and ResNet in the model compute in dtype (bfloat16; None: the input's).
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
    """The time of one convolution on the CPU, the fastest of ten; infinite where dtype is not supported."""
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
