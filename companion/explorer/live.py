"""The live explorer: move μ and λ in a notebook, and the solver of this build answers."""

import asyncio
import contextlib
import functools
import html
import io
import math
from pathlib import Path

import anywidget
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import traitlets
from PIL import Image

import data
from companion import figures, gallery
from companion.explorer.page import measure, solve_with
from companion.records import last_fold_only
from companion.runs import load
from companion.settings import METHODS, TASKS
from companion.training import model_path
from flowlib.images import to_tensor
from flowlib.metrics import psnr
from flowlib.operators import Blur, Denoising, Inpainting

# The setting that can be moved for each kind of task: label, range, and the operator it makes.
SETTINGS = {
    "denoising": ("noise σ", (0.0, 0.4, 0.01), lambda value: Denoising(value)),
    "inpainting": ("hole W", (1, 40, 1), lambda value: Inpainting(int(value))),
    "deblurring": ("blur σ_b", (0.3, 5.0, 0.1), lambda value: Blur(value)),
}
ZOOM = 2


class Upload(anywidget.AnyWidget):
    """A button for an image file, which the browser makes small before it sends it: Jupyter closes the
    connection at messages of more than 10 MB. value: () or one {"name", "content" (bytes), "problem"}."""

    _esm = Path(__file__).with_name("upload.js")
    value = traitlets.Tuple().tag(sync=True)


def solvers(experiment):
    """{task: {label: function that loads the solver}}: those kept with the code, then those of this build."""
    found = {}
    for task in TASKS:
        kept = gallery.kept_records(task, experiment.names["edition"])
        found[task] = {
            f"{METHODS[m].label}, kept ({r['psnr']['mean']:.2f} dB)": functools.partial(gallery.solver, r)
            for m, r in kept.items()
        }
    for run in experiment.runs().values():
        if run.kind == "solver" and model_path(experiment, run).is_file():
            label = f"{METHODS[run.method].label}, of this build"
            found[run.task][label] = functools.partial(load, experiment, run)
    return {task: labels for task, labels in found.items() if labels}


def images(experiment):
    """The two real faces, then the test images of this build, where its data are prepared."""
    prepared = (experiment.build / "data" / experiment.dataset / "manifest.json").exists()
    return torch.cat([gallery.faces(), *([to_tensor(experiment.split("test"))] if prepared else [])])


def _cut(file, crop):
    return to_tensor(data.decode(bytes(file["content"]), file["name"], crop)[None])


