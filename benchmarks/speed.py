"""Speed of the flow as ratios in one run: minima and medians over alternating repeats, beside the floor.

The floor is only the coupling networks' convolutions (with ReLU), in the same memory format and dtype: no
flow that evaluates these networks can be faster. Run on a quiet machine:
python -m benchmarks.speed [--profile cpu]"""

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.settings import PROFILES
from flowlib import Glow, GlowProx, Inpainting, UnfoldedPGD, set_compute_dtype, set_memory

BATCH, SIZE = 8, 64


class Floor(nn.Module):
    """Only the convolutions of every coupling net of this geometry."""

    def __init__(self, glow, dtype):
        super().__init__()
        self.inputs, self.nets = [], nn.ModuleList()
        for level, (_, height, width) in zip(glow.levels, glow.latent_shapes(SIZE)):
            for step in level:
                net = step.coupling.net
                convs = [net.conv1, net.conv2, net.conv3]
                copies = [
                    nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, padding=c.padding, dtype=dtype)
                    for c in convs
                ]
                self.nets.append(
                    nn.Sequential(
                        copies[0], nn.ReLU(inplace=True), copies[1], nn.ReLU(inplace=True), copies[2]
                    )
                )
                h = torch.rand(BATCH, net.conv1.in_channels, height, width).to(
                    dtype, memory_format=torch.channels_last
                )
                self.inputs.append(h)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        grad = torch.is_grad_enabled()
        return [net(h.detach().requires_grad_(grad)) for h, net in zip(self.inputs, self.nets)]


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions, repeats):
    """{name: seconds in each of `repeats` rounds}, in which every function runs once."""
    seconds = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            taken = timed(function)
            if round_:  # the first round warms up
                seconds[name].append(taken)
    return seconds


def median_ratio(a, b):
    """Median over rounds of a / b: drifts of a shared machine, which are slower than a round, cancel."""
    return statistics.median(x / y for x, y in zip(a, b))


