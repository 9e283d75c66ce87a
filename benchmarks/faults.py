"""The outcomes of flipped bits, hostile files and killed runs: the tests check the same, the book shows the
counts.

Run: python -m benchmarks.faults, as root for the full disk. It goes on where it was stopped."""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import data
from companion import runs
from companion.experiment import Experiment
from companion.files import write_csv, write_json
from companion.paths import RESULTS, ROOT
from companion.provenance import provenance
from companion.runs import ensure
from companion.shipping import pack, sha256, unpack
from flowlib import Glow, GlowProx, ResNetProx, UnfoldedPGD, load_checkpoint, save_checkpoint
from flowlib.checkpoints import load_tensors, save_tensors
from flowlib.glowip import load_glowip
from flowlib.training import Training, fit

FLOW = {"num_levels": 2, "num_steps": 1, "hidden_channels": 4}
NAMED, SAME = "an error that names the file", "the same result"


def outcome(path, read, expected):
    """The outcome of reading a file, in words; expected: the content of a whole one."""
    try:
        found = read(path)
    except ValueError as error:
        return NAMED if path.name in str(error) else f"an error without a name: {error}"
    return SAME if found == expected else "another result"


# Flipped bits


def _values(tensors):
    return {key: (value.dtype, value.shape, value.tolist()) for key, value in tensors.items()}


def _checkpoint(folder):
    path = folder / "model.safetensors"
    save_checkpoint(path, UnfoldedPGD([GlowProx(Glow(**FLOW))], torch.zeros(1, 3, 8, 8)), note="kept")
    return path, lambda p: (_values(load_checkpoint(p).state_dict()), load_tensors(p)[1])


def _resume_file(folder):
    model, x = Glow(**FLOW), torch.rand(4, 3, 8, 8) - 0.5

    def loss(x):
        return model.bits_per_dim(x).mean()

    def trained(path):
        settings = Training(num_steps=1, batch_size=2, lr=1e-3, validate_every=1, bf16=False)
        groups = [{"params": list(model.parameters()), "lr": 1e-3}]
        functions = (lambda indices, step: (x[indices],), loss, lambda: loss(x).item())
        summary = fit(model, groups, *functions, settings, 4, 0, folder)
        return _values(model.state_dict()), summary

    trained(None)
    return folder / "resume.safetensors", trained