class Explorer(widgets.VBox):
    """Choose a task, an image (number 1 and 2 are real faces, then come this build's test images, 0 is your
    own) and a solver, one kept with the code or trained in this build; move its scalars; see all folds.

    delay: seconds without another change before anything is computed, so that a moving slider does not pile
    up work. Raises FileNotFoundError where no solver is kept or trained."""

    def __init__(self, experiment, delay=0.05):
        self.experiment, self.delay, self._timer, self._held = experiment, delay, None, False
        self.solvers = solvers(experiment)
        if not self.solvers:
            raise FileNotFoundError(
                f"nothing is trained in {experiment.build}: run make book, or python -m companion run"
            )
        self.images = images(experiment)
        self.own, self._file, self.solver, self.trained_scalars, self.sliders = None, None, None, {}, {}

        self.task = widgets.Dropdown(options=list(self.solvers), description="task")
        self.method = widgets.Dropdown(description="solver", layout=widgets.Layout(width="34em"))
        self.image = widgets.BoundedIntText(min=1, max=len(self.images), value=1, description="image")
        self.upload = Upload()
        ranges = {"zoom": (1, 1, 8), "left–right": (0.5, 0, 1), "up–down": (0.5, 0, 1)}
        self.crop = {
            name: widgets.FloatSlider(value=value, min=low, max=high, step=0.01, description=name)
            for name, (value, low, high) in ranges.items()
        }
        self.crops = widgets.HBox(
            list(self.crop.values()), layout=widgets.Layout(flex_flow="row wrap", display="none")
        )
        self.setting = widgets.FloatSlider(continuous_update=True)
        self.seed = widgets.Button(description="New noise")
        self.scale = widgets.FloatSlider(value=1, min=0, max=2, step=0.01, description="μ ×")
        self.shift = widgets.FloatSlider(
            value=0, min=-0.5, max=0.5, step=0.005, description="λ +", readout_format=".3f"
        )
        self.reset = widgets.Button(description="Trained values")
        self.folds = widgets.Accordion(children=[widgets.VBox()], titles=["Each fold on its own"])
        self.panels = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        self.plot = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.status = widgets.HTML()
        self._noise = 0
        super().__init__(
            [
                widgets.HBox([self.task, self.method], layout=widgets.Layout(flex_flow="row wrap")),
                widgets.HBox([self.image, self.upload], layout=widgets.Layout(flex_flow="row wrap")),
                self.crops,
                widgets.HBox([self.setting, self.seed], layout=widgets.Layout(flex_flow="row wrap")),
                widgets.HBox(
                    [self.scale, self.shift, self.reset], layout=widgets.Layout(flex_flow="row wrap")
                ),
                self.folds,
                self.panels,
                self.plot,
                self.status,
            ]
        )
        self.task.observe(self._choose_task, "value")
        self.method.observe(self._choose_method, "value")
        self.image.observe(self._choose_image, "value")
        self.upload.observe(self._take_upload, "value")
        for slider in self.crop.values():
            slider.observe(self._crop, "value")
        self.scale.observe(self._move_all, "value")
        self.shift.observe(self._move_all, "value")
        self.setting.observe(self._changed, "value")
        self.seed.on_click(self._new_noise)
        self.reset.on_click(self._reset)
        self._choose_task()

    # What the reader does.

    def _choose_task(self, _=None):
        name, (low, high, step), _ = SETTINGS[TASKS[self.task.value].kind]
        trained = self._trained_setting()
        with self._hold():
            # A slider refuses bounds that its value does not fit, so they are opened first.
            self.setting.min, self.setting.max = min(low, self.setting.value), max(high, self.setting.value)
            self.setting.value = trained
            self.setting.min, self.setting.max, self.setting.step, self.setting.description = (
                low,
                high,
                step,
                name,
            )
            self.seed.layout.display = None if name == "noise σ" else "none"
            self.method.options = list(self.solvers[self.task.value].items())
            labels = list(self.solvers[self.task.value])
            self.method.label = next((label for label in labels if "GLOW" in label), labels[0])
        self._choose_method()

    def _trained_setting(self):
        parameters = TASKS[self.task.value].parameters
        return next(value for key, value in parameters.items() if key in ("sigma", "mask_size", "sigma_b"))

    def _choose_method(self, _=None):
        if self._held:
            return
        try:
            self.solver = self.method.value()
        except (OSError, ValueError) as error:  # deleted or damaged since
            return self._show_nothing(error)
        self.trained_scalars = {"μ": self.solver.step_size.tolist()}
        if self.solver.proxes[0].uses_shrinkage:
            self.trained_scalars["λ"] = self.solver.shrinkage.tolist()
        self.shift.disabled = "λ" not in self.trained_scalars
        self.sliders = {
            name: [
                widgets.FloatSlider(
                    value=value,
                    min=-0.995,
                    max=max(3, 2 * max(values)),  # the range of all of them together
                    step=0.005,
                    description=f"{name} {k}",
                    readout_format=".3f",
                )
                for k, value in enumerate(values, start=1)
            ]
            for name, values in self.trained_scalars.items()
        }
        for slider in sum(self.sliders.values(), []):
            slider.observe(self._changed, "value")
        self.folds.children = [widgets.HBox([widgets.VBox(column) for column in self.sliders.values()])]
        with self._hold():
            self.scale.value, self.shift.value = 1, 0
        self._move_all()

    def _choose_image(self, _=None):
        if self._held:
            return
        if self.image.value:
            self.own, self.image.min, self.crops.layout.display = None, 1, "none"
        self._changed()

    def _take_upload(self, _=None):
        if not self.upload.value:
            return
        file = self.upload.value[-1]
        self.upload.value = ()  # so that the same file again is a change
        try:
            if file.get("problem"):
                raise ValueError(f"{file['name']} {file['problem']}")
            own = _cut(file, (0.5, 0.5, 1))
        except ValueError as error:
            self._say(error)
            return
        with self._hold():  # so that each number of another image is a change
            self.own, self._file, self.image.min, self.image.value = own, file, 0, 0
            self.crop["zoom"].value, self.crop["left–right"].value, self.crop["up–down"].value = 1, 0.5, 0.5
            self.crops.layout.display = None
        self._changed()

    def _crop(self, _=None):
        if self._held or self.own is None:
            return
        zoom, x, y = (slider.value for slider in self.crop.values())
        self.own = _cut(self._file, (x, y, zoom))
        self._changed()

    def _say(self, message):
        self.status.value = f"<b>{html.escape(str(message))}</b>"

    def _show_nothing(self, error):
        """A message in place of results that do not belong to the choice."""
        self.solver, self.psnr, self.panels.children, self.plot.value = None, {}, (), b""
        self._say(error)

    def _new_noise(self, _=None):
        self._noise += len(self.images)
        self._changed()

    def _reset(self, _=None):
        """The measurement and all scalars as they were trained."""
        self._noise = 0
        with self._hold():
            self.scale.value, self.shift.value, self.setting.value = 1, 0, self._trained_setting()
        self._move_all()

    def _move_all(self, _=None):
        if self._held:
            return
        with self._hold():
            for slider, value in zip(self.sliders.get("μ", []), self.trained_scalars.get("μ", [])):
                slider.value = value * self.scale.value
            for slider, value in zip(self.sliders.get("λ", []), self.trained_scalars.get("λ", [])):
                slider.value = value + self.shift.value
        self._changed()

    @contextlib.contextmanager
    def _hold(self):
        """While this is open, changes of sliders are our own and compute nothing."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    # The answer.

    def _changed(self, _=None):
        if self._held or self.solver is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel: a script or a test
            return self.refresh()
        if self._timer:
            self._timer.cancel()
        self._timer = loop.call_later(self.delay, self.refresh)

    @torch.no_grad()
    def refresh(self):
        """Solves with the sliders' values, and shows the answer."""
        if self.solver is None:
            return
        index = self.image.value - 1
        x = self.own if self.own is not None else self.images[index : index + 1]
        make = SETTINGS[TASKS[self.task.value].kind][2]
        told = operator = make(self.setting.value)
        if isinstance(operator, Inpainting):  # as on the book's page
            told = last_fold_only(make(self._trained_setting()), operator, self.solver.num_folds)
        y = measure(operator, x, index + self._noise)
        scalars = {name: torch.tensor([s.value for s in sliders]) for name, sliders in self.sliders.items()}
        x_hat, folds = solve_with(self.solver, scalars["μ"], scalars.get("λ"), y, told, return_folds=True)
        shown = {"measurement": y} | {f"fold {k}": fold.x for k, fold in enumerate(folds, start=1)}
        self.psnr = {name: psnr(image, x).item() for name, image in shown.items()}
        error = (x_hat - x).abs().mean(dim=1, keepdim=True).expand_as(x) * 4 - 0.5
        panels = [self._panel(name, image, decibels(self.psnr[name])) for name, image in shown.items()]
        panels += [self._panel("error × 4", error, ""), self._panel("original", x, "")]
        self.panels.children = panels
        self.plot.value = _plot(folds, list(self.psnr.values())[1:])
        self.status.value = f"PSNR <b>{decibels(psnr(x_hat, x).item())}</b>"

    @staticmethod
    def _panel(name, image, text):
        array = figures.pixels(image[0].nan_to_num()).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
        return widgets.VBox(
            [widgets.Image(value=_png(array), format="png"), widgets.HTML(f"{name}<br>{text}")]
        )