def matmul_peak(dtype, size=2048):
    """GFLOP/s of a large matrix product, the best that this machine can do."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(8)) / 1e9


def bandwidth(size=2**27):
    """GB/s of copying a tensor much larger than the caches, reading and writing."""
    a, b = torch.zeros(2, size, dtype=torch.uint8)
    return 2 * size / min(timed(lambda: b.copy_(a)) for _ in range(8)) / 1e9


@torch.no_grad()
def roofline(glow, dtype, repeats):
    """For each convolution of the first coupling net of every level: floating-point operations for each byte
    that must at least be moved, and GFLOP/s reached."""
    rows = []
    for level, (_, height, width) in enumerate(glow.latent_shapes(SIZE)):
        net = glow.levels[level][0].coupling.net
        for name in ("conv1", "conv2", "conv3"):
            theirs = getattr(net, name)
            shape = (theirs.in_channels, theirs.out_channels, theirs.kernel_size)
            conv = nn.Conv2d(*shape, padding=theirs.padding, dtype=dtype).to(
                memory_format=torch.channels_last
            )
            x = torch.randn(BATCH, theirs.in_channels, height, width).to(
                dtype, memory_format=torch.channels_last
            )
            y = conv(x)
            flops = 2 * y.numel() * conv.weight[0].numel()
            num_bytes = sum(t.numel() * t.element_size() for t in (x, y, conv.weight))
            seconds = min(timed(lambda conv=conv, x=x: conv(x)) for _ in range(4 * repeats))
            reached = {
                "flops_per_byte": round(flops / num_bytes, 1),
                "gflops": round(flops / seconds / 1e9, 1),
            }
            rows.append({"dtype": name_of(dtype), "level": level + 1, "conv": name} | reached)
    return rows


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def measure_machine():
    peaks = {name_of(dtype): round(matmul_peak(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    return {
        "matmul_gflops": peaks,
        "bandwidth_gb_per_s": round(bandwidth(), 1),
        "threads": torch.get_num_threads(),
    }


def faster(a, b):
    """The better of two measurements of the machine: others may have slowed one of them."""
    peaks = {name: max(peak, b["matmul_gflops"][name]) for name, peak in a["matmul_gflops"].items()}
    bandwidth = max(a["bandwidth_gb_per_s"], b["bandwidth_gb_per_s"])
    return a | {"matmul_gflops": peaks, "bandwidth_gb_per_s": bandwidth}


def glow_functions(glow, x, prefix):
    with torch.no_grad():
        latents = glow(x)[0]

    def train():
        glow.zero_grad()
        glow.bits_per_dim(x).mean().backward()

    return {
        f"{prefix} forward": torch.no_grad()(lambda: glow(x)),
        f"{prefix} inverse": torch.no_grad()(lambda: glow.inverse(latents)),
        f"{prefix} training": train,
    }


def floor_functions(floor, prefix):
    def train():
        floor.zero_grad()
        outputs = floor(None)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return {f"{prefix} forward": torch.no_grad()(lambda: floor(None)), f"{prefix} training": train}


def unfolded_functions(glow, dtype, x):
    """A training step of the unfolded solver with K = 4, and its floor: every convolution twice a fold."""
    folds = [GlowProx(copy.deepcopy(glow)) for _ in range(4)]
    solver, operator = UnfoldedPGD(folds, glow.mode(SIZE).detach()), Inpainting(19, SIZE)
    y, floors = operator.measure(x), [Floor(glow, dtype) for _ in folds]

    def train():
        solver.zero_grad()
        (solver(y, operator) - x).square().mean().backward()

    def floor():
        outputs = [output for floor in floors for _ in "fg" for output in floor(None)]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for each in floors:
            each.zero_grad()

    return {"floor training, unfolded": floor, "flowlib training, unfolded": train}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="paper", choices=PROFILES, help="whose flow is timed")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.rand(BATCH, 3, SIZE, SIZE) - 0.5
    rows, roof, reversible_ratio, machine = [], [], {}, measure_machine()
    for dtype in (torch.float32, torch.bfloat16):
        glow = Glow(**PROFILES[args.profile].flow)
        glow.initialize(x)
        set_compute_dtype(glow, None if dtype == torch.float32 else dtype)
        functions = floor_functions(Floor(glow, dtype), "floor") | glow_functions(glow, x, "flowlib")

        def reversible(glow=glow):
            set_memory(glow, "reversible")
            glow.zero_grad()
            glow.bits_per_dim(x).mean().backward()
            set_memory(glow, "plain")

        functions["flowlib training, reversible"] = reversible
        # The compared functions run one after the other.
        functions = dict(sorted(functions.items(), key=lambda item: "training" in item[0]))
        if args.profile != "paper":
            functions |= unfolded_functions(glow, dtype, x)
        seconds = alternate(functions, args.repeats)
        for key, values in seconds.items():
            kind = (
                "training, unfolded" if "unfolded" in key else "training" if "training" in key else "forward"
            )
            floor = seconds[f"floor {kind}"]
            row = {"dtype": name_of(dtype), "what": key, "ms": round(1000 * min(values), 1)}
            row |= {
                "times_floor": round(min(values) / min(floor), 3),
                "median": round(median_ratio(values, floor), 3),
            }
            rows.append(row)
            print(row)
        plain, memory_free = seconds["flowlib training"], seconds["flowlib training, reversible"]
        reversible_ratio[name_of(dtype)] = round(median_ratio(memory_free, plain), 3)
        roof += roofline(glow, dtype, args.repeats)
        machine = faster(machine, measure_machine())
    print(json.dumps(machine))
    print("reversible / plain", reversible_ratio)
    about = {
        "reversible_over_plain": reversible_ratio,
        "arguments": vars(args),
        "batch": BATCH,
        "image_size": SIZE,
    }
    about |= {"bf16_matrix_units": has_matrix_units(), "allocator": os.environ.get("LD_PRELOAD") or "glibc"}
    units = "with" if has_matrix_units() else "without"
    name = f"speed-{args.profile}-{units}-matrix-units.json"
    record = {"rows": rows, "roofline": roof, "machine": machine} | about | provenance()
    write_json(RESULTS / "benchmarks" / name, record)


def has_matrix_units():
    """Whether this processor multiplies bf16 matrices in hardware (AMX)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