def _glowip_file(folder):
    state = {}
    for module, channels in ((1, 12), (4, 24)):
        step = {"actnorm.logs": (1, channels, 1, 1), "actnorm.b": (1, channels, 1, 1)}
        step |= {"invconv.W": (channels, channels), "coupling.net.logs": (channels, 1, 1)}
        step |= {"coupling.net.conv1.weight": (4, channels // 2, 3, 3), "coupling.net.conv1.bias": (4,)}
        step |= {"coupling.net.conv2.weight": (4, 4, 1, 1), "coupling.net.conv2.bias": (4,)}
        step |= {"coupling.net.conv3.weight": (channels, 4, 3, 3), "coupling.net.conv3.bias": (channels,)}
        step |= {f"coupling.net.actnorm{i}.{name}": (1, 4, 1, 1) for i in (1, 2) for name in ("logs", "b")}
        state |= {f"glow_modules.{module}.{name}": torch.randn(shape) for name, shape in step.items()}
    torch.save(state, folder / "glowmodel.pt")
    return folder / "glowmodel.pt", lambda p: _values(load_glowip(p).state_dict())


def _images(folder):
    data.prepare_synthetic(folder, 4, size=16)
    return folder / "images.npy", lambda p: data.load(p.parent).images.tolist()


def _kept_model(folder):
    save_checkpoint(folder / "model", UnfoldedPGD([ResNetProx(16, 1)], torch.zeros(1, 3, 8, 8)))
    pack(folder / "model", folder / "kept.safetensors")

    def unpacked(path):
        unpack(path, folder / "model")
        return _values(load_checkpoint(folder / "model").state_dict())

    return folder / "kept.safetensors", unpacked


def _kept(name, flow=None, flipped=None):
    """A model that is kept with the code, counted from a flow; flipped: which of the two gets the flips."""

    def make(folder):
        copies = {}
        for part in filter(None, (name, flow)):
            copies[part] = folder / f"{Path(part).name}.safetensors"
            shutil.copyfile(RESULTS / "checkpoints" / f"{part}.safetensors", copies[part])

        def unpacked(_):
            unpack(copies[name], folder / "model", copies.get(flow))
            return sha256(folder / "model")

        return copies[flipped or name], unpacked

    return make


KEPT_FLOW, KEPT_SOLVER = "cpu-celeba-s0/flow", "cpu-celeba-s0/v2/inpainting-glow"
KEPT = {"kept flow": _kept(KEPT_FLOW), "kept solver": _kept(KEPT_SOLVER, KEPT_FLOW)}
KEPT["flow of a kept solver"] = _kept(KEPT_SOLVER, KEPT_FLOW, flipped=KEPT_FLOW)
FILES = {"checkpoint": _checkpoint, "resume file": _resume_file, "kept model": _kept_model}
FILES |= {"GlowIP file": _glowip_file, "images.npy": _images} | KEPT


def flips(kind, count):
    """How often a bit is flipped; the models kept with the code are large."""
    return min(count, 200) if kind in KEPT else count


def flip_bits(kind, folder, count, seed=0):
    """{outcome: how often} of reading a file of a kind, each time with another bit flipped."""
    path, read = FILES[kind](Path(folder))
    content, expected, found = path.read_bytes(), read(path), Counter()
    for place in np.random.default_rng(seed).integers(8 * len(content), size=count).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        found[outcome(path, read, expected)] += 1
    return dict(found)


# Hostile files: each is small, or claims to be what it is not


def _with_header(folder, text, tensors=None):
    path = folder / "m.safetensors"
    save_file(tensors or {"step_size": torch.zeros(1)}, path, metadata={"flowlib": text})
    return path, load_checkpoint


def _flow_of(**config):
    return lambda folder: _with_header(folder, json.dumps({"kind": "Glow", "config": FLOW | config}))


def _solver_of(**header):
    fold = {"prox": "resnet", "config": {"width": 4, "num_blocks": 1}}
    whole = {"kind": "UnfoldedPGD", "folds": [fold], "literal_last_fold": False, "image_shape": [3, 8, 8]}
    return lambda folder: _with_header(folder, json.dumps(whole | header))


def _packed_of(**header):
    def make(folder):
        about = {"kind": "packed", "started": False, "bits": 8, "model": {}} | header
        tensors = {"a:scale": torch.ones(1), "a:bits": torch.zeros(1)}
        save_tensors(folder / "m.safetensors", tensors, about)  # with its right hash
        return folder / "m.safetensors", lambda path: unpack(path, folder / "model")

    return make


def _glowip_of(levels):
    def make(folder):
        first = {"invconv.W": torch.zeros(12, 12), "coupling.net.conv1.weight": torch.zeros(4, 6, 3, 3)}
        state = {f"glow_modules.{3 * i}.{key}": v for i in range(levels) for key, v in first.items()}
        torch.save(state, folder / "glowmodel.pt")
        return folder / "glowmodel.pt", load_glowip

    return make


def _images_of(shape, dtype="|u1", **manifest):
    def make(folder):
        with open(folder / "images.npy", "wb") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        about = {"name": "faces", "num_images": shape[0], "size": shape[1], "pixels_sha256": "?"} | manifest
        write_json(folder / "manifest.json", about)
        return folder / "images.npy", lambda path: data.load(path.parent)

    return make


def _zip_of(**members):
    def make(folder):
        with zipfile.ZipFile(folder / "faces.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, megabytes in members.items():
                with archive.open(name, "w") as member:
                    for _ in range(megabytes):
                        member.write(bytes(2**20))
        return folder / "faces.zip", lambda path: data.prepare(path, folder / "out")

    return make


def _picture_of(width, height):
    def make(folder):
        header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        (folder / "faces").mkdir()
        (folder / "faces" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\x09IDAT")
        return folder / "faces" / "a.png", lambda path: data.prepare(path.parent, folder / "out")

    return make


HUGE = 10**9
HOSTILE = {
    "checkpoint: header no JSON": lambda folder: _with_header(folder, "{"),
    "checkpoint: header a list": lambda folder: _with_header(folder, "[]"),
    "checkpoint: header empty": lambda folder: _with_header(folder, "{}"),
    "checkpoint: no config": lambda folder: _with_header(folder, '{"kind": "Glow"}'),
    "checkpoint: config a number": lambda folder: _with_header(folder, '{"kind": "Glow", "config": 3}'),
    "checkpoint: unknown argument": _flow_of(colour=1),
    "checkpoint: levels as text": _flow_of(num_levels="two"),
    "checkpoint: claims 12 levels": _flow_of(num_levels=12),
    "checkpoint: claims 10^9 levels": _flow_of(num_levels=HUGE),
    "checkpoint: claims -1 levels": _flow_of(num_levels=-1),
    "checkpoint: claims 10^9 steps": _flow_of(num_steps=HUGE),
    "checkpoint: claims 10^9 hidden channels": _flow_of(hidden_channels=HUGE),
    "checkpoint: claims 10^9 input channels": _flow_of(in_channels=HUGE),
    "solver: claims 10^9 folds": _solver_of(folds=None, num_folds=HUGE, prox="unet", config={}),
    "solver: claims 10^9 blocks": _solver_of(folds=[{"prox": "resnet", "config": {"num_blocks": HUGE}}]),
    "solver: claims images of 10^9 x 10^9": _solver_of(image_shape=[3, HUGE, HUGE]),
    "solver: no image shape": _solver_of(image_shape=None),
    "solver: fold is text": _solver_of(folds=["resnet"]),
    "solver: same as a fold that is not there": _solver_of(folds=[{"same_as": 7}]),
    "solver: names os.system": _solver_of(folds=[{"prox": "os:system", "config": {}}]),
    "kept model: claims 10^18 numbers": _packed_of(shapes={"a": [HUGE, HUGE]}),
    "kept model: claims -1 numbers": _packed_of(shapes={"a": [-1]}),
    "kept model: a tensor is missing": _packed_of(shapes={"b": [1]}),
    "kept model: no shapes": _packed_of(),
    "GlowIP file: claims 12 levels": _glowip_of(12),
    "GlowIP file: claims 1000 levels": _glowip_of(1000),
    "images.npy: claims 10^9 images": _images_of((HUGE, 64, 64, 3)),
    "images.npy: pickled objects": _images_of((4, 8, 8, 3), "|O"),
    "zip: unpacks to 300 MB": _zip_of(**{"a.png": 300}),
    "zip: points outside": _zip_of(**{"../a.png": 1}),
    "picture: 10^9 pixels": _picture_of(40_000, 25_000),
}


def hostile(name, folder):
    """The outcome of reading a hostile file, in words."""
    path, read = HOSTILE[name](Path(folder))
    return outcome(path, read, None)


# Kills

PROVENANCE = ("seconds", "date", "hardware", "commit", "milliseconds_per_image")  # and what ends so


def _without_provenance(value):
    if isinstance(value, dict):
        return {
            k: _without_provenance(v) for k, v in value.items() if not any(k.endswith(t) for t in PROVENANCE)
        }
    return [_without_provenance(v) for v in value] if isinstance(value, list) else value


def _smoke(build, method):
    """A smoke experiment and one of its runs, which saves itself after every step."""
    experiment = Experiment("smoke", build=build)
    run = experiment.solver("denoising", method)
    return experiment, replace(run, training=replace(run.training, checkpoint_minutes=0))


def kill_runs(folder, count, method="resnet", seed=0):
    """{outcome: how often} of killing a run (kill -9) `count` times at random moments. Each kill is followed
    by the next start; the record of a finished run is compared with one that was never killed."""

    def build(name):
        data.prepare_synthetic(Path(folder) / name / "data" / "synthetic", num_images=40)
        return Path(folder) / name

    context = multiprocessing.get_context("forkserver")  # imports PyTorch once
    context.set_forkserver_preload(["companion.runs"])

    def start(build, seconds=None):
        """Exit code of a process that makes the run; -9 where it was killed."""
        process = context.Process(target=ensure, args=_smoke(build, method))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    def record(build):
        found = json.loads((experiment_run(build) / "record.json").read_text(encoding="utf-8"))
        return _without_provenance(found)

    def experiment_run(build):
        experiment, run = _smoke(build, method)
        return experiment.directory(run)

    whole, found, generator, kills, builds = build("whole"), Counter(), np.random.default_rng(seed), 0, 0
    start(whole)  # the fork server starts
    shutil.rmtree(whole / "runs")
    began = time.monotonic()
    assert start(whole) == 0
    longest, expected, here = time.monotonic() - began, record(whole), None
    while kills < count or here:
        here = here or build(f"killed-{(builds := builds + 1)}")
        code = start(here, generator.uniform(0, longest) if kills < count else None)
        if code == -9:
            kills += 1
            continue
        if code:
            found["the next start failed"] += 1
        else:
            found["the same record" if record(here) == expected else "another record"] += 1
        found["temporary files left"] += len(list(here.rglob("*.tmp")))
        shutil.rmtree(here)
        here = None
    return {"killed": kills} | {what: often for what, often in found.items() if often}


def _restored(build, method, results):
    """Makes a run whose model is kept in results."""
    runs.RESULTS = results
    ensure(*_smoke(build, method))


def kill_unpacking(folder, count, seed=0):
    """{outcome: how often} of killing the unpacking of a kept solver at random moments."""
    whole, results = Path(folder) / "whole", Path(folder) / "results"
    data.prepare_synthetic(whole / "data" / "synthetic", num_images=40)
    experiment, run = _smoke(whole, "glow")
    pair, before = [experiment.flow(), run], runs.RESULTS
    ensure(experiment, run)
    try:
        runs.RESULTS = results
        runs.publish_all(experiment, pair, pair)
    finally:
        runs.RESULTS = before
    place = experiment.directory(run).relative_to(whole)
    context, generator, found = (
        multiprocessing.get_context("forkserver"),
        np.random.default_rng(seed),
        Counter(),
    )
    context.set_forkserver_preload(["companion.runs"])
    longest = 10.0
    for number in range(-1, count):  # the first is not killed, and tells how long it takes
        build = Path(folder) / f"killed-{number}"
        shutil.copytree(whole / "data", build / "data")
        for seconds in (generator.uniform(0, longest) if number >= 0 else None, None):
            began = time.monotonic()
            process = context.Process(target=_restored, args=(build, "glow", results))
            process.start()
            process.join(seconds)
            process.kill()
            process.join()
        if number < 0:
            longest = time.monotonic() - began
            expected = sha256(build / place / "model.safetensors")
            continue
        record = json.loads((build / place / "record.json").read_text(encoding="utf-8"))
        same = record["kept"] and sha256(build / place / "model.safetensors") == expected
        found["the same model" if same else "another model"] += 1
        found["temporary files left"] += len(list(build.rglob("*.tmp")))
        shutil.rmtree(build)
    return {what: often for what, often in found.items() if often}


# Whole builds. {stage: what is written when it begins}
STAGES = {"preparing images": "data/*/.preparing-*", "training": "logs/pretrain_flow.ipynb"}
STAGES |= {"evaluating": "runs/**/model.safetensors", "executing notebooks": "logs/solver.ipynb"}
STAGES |= {"tabulating": "logs/tables.ipynb", "rendering": "logs/book.log"}


def kill(process, build, generator):
    """Kills a build at once, or a little later."""
    time.sleep(generator.uniform(0, 2))
    os.killpg(process.pid, signal.SIGKILL)


def fill(process, build, generator):
    """Fills the disk of a build until it ends."""
    with open(build / "filler", "wb", buffering=0) as file:
        while process.poll() is None:
            try:
                file.write(bytes(2**16))
            except OSError:
                time.sleep(0.1)
    (build / "filler").unlink()


def disturb_build(build, disturb, count=1, seed=0):
    """{stage: the build's messages} of disturbing a build `count` times in each stage and resuming it; in
    "at the end", the outcome of the last start, and the remains of the others."""
    command = [sys.executable, "-m", "companion", "book", "--profile", "smoke", "--build", str(build)]
    generator, told = np.random.default_rng(seed), defaultdict(list)

    def start(stage=None):
        began = time.time()
        log = tempfile.TemporaryFile("w+")
        options = dict(cwd=ROOT, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, **options)
        while stage and process.poll() is None:
            if any(path.stat().st_mtime > began for path in build.glob(STAGES[stage])):
                disturb(process, build, generator)
                break
            time.sleep(0.02)
        process.wait()
        log.seek(0)
        return process.returncode, log.read()

    for stage in [stage for stage in STAGES for _ in range(count)]:
        code, text = start(stage)
        told[stage].append(text if code else "nothing happened")
    code, text = start()
    left = [str(path) for name in ("*.tmp", ".tmp*", ".preparing-*") for path in build.rglob(name)]
    whole = code == 0 and (build / "html" / "index.html").exists() and not left
    return dict(told) | {"at the end": "a whole book" if whole else f"{code}, {left}: {text[-2000:]}"}


@contextmanager
def small_disk(folder, megabytes=400):
    """A disk of its own at folder. PermissionError without the right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        raise PermissionError("needs the right to mount a small disk")
    try:
        yield Path(folder) / "book"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# The counts.


def _counted(found):
    words = ", ".join(f"{outcome} ({count})" for outcome, count in sorted(found.items()))
    return sum(found.values()), words


def _flipped(folder, kind, count):
    return _counted(flip_bits(kind, folder, count))


def _hostile(folder, names):
    return _counted(Counter(hostile(name, folder) for name in names))


def _killed_unpacking(folder, count):
    return _counted(kill_unpacking(folder, count))


def _killed_runs(folder, count):
    found = kill_runs(folder, count, "glow")
    kills = found.pop("killed")
    ended = ", ".join(f"{outcome} ({count} runs)" for outcome, count in found.items())
    return kills, f"the next start went on; of runs that ended so: {ended}"


def _killed_builds(folder, count):
    told = disturb_build(folder / "book", kill, count)
    end = told.pop("at the end")
    return sum(map(len, told.values())), f"after the last start: {end}"


def _full_disk(folder):
    with small_disk(folder) as build:
        told = disturb_build(build, fill)
    end, texts = told.pop("at the end"), [text for texts in told.values() for text in texts]
    said = sum("free some space" in text for text in texts)
    return len(texts), f"said so ({said}); after the last start: {end}"


COLUMNS = ("Tried", "Times", "What came of it")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    args = parser.parse_args()
    path = RESULTS / "benchmarks" / "faults.json"
    about = {"arguments": vars(args), "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]}
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = old["rows"] if about.items() <= old.items() else []

    def tried(what, attempt, *how):
        """Writes a row with what attempt(folder, *how) gives; a row that is there is not made again."""
        if any(row["Tried"] == what for row in rows):
            return
        with tempfile.TemporaryDirectory() as folder:
            times, words = attempt(Path(folder), *how)
        rows.append(dict(zip(COLUMNS, (what, times, words))) | provenance())
        print(what, times, words, flush=True)
        write_json(path, about | {"rows": rows})
        write_csv(path.with_suffix(".csv"), [{name: row[name] for name in COLUMNS} for row in rows])

    for kind in FILES:
        tried(f"one bit flipped: {kind}", _flipped, kind, flips(kind, args.flips))
    for kind, names in itertools.groupby(HOSTILE, lambda name: name.partition(":")[0]):
        tried(f"hostile file: {kind}", _hostile, list(names))
    tried("unpacking of a kept model killed", _killed_unpacking, args.kills)
    tried("training or evaluation killed", _killed_runs, args.kills)
    tried(f"build killed while {', '.join(STAGES)}", _killed_builds, 2)
    tried(f"build on a full disk while {', '.join(STAGES)}", _full_disk)


if __name__ == "__main__":
    main()
