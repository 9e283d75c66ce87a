"""Tools for work on a machine that is lent for minutes: deadlines, and models or states of trainings in few
bits and in small files, to be copied home.

Large weights are integers of 8 bits, or as many as there is room for, with one scale a row. Of an
optimizer's state, momenta, which cover some ten steps, restart at zero, and Adam's squares are means of rows.
Until the next validation the last weights count as the best."""

import math
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from companion.shipping import SMALLEST, _pack, _unpack
from flowlib.checkpoints import load_tensors, save_tensors

FILE, ALL = 15 * 2**20, 60 * 2**20  # bytes at most, of one file and of all
MOMENTS = {"momentum": "zero", "exp_avg": "zero", "exp_avg_sq": "mean"}


def send(path: Path, out: Path, name: str) -> int:
    """Writes a checkpoint or resume file small to out/name.1.safetensors, …; returns the bits of a weight, or
    0 where fewer than 4 would fit and nothing is sent. If out lacks room, the oldest files are removed first,
    the flow's last."""
    tensors, header = load_tensors(path)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("best.")}
    large, kind = defaultdict(dict), {}
    for key, value in tensors.items():
        if value.is_floating_point() and value.ndim > 1 and value.numel() >= SMALLEST:
            moment = key.rpartition(".")[2] if key.startswith("optimizer.") else None
            kind[key] = MOMENTS.get(moment, "bits")
            large[kind[key]][key] = value
    count = sum(value.numel() for value in large["bits"].values())
    rest = sum(value.nbytes for key, value in tensors.items() if key not in kind)
    rest += sum(4 * len(value) for of_kind in ("bits", "mean") for value in large[of_kind].values())
    bits = min(8, math.floor(8 * (0.99 * ALL - rest) / max(1, count)))
    if bits < 4:
        return 0
    small = {key: value for key, value in tensors.items() if key not in kind}
    small |= {f"{key}:mean": value.flatten(1).mean(1) for key, value in large["mean"].items()}
    for key, value in large["bits"].items():
        small[f"{key}:scale"], small[f"{key}:bits"] = _pack(value, bits)
    about = {key: [kind[key], list(tensors[key].shape)] for key in kind}
    _make_room(out, name, sum(value.nbytes for value in small.values()))
    parts = _in_parts(small)
    for i, part in enumerate(parts, start=1):
        about_part = {"sent": header, "bits": bits, "large": about, "part": i, "parts": len(parts)}
        save_tensors(out / f"{name}.{i}.safetensors", part, about_part)
    for old in _files(out)[name][len(parts) :]:
        old.unlink()
    return bits


def fetch(out: Path, name: str) -> tuple[dict[str, Tensor], dict] | None:
    """(tensors, header) of the file that send made small, or None without a whole set."""
    small, headers = {}, []
    for path in _files(out)[name]:
        tensors, header = load_tensors(path)
        small |= tensors
        headers.append({key: value for key, value in header.items() if key != "part"})
    if not headers or len(headers) != headers[0]["parts"] or any(h != headers[0] for h in headers):
        return None  # none, or a kill came between two files
    header, tensors = headers[0]["sent"], {}
    for key, (kind, shape) in headers[0]["large"].items():
        if kind == "bits":
            packed = small.pop(f"{key}:scale"), small.pop(f"{key}:bits")
            tensors[key] = _unpack(*packed, headers[0]["bits"], shape)
        elif kind == "mean":
            mean = small.pop(f"{key}:mean")
            tensors[key] = mean.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        else:
            tensors[key] = torch.zeros(shape)
    tensors |= small
    if "state" in header:  # of a training
        best = {f"best.{k.removeprefix('model.')}": v for k, v in tensors.items() if k.startswith("model.")}
        tensors |= best
        header["state"] |= {"best_loss": math.inf, "best_step": header["state"]["step"]}
    return tensors, header


def _files(out):
    """{name: its files, in order}."""
    found = defaultdict(list)
    for path in sorted(out.glob("*.*.safetensors")):  # fewer than ten parts
        found[path.name.split(".")[0]].append(path)
    return found


def _in_parts(tensors):
    parts, size = [{}], 0
    for key, value in tensors.items():
        if parts[-1] and size + value.nbytes > FILE:
            parts.append({})
            size = 0
        parts[-1][key] = value
        size += value.nbytes
    return parts


def _make_room(out, name, size):
    others = _files(out)
    others.pop(name, None)
    while others and size + sum(path.stat().st_size for files in others.values() for path in files) > ALL:
        first = min(others, key=lambda name: (name == "flow", others[name][0].stat().st_mtime))
        for path in others.pop(first):
            path.unlink()


@contextmanager
def sending(path: Path, out: Path, name: str, every: float, note: Callable) -> Iterator[None]:
    """Meanwhile a thread sends the state that a training last saved at path, every so many seconds, and notes
    its step and history under its name."""
    stop, last = threading.Event(), 0

    def work():
        nonlocal last
        while not stop.wait(every):
            if path.exists() and path.stat().st_mtime_ns != last:
                last = path.stat().st_mtime_ns
                bits, state = send(path, out, name), load_tensors(path)[1]["state"]
                note(name, step=state["step"], history=state["history"], bits=bits)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def deadline(seconds: float, grace: float = 20) -> Iterator[None]:
    """Ctrl-C when the time is over, at which a training ends its step and saves itself; later, another."""
    alarm = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), grace)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, ctrl_c)
