"""Peak memory of one training step, above parameters and gradients, in every memory mode.

Run: python -m benchmarks.memory. Each case runs in a process of its own whose allocator returns freed memory
at once, so that the peak of the resident set, as the Linux kernel counts it, is the step's need."""

import argparse
import json
import os
import subprocess
import sys

import torch

from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from flowlib import Glow, set_compute_dtype
from flowlib.glow import MEMORY_MODES, set_memory

BATCH, SIZE = 8, 64
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident_set(key):
    """VmRSS (now) or VmHWM (peak since it was last reset) of this process, in MB."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) * 1024 / 1e6


def peak_of_a_step(config, mode, bf16):
    """MB above parameters and gradients."""
    torch.manual_seed(0)
    glow = Glow(**config)
    x = torch.rand(BATCH, 3, SIZE, SIZE) - 0.5
    glow.initialize(x)
    set_memory(glow, mode)
    set_compute_dtype(glow, torch.bfloat16 if bf16 else None)
    peaks = []
    for _ in range(3):
        glow.zero_grad(set_to_none=True)
        before = resident_set("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
            f.write("5")  # resets the peak
        glow.bits_per_dim(x).mean().backward()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in glow.parameters()) / 1e6
        peaks.append(resident_set("VmHWM") - before - gradients)
    return min(peaks)


def in_own_process(config, mode, bf16):
    command = [sys.executable, __file__, "--case", json.dumps([config, mode, bf16])]
    output = subprocess.run(
        command, env=os.environ | ALLOCATOR, check=True, capture_output=True, text=True
    ).stdout
    return float(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--case", help="for the processes it starts")
    args = parser.parse_args()
    if args.case:
        return print(peak_of_a_step(*json.loads(args.case)))
    config = {"num_steps": args.steps, "hidden_channels": args.hidden}
    rows = []
    for bf16 in (False, True):
        for mode in MEMORY_MODES:
            megabytes = in_own_process(config, mode, bf16)
            rows.append(
                {"dtype": "bfloat16" if bf16 else "float32", "mode": mode, "peak_mb": round(megabytes, 1)}
            )
            print(rows[-1])
    # One level of 32x32 pixels, so that only the number of steps differs.
    few, many = args.steps // 2, 2 * args.steps
    growth = {}
    for mode in MEMORY_MODES:
        level = {"num_levels": 1, "hidden_channels": args.hidden}
        peaks = [in_own_process(level | {"last_level_steps": n}, mode, False) for n in (few, many)]
        growth[mode] = round((peaks[1] - peaks[0]) / (many - few), 2)
        print(mode, "grows by", growth[mode], "MB a step")
    about = {
        "arguments": {k: v for k, v in vars(args).items() if k != "case"},
        "batch": BATCH,
        "image_size": SIZE,
    }
    record = {"rows": rows, "growth_mb_per_step": growth, **about, **provenance()}
    write_json(RESULTS / "benchmarks" / "memory.json", record)


if __name__ == "__main__":
    main()
