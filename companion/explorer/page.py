"""The explorer of λ and μ for the book's page: a precomputed grid of reconstructions, and the solver itself
as ONNX.

explorer.js shows and computes everything in the browser; a notebook can load it, too, through anywidget
(`GridExplorer`)."""

import base64
import itertools
import json
import tempfile
from pathlib import Path

import anywidget
import numpy as np
import torch
import traitlets
from PIL import Image
from torch.func import functional_call
from tqdm.auto import tqdm

from companion import gallery
from companion.explorer.weights import pack, rounded
from companion.figures import pixels
from companion.files import write_json
from companion.records import measured
from companion.runs import is_finished, load, records_of_build
from companion.settings import METHODS, TASKS
from companion.training import model_path
from data.portraits import BOXES
from flowlib.export import export_onnx
from flowlib.files import write_atomically
from flowlib.images import to_tensor
from flowlib.metrics import psnr

SCALES = tuple(i / 4 for i in range(9))  # factors of all trained step sizes
SHIFTS = tuple(round(i / 10, 2) for i in range(-2, 3))  # added to all trained shrinkages
NUM_IMAGES = 3
SHOWN = {"inpainting": ("glow",), "denoising": ("glow-noisy", "glow"), "deblurring": ("glow",)}
HERE = Path(__file__).parent
_places = itertools.count()  # of explorers on a page


def normals(seed, shape):
    """Standard normal numbers, the same as explorer.js draws from the same seed: a counter, an integer hash
    (mulberry32), and Box and Muller's formula."""
    count = np.arange(2 * int(np.prod(shape)), dtype=np.uint32)
    a = np.uint32((seed + 1) * 0x9E3779B9 % 2**32) + (count + np.uint32(1)) * np.uint32(0x6D2B79F5)
    t = (a ^ (a >> np.uint32(15))) * (a | np.uint32(1))
    t = (t + (t ^ (t >> np.uint32(7))) * (t | np.uint32(61))) ^ t
    u = ((t ^ (t >> np.uint32(14))) / 2**32).reshape(-1, 2)
    values = np.sqrt(-2 * np.log(1 - u[:, 0])) * np.cos(2 * np.pi * u[:, 1])
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def measure(operator, x, seed):
    """y = A x + noise of one image (1, C, H, W), the noise drawn as the page draws it."""
    y = operator.A(x)
    return y + operator.sigma * normals(seed, x.shape) if operator.sigma else y


def solve_with(solver, step_size, shrinkage, y, operator, **options):
    """The solver's answer with other step sizes and shrinkages, (K,) or (K, B, 1, 1, 1) for a batch of B;
    its own stay. shrinkage is None for proxes that have none."""
    scalars = {"step_size": step_size} | ({} if shrinkage is None else {"shrinkage": shrinkage})
    return functional_call(solver, scalars, (y, operator), options)


@torch.no_grad()
def grid(solver, operator, x, seed=0):
    """Reconstructions of one image x (1, C, H, W) with every pair of SHIFTS and SCALES: (len(SHIFTS),
    len(SCALES), C, H, W)."""
    y = measure(operator, x, seed).expand(len(SCALES), -1, -1, -1)
    scales = torch.tensor(SCALES).reshape(1, -1, 1, 1, 1)
    step_size = solver.step_size.reshape(-1, 1, 1, 1, 1) * scales
    return torch.stack(
        [solve_with(solver, step_size, solver.shrinkage + shift, y, operator) for shift in SHIFTS]
    )


def shown(experiment):
    """(images, labels, names of the experiment, {task: (method, solver, record, steps)}): the two real faces
    with the flow solvers that are kept with the code, or, if none is, this build's own with its first test
    images; weights rounded to steps, as on the page."""
    found, names = {}, experiment.names
    for task in SHOWN:
        of_task = gallery.kept_records(task)
        method = next((m for m in SHOWN[task] if m in of_task), None)
        if method:
            record = of_task[method]
            found[task], names = (method, gallery.solver(record), record), record["experiment"]
    if found:
        return gallery.faces(), list(BOXES), names, _rounded(found, gallery.faces())
    records = {record["name"]: record for record in records_of_build(experiment)}
    for task, methods in SHOWN.items():
        for run in (experiment.solver(task, method) for method in methods):
            if is_finished(experiment, run) and model_path(experiment, run).exists():  # trained, not diverged
                found.setdefault(task, (run.method, load(experiment, run), records[run.name]))
    images = to_tensor(experiment.split("test")[:NUM_IMAGES])
    return images, [f"test image {i + 1}" for i in range(len(images))], names, _rounded(found, images)


def _rounded(found, images):
    solvers = {}
    for task, (method, solver, record) in found.items():
        y, operator = measured(task, images, 0)
        solver, steps = rounded(solver, operator, y, error=10 ** (-record["psnr"]["mean"] / 10))
        solvers[task] = method, solver, record, steps
    return solvers