def decibels(value):
    """As text; a perfect answer has no error, and an infinite PSNR."""
    if not math.isfinite(value):
        return "exact" if value > 0 else "not finite"
    return f"{value:.2f} dB".replace("-", "−")


def _png(array):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "png")
    return file.getvalue()


def _plot(folds, quality):
    """PSNR and, for flows, latent norm and log-likelihood before and after each fold's prox, as PNG bytes."""
    flow = folds[0].latent_norm is not None
    positions = range(1, len(folds) + 1)
    with plt.rc_context(figures.STYLE | {"figure.dpi": 90, "figure.constrained_layout.use": False}):
        figure, axes = plt.subplots(1, 3 if flow else 1, figsize=(9 if flow else 3, 2.4), squeeze=False)
        axes[0, 0].plot(positions, quality, "o-", color=figures.COLOURS["glow"])
        axes[0, 0].set_title("PSNR, dB")
        if flow:
            for axis, title, keys in (
                (axes[0, 1], "latent norm", ("latent_norm_tilde", "latent_norm")),
                (axes[0, 2], "log p, nats", ("log_prob_tilde", "log_prob")),
            ):
                for key, label, fill in zip(keys, ("before the prox", "after"), ("white", None)):
                    values = [getattr(fold, key).item() for fold in folds]
                    axis.plot(positions, values, "o-", color=figures.COLOURS["unet"], mfc=fill, label=label)
                axis.set_title(title)
            axes[0, 1].legend(fontsize=8)
        for axis in axes[0]:
            axis.set(xticks=positions, xlabel="fold")
        # Fixed: tight_layout takes as long as the drawing itself.
        figure.subplots_adjust(left=0.07 if flow else 0.16, right=0.98, bottom=0.21, top=0.87, wspace=0.32)
        file = io.BytesIO()
        figure.savefig(file)
        plt.close(figure)
    return file.getvalue()