def about(record):
    """The solver of a task in a line: method, training, PSNR on test images."""
    data, training = record["data"], record["training"]
    name = {"celeba": "CelebA", "synthetic": "drawn faces"}.get(data["name"], data["name"])
    return (
        f"{METHODS[record['method']].label}, {record['num_folds']} folds; trained on"
        f" {name} ({data['split']['train']:,} images, {training['images_seen']:,} seen with repeats):"
        f" {record['psnr']['mean']:.2f} dB on {len(record['psnr']['values'])} test images,"
        " before its weights were rounded for this page, which costs less than 0.02 dB on average over test"
        " images; a single face can change by more, either way."
    )


# Tips: the text, the tasks, and the slider positions.
TIPS = (
    ("**Too small a step**, μ × 0: no measurement enters; this is the prior's own.", {"scale": 0}),
    ("**Too large a step**, μ × 2: folds correct by twice what they were trained to.", {"scale": 2}),
    ("**Less shrinkage**, λ − 0.2: below zero, latents move *away* from the likeliest.", {"shift": -0.2}),
    (
        "**A hole that was not trained for**, 12 pixels wide, told to all folds: more pixels are measured.",
        {"mask_size": 12},
    ),
    ("**Noise that was not trained for**, σ = 0.1: less of it.", {"sigma": 0.1}),
)


@torch.no_grad()
def tips(images, labels, solvers):
    """Markdown: tips for the page, with their effect on the PSNR of its first image."""
    x, lines = images[:1], []
    for text, move in TIPS:
        changes, found = {k: v for k, v in move.items() if k not in ("scale", "shift")}, []
        for task, (_, solver, *_) in solvers.items():
            if not changes.keys() <= TASKS[task].parameters.keys():
                continue
            scalars = solver.step_size * move.get("scale", 1), solver.shrinkage + move.get("shift", 0)
            trained, moved = TASKS[task].make_operator(64), TASKS[task].make_operator(64, **changes)
            y = measure(trained, x, 0), measure(moved, x, 0)
            before = psnr(solver(y[0], trained), x).item()
            after = psnr(solve_with(solver, *scalars, y[1], moved), x).item()
            finite = np.isfinite(after)
            change = f"from {before:.2f} to {after:.2f} dB" if finite else "to what is not finite"
            measured = f" (the measurement itself: {psnr(y[1], x).item():.2f} dB)" if changes else ""
            found.append(f"{task} {change}{measured}")
        if found:
            text_found = "; ".join(found).replace("-", "−")
            lines.append(f"- {text} {text_found[0].upper()}{text_found[1:]}.")
    return "\n".join([f"Things to try, with what they do to {labels[0]}:", "", *lines])


@torch.no_grad()
def beside_the_front_page(images, solvers):
    """Markdown: why the first face's PSNR differs on the front page, whose solvers are not rounded."""
    found = []
    for task, (_, solver, record, _) in solvers.items():
        y, operator = measured(task, images[:1], 0)
        if not operator.sigma:
            there, here = (psnr(s(y, operator), images[:1]).item() for s in (gallery.solver(record), solver))
            found.append(f"{task} {there:.2f} dB there, {here:.2f} dB here".replace("-", "−"))
    return (
        f"The same face on the front page: {'; '.join(found)}. The solvers are the same, but for this page"
        " their weights are rounded. For denoising the noise differs too, and the flow here is that of noisy"
        " images."
    )


def write_explorer(experiment):
    """Writes build/explorer/: for every task that has one a sprite of the grid (jpeg) and the flow solver
    (packed ONNX), and config.json with all numbers. Raises FileNotFoundError where no solver is trained."""
    out, tasks = experiment.build / "explorer", []
    images, labels, names, solvers = shown(experiment)
    for task, (method, solver, record, steps) in solvers.items():
        operator = TASKS[task].make_operator(images.shape[-1])
        answers = torch.stack(
            [
                grid(solver, operator, x[None], seed)
                for seed, x in enumerate(tqdm(images, desc=f"grid {task}"))
            ]
        )
        quality = psnr(answers.flatten(0, 2), images.repeat_interleave(len(SHIFTS) * len(SCALES), 0))
        rows = [
            np.concatenate([pixels(x) for x in row.nan_to_num()], axis=1) for row in answers.flatten(0, 1)
        ]
        # Colours at full resolution: where the solver falls apart they are noise from pixel to pixel.
        _write_image(out / f"{task}.jpeg", np.concatenate(rows), quality=93, subsampling=0)
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(solver, operator, Path(folder, "solver.onnx"))
            packed = pack(Path(folder, "solver.onnx"), steps)
        write_atomically(out / f"{task}.bin", lambda path, packed=packed: path.write_bytes(packed))
        tasks.append(
            {
                "task": task,
                "label": TASKS[task].kind.capitalize() + " (noise-trained flow)" * (method == "glow-noisy"),
                "method": method,
                "about": about(record),
                "megabytes": round(len(packed) / 1e6, 1),
                "sprite": f"{task}.jpeg",
                "solver": f"{task}.bin",
                "mu": solver.step_size.tolist(),
                "lambda": solver.shrinkage.tolist(),
                "psnr": _finite(quality.reshape(answers.shape[:3])),
                "sigma": operator.sigma,
                "hole": TASKS[task].parameters.get("mask_size"),
                "sigma_b": TASKS[task].parameters.get("sigma_b"),
                "kernel_size": len(operator.kernel) if task == "deblurring" else None,
            }
        )
    if not tasks:
        raise FileNotFoundError(
            f"no flow solver in {experiment.build}: make one (python -m companion run --run inpainting-glow)"
        )
    _write_image(out / "originals.png", np.concatenate([pixels(x) for x in images], axis=1))
    told = [tips(images, labels, solvers)]
    if labels == list(BOXES):
        told.append(beside_the_front_page(images, solvers))
    write_json(
        out / "config.json",
        {
            "tasks": tasks,
            "scales": SCALES,
            "shifts": SHIFTS,
            "labels": labels,
            "tips": "\n\n".join(told),
            "experiment": names,
        },
    )


def tiles(folder, task):
    """The reconstructions of the first image that write_explorer put into a sprite, as uint8 images, row by
    row; none where the task has no solver."""
    path = Path(folder) / f"{task}.jpeg"
    if not path.exists():
        return [np.full((64, 64, 3), 255, np.uint8)]
    sprite = np.asarray(Image.open(path).convert("RGB"))
    size = sprite.shape[1] // len(SCALES)
    rows = [sprite[i * size : (i + 1) * size] for i in range(len(SHIFTS))]
    return [row[:, j * size : (j + 1) * size] for row in rows for j in range(len(SCALES))]


def _finite(values):
    """A tensor as nested lists, with None for values that JSON lacks."""
    if values.ndim:
        return [_finite(value) for value in values]
    return round(float(values), 3) if torch.isfinite(values) else None


def _write_image(path, array, **options):
    write_atomically(path, lambda p: Image.fromarray(array).save(p, format=path.suffix[1:], **options))


def _data_url(path):
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _config(folder):
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no explorer in {folder}: run python -m companion explorer")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Bytes, inline: a page that was opened as a file may not read the pixels of another file, and some
    # browsers give noise for those of any picture.
    strip = np.asarray(Image.open(folder / "originals.png").convert("RGB"))
    images = np.stack(np.split(strip, len(config["labels"]), axis=1)).transpose(0, 3, 1, 2)
    return config | {"originals": base64.b64encode(images.tobytes()).decode()}


def page(folder, address, ort=None):
    """HTML of the explorer for a static page. folder: what write_explorer wrote; address: where the page
    finds these files; ort: where it finds onnxruntime-web's module, None if it does not. The script is
    inline, so that it works from file:// too, and no module, so that it runs where it stands and nothing
    below moves."""
    reason = "install npm and build this book again, or run make lab and open live_explorer.ipynb"
    config = _config(Path(folder)) | {"ort": ort, "reason": reason}
    for task in config["tasks"]:
        task |= {key: f"{address}/{task[key]}" for key in ("sprite", "solver")}
    text = json.dumps(config).replace("<", "\\u003c")
    place = f"flow-explorer-place-{next(_places)}"
    script = (HERE / "explorer.js").read_text(encoding="utf-8").replace("export default { render };", "")
    return (
        f"<style>{(HERE / 'explorer.css').read_text(encoding='utf-8')}</style>"
        f'<div id="{place}"><noscript>This explorer needs JavaScript: allow it for this page. '
        "The figures below show its grids.</noscript></div>"
        f"<script>(() => {{ {script}\n"
        f"render({{ model: {{ get: () => ({text}) }}, "
        f'el: document.getElementById("{place}"), place: document }}); }})();</script>'
    )


class GridExplorer(anywidget.AnyWidget):
    """The same explorer as a widget in a notebook, with the precomputed grid only; folder: what
    write_explorer wrote."""

    _esm = HERE / "explorer.js"
    _css = HERE / "explorer.css"
    config = traitlets.Dict().tag(sync=True)

    def __init__(self, folder):
        config = _config(Path(folder)) | {"ort": None, "reason": "use companion.explorer.live.Explorer"}
        for task in config["tasks"]:
            task |= {"sprite": _data_url(Path(folder) / task["sprite"])}
        super().__init__(config=config)
