"""Plots: every function takes images or a frame of results (see results.Run) and returns a matplotlib Figure.

Figures have a white background of their own, so that images look alike in a light and a dark page, and are
drawn small with large type, so that they can still be read on a telephone."""

import functools
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import SVG
from matplotlib.ticker import MaxNLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from companion.results import CPU, rows
from companion.settings import METHODS, TASKS
from companion.words import listed
from flowlib.images import to_uint8
from flowlib.metrics import psnr

matplotlib.rcdefaults()  # a reader's matplotlibrc may ask for LaTeX, or for fonts that are not there
if get_ipython():
    set_matplotlib_formats("png")  # a kernel forgets to where MPLBACKEND is set, as on clusters

# Okabe and Ito's colour-blind-safe palette: one colour a method, everywhere.
COLOURS = {"resnet": "#E69F00", "unet": "#0072B2", "glow": "#009E73", "glow-noisy": "#CC79A7"}
GREY, INK = "#8A8A8A", "#222222"
SET_BACK = "back to its best weights"
WIDTH = 5.2
STYLE = {
    "figure.dpi": 136,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 10.5,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "text.color": INK,
}


# The book's dark theme inverts plots, but must not invert photographs: these have no background of their own,
# and a grey that is legible on both.
ON_ANY_GROUND = STYLE | {"figure.facecolor": "none", "axes.facecolor": "none"}
ON_ANY_GROUND |= {"text.color": "#767676", "axes.labelcolor": "#767676"}


def styled(plot, style=STYLE):
    """Draws with a style, and takes the figure from pyplot, so that a notebook shows it once: as the cell's
    value."""

    @functools.wraps(plot)
    def wrapper(*args, **kwargs):
        with plt.rc_context(style):
            figure = plot(*args, **kwargs)
            figure.canvas.draw()  # lays the figure out while the style is in force
        plt.close(figure)
        return figure

    return wrapper


photographs = functools.partial(styled, style=ON_ANY_GROUND)


def as_svg(figure):
    """A figure as lines and letters that stay sharp at any size, for a notebook to show."""
    text = io.StringIO()
    # The same figure, the same file; and each image with its own pixels.
    with plt.rc_context({"svg.hashsalt": "flowlib", "image.composite_image": False}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return SVG(text.getvalue())


def pixels(image):
    """One image, uint8 (H, W, 3) or a tensor (3, H, W) in [-0.5, 0.5], as uint8 (H, W, 3)."""
    return to_uint8(image[None])[0] if isinstance(image, torch.Tensor) else np.asarray(image)


@photographs
def image_grid(columns, below=None, row_labels=None, width=WIDTH):
    """Images side by side: {title: images of one column}. below: {title: one text an image}, row_labels: one
    a row; width in inches."""
    num_rows, num_columns = max(map(len, columns.values())), len(columns)
    texts = below is not None
    height = num_rows * (0.97 * width / num_columns + 0.2 * texts) + 0.3
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(width, height), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    for column, (title, images) in zip(axes.T, columns.items()):
        column[0].set_title(title, fontsize=11 if num_columns < 5 else 9)
        for row, axis in enumerate(column):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row >= len(images):
                continue
            axis.imshow(pixels(images[row]), interpolation="nearest")
            if texts and title in below:
                axis.set_xlabel(below[title][row], labelpad=2, fontsize=10.5 if num_columns < 5 else 9)
    for label, axis in zip(row_labels or [], axes[:, 0]):
        axis.set_ylabel(label)
    return figure


def examples(images, y, estimates):
    """One row an image: measurement y, the estimate of each method, original; PSNR below."""
    x = images[: len(y)]
    columns = {"measurement": y} | {METHODS[method].short: x_hat for method, x_hat in estimates.items()}
    below = {title: [f"{value:.1f} dB" for value in psnr(column, x)] for title, column in columns.items()}
    return image_grid(columns | {"original": x}, below=below)


def mosaic(images, num_columns, gap=2):
    """Images of one size as one image, num_columns a row, uint8 (H, W, 3)."""
    tiles = [np.pad(pixels(i), ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for i in images]
    rows = [np.concatenate(tiles[i : i + num_columns], axis=1) for i in range(0, len(tiles), num_columns)]
    rows[-1] = np.pad(
        rows[-1], ((0, 0), (0, rows[0].shape[1] - rows[-1].shape[1]), (0, 0)), constant_values=255
    )
    return np.concatenate(rows)


@photographs
def contact_sheet(images, num_columns=8):
    """Images of one size, num_columns a row."""
    gaps = mosaic([np.zeros_like(pixels(image)) for image in images], num_columns)
    sheet = np.dstack([mosaic(images, num_columns), 255 - gaps[..., 0]])
    figure, axis = plt.subplots(figsize=(WIDTH, WIDTH * sheet.shape[0] / sheet.shape[1]))
    axis.imshow(sheet, interpolation="nearest")
    axis.axis("off")
    return figure


@styled
def training_curve(history, ylabel):
    """Loss of the last batch and validation loss over images seen; history: rows as in a record."""
    seen = [row["images_seen"] for row in history]
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    axis.plot(seen, [row["loss"] for row in history], color=GREY, label="one training batch")
    axis.plot(
        seen, [row["val_loss"] for row in history], color=COLOURS["glow"], marker="o", label="validation"
    )
    axis.set(xlabel="images seen", ylabel=ylabel)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.legend()
    return figure


@styled
def lines(positions, values, xlabel, ylabel):
    """One line for each name: values = {name: numbers at the positions}."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    for (name, numbers), colour in zip(values.items(), COLOURS.values()):
        axis.plot(positions, numbers, color=colour, marker="o", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, xticks=positions, ylim=(0, None))
    axis.legend()
    return figure


@styled
def fold_curves(runs):
    """PSNR, latent norm and bits per dimension through the folds of flow solvers, one column a run."""
    quantities = {"psnr": "PSNR, dB", "latent_norm": "latent norm", "bits_per_dim": "bits per dimension"}
    figure, axes = plt.subplots(3, len(runs), figsize=(WIDTH, 6.4), squeeze=False, sharex="col")
    for column, run in zip(axes.T, rows(runs)):
        colour, folds = COLOURS[run.method], run.folds
        positions = np.arange(1, len(folds) + 1)
        column[0].set_title(f"{TASKS[run.task].label}\n{METHODS[run.method].short}")
        column[-1].set(xlabel="fold k", xticks=positions)
        for axis, (key, label) in zip(column, quantities.items()):
            before, after = ([fold[k] for fold in folds] for k in (f"{key}_tilde", key))
            path = np.stack([before, after], axis=1).ravel()
            axis.plot(np.stack([positions - 0.2, positions + 0.2], axis=1).ravel(), path, color=colour, lw=1)
            axis.plot(
                positions - 0.2,
                before,
                "o",
                color=colour,
                mfc="white",
                label=r"before the prox, $\tilde{x}_k$",
            )
            axis.plot(positions + 0.2, after, "o", color=colour, label="after the prox, $x_k$")
            if axis in axes[:, 0]:
                axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def with_curves(runs):
    """The solvers among runs whose training left a curve."""
    return runs[[r.kind == "solver" and r.history is not None and len(r.history) > 1 for r in rows(runs)]]


def draw_validation(axis, run, colour, scale="images_seen", unit=1, **style):
    """Validation quality over images seen or minutes, with a cross where a training, whose validation had
    fallen, went back to its best weights."""
    history = run.history[run.history.val_loss.astype(bool)]
    label = METHODS[run.method].short
    axis.plot(history[scale] / unit, history.dB, "o-", color=colour, label=label, **style)
    back = history[history.step.isin([restart.step for restart in run.restarts])]
    if len(back):
        axis.plot(back[scale] / unit, back.dB, "x", color=INK, zorder=3, label=SET_BACK)


def legend_entries(axes):
    """{text: handle} of these axes, each text once and the crosses last."""
    found = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    return dict(sorted(found.items(), key=lambda entry: entry[0] == SET_BACK))


@styled
def learning_curves(runs, paper=None):
    """Validation quality, −10 log10 of the mean squared error, over images seen and, where all ran on one
    kind of machine, over minutes of training; one row a task, one line a method. paper: {(task, method):
    PSNR}, drawn as dotted lines in the methods' colours."""
    runs = with_curves(runs)
    runs = runs[runs.method.isin(COLOURS)]
    tasks = list(runs.task.unique())
    scales = {"images_seen": ("thousand images seen", 1000), "minutes": ("minutes of training", 1)}
    num_columns = 2 if len({r.made["hardware"] for r in rows(runs)}) == 1 else 1
    size = (WIDTH, 0.6 + 2.6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), num_columns, figsize=size, squeeze=False, sharey="row")
    for line, task in zip(axes, tasks):
        for axis, (scale, (label, unit)) in zip(line, scales.items()):
            for r in rows(runs[runs.task == task]):
                draw_validation(axis, r, COLOURS[r.method], scale, unit, ms=3, lw=1.4)
            for (of, method), value in (paper or {}).items():
                if of == task and method in COLOURS:
                    axis.axhline(value, color=COLOURS[method], ls=":", lw=1.2)
            if task == tasks[-1]:
                axis.set_xlabel(label)
        line[0].set(ylabel="validation, dB")
        line[0].set_title(TASKS[task].label, loc="left")
    found = legend_entries(axes[:, 0])
    style = dict(loc="outside upper center", ncols=3 if SET_BACK in found else 4, fontsize=9.5)
    figure.legend(found.values(), found.keys(), **style)
    return figure


@styled
def validation_curves(runs, paper=None):
    """Validation quality over images seen, one line a run, of one task. paper: {(task, method): PSNR}."""
    colours = COLOURS | {"glow-frozen": "#D55E00", "glow-scratch": "#56B4E9"}
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    for r in rows(runs):
        draw_validation(axis, r, colours[r.method], ms=4)
        if (r.task, r.method) in (paper or {}):
            axis.axhline(paper[r.task, r.method], color=colours[r.method], ls=":", lw=1.2)
    axis.set(xlabel="images seen", ylabel="validation, dB")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    found = legend_entries([axis])
    axis.legend(found.values(), found.keys())
    return figure


@styled
def accuracy_against_compute(solvers, paper):
    """Test PSNR over training minutes, with those of the runs it starts from, one point a recorded run,
    with its validation curve; one panel a kind of machine. solvers: see compute.solvers; paper:
    {method: PSNR}, as dotted lines."""
    panels = [found for of in (True, False) if len(found := solvers[(solvers.machine == CPU) == of])]
    size = (WIDTH, 0.6 + 2.7 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, sharey=True)
    for axis, panel in zip(axes[:, 0], panels):
        for r in panel.itertuples():
            colour, history = COLOURS[r.method], r.history[r.history.val_loss.astype(bool)]
            positions = r.spent - r.minutes + history.minutes
            axis.plot(positions, history.dB, lw=0.8, alpha=0.5, color=colour)
            axis.plot(r.spent, r.psnr, "o", color=colour, ls="none", label=METHODS[r.method].short)
            where = dict(textcoords="offset points", xytext=(5, -9), fontsize=8, color=colour)
            axis.annotate(r.profile, (r.spent, r.psnr), **where)
        for method, value in paper.items():
            axis.axhline(value, color=COLOURS[method], ls=":", lw=1.2)
        machines = listed(["one core" if m == CPU else m for m in sorted(panel.machine.unique())])
        axis.set(xscale="log", ylabel="dB", xlim=(0.3 * panel.spent.min(), 2.2 * panel.spent.max()))
        axis.set_xlabel(f"minutes of {machines}, log scale")
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylim(solvers.psnr.min() - 1)
    found = legend_entries(axes[:, 0])
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=4, fontsize=9.5)
    return figure


@styled
def trial_curves(named):
    """Validation PSNR over minutes of one core, a line a trial: {label: trial}, see compute.trials."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(1, len(named))))
    for colour, (label, trial) in zip(colours, named.items()):
        axis.plot(*zip(*trial["curve"]), "o-", ms=3, lw=1.4, color=colour, label=label)
    axis.set(xlabel="minutes of one core", ylabel="validation, dB")
    axis.legend(loc="lower right", fontsize=9)
    return figure


def paper_and_ours():
    marks = (("D", "white", "paper"), ("o", INK, "ours, 95 % interval"))
    return [
        plt.Line2D([], [], color=INK, marker=m, mfc=fill, ls="none", label=text) for m, fill, text in marks
    ]


@styled
def psnr_dots(settings, paper):
    """Mean PSNR with its 95 % interval for every run of Table I beside the paper's number; one panel a task.

    settings: those compared; paper: {(task, method): PSNR}, see results.paper_table."""
    tasks = list(dict.fromkeys(task for task, _ in paper))
    ours = {(r.task, r.method): r.scores["test"] for r in rows(settings) if r.kind == "solver"}
    shown = [[m for m in COLOURS if (task, m) in paper or (task, m) in ours] for task in tasks]
    heights = [0.85 + 0.25 * len(methods) for methods in shown]
    size = (WIDTH, 0.7 + sum(heights))
    figure, axes = plt.subplots(len(tasks), figsize=size, squeeze=False, height_ratios=heights)
    figure.get_layout_engine().set(hspace=0.06)
    for axis, task, methods in zip(axes[:, 0], tasks, shown):
        for row, method in enumerate(methods):
            style = dict(color=COLOURS[method], markersize=8, linestyle="none")
            if (task, method) in paper:
                axis.plot(paper[task, method], row, "D", mfc="white", mew=1.8, **style)
            if (task, method) in ours:
                score = ours[task, method]
                axis.errorbar(score.mean, row, xerr=score.half_width, fmt="o", capsize=4, **style)
        axis.set(yticks=range(len(methods)), yticklabels=[METHODS[m].short for m in methods])
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.set_title(TASKS[task].label, loc="left")
        axis.margins(x=0.08)
    axes[-1, 0].set_xlabel("mean PSNR, dB")
    figure.legend(handles=paper_and_ours(), loc="outside upper center", ncols=2)
    return figure


@styled
def response_dots(rows):
    """The response of each kind of input to shrinkage, one marker a scale rule: rows of
    benchmarks/stability.json."""
    rows = [row for row in rows if "inputs" in row]  # not those that diverged
    names = list(rows[0]["inputs"])
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.42 * len(names)))
    for row, marker, colour in zip(rows, "sDov^P", [GREY, INK, *COLOURS.values()]):
        response = [row["inputs"][name]["response"]["0.01"] or np.nan for name in names]  # None: not finite
        axis.plot(response, range(len(names)), marker, color=colour, label=row["rule"], alpha=0.85)
    axis.set(xscale="log", xlabel="change of the image / λ", yticks=range(len(names)), yticklabels=names)
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def arithmetic_limit(rows, machine, dtype):
    """GFLOP/s that this machine was seen to reach: on some, convolutions are faster than matrix products."""
    return max(machine["matmul_gflops"][dtype], *(r["gflops"] for r in rows if r["dtype"] == dtype))


@styled
def roofline(rows, machine):
    """GFLOP/s of each convolution over its arithmetic intensity, under the limits measured on the same
    machine: rows and machine as in benchmarks/speed-*.json."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8))
    intensity = np.geomspace(2, 2000, 100)
    for dtype, colour in (("float32", COLOURS["unet"]), ("bfloat16", COLOURS["resnet"])):
        limit = arithmetic_limit(rows, machine, dtype)
        limit = np.minimum(limit, machine["bandwidth_gb_per_s"] * intensity)
        axis.plot(intensity, limit, color=colour, lw=1.2, label=f"{dtype}: limit")
        for conv, marker in (("conv1", "^"), ("conv2", "o"), ("conv3", "v")):
            points = [r for r in rows if (r["dtype"], r["conv"]) == (dtype, conv)]
            style = dict(color=colour, mfc="white", label=f"{dtype}: {conv}")
            axis.plot([r["flops_per_byte"] for r in points], [r["gflops"] for r in points], marker, **style)
    axis.set(xscale="log", yscale="log", xlabel="operations for each byte moved", ylabel="GFLOP/s")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


@styled
def blur_evidence(rows):
    """PSNR over kernel size, circular border, rows of benchmarks/blur.json: above, the loss at σ_b 8
    of an inverse as good as the paper's solvers at 5; below, the results of short trainings."""
    rows = [row for row in rows if row["boundary"] == "circular" and row["kernel_size"] <= 9]
    trained = [row for row in rows if "trained" in row]
    figure, axes = plt.subplots(2, figsize=(WIDTH, 6.2), sharex=True)
    for prox in ("resnet", "unet", "glow"):
        style = dict(color=COLOURS[prox], marker="o", label=METHODS[prox].short)
        moved = [row["transferred"][METHODS[prox].label] for row in rows]
        axes[0].plot([row["kernel_size"] for row in rows], [m["8.0"] - m["5.0"] for m in moved], **style)
        loss = moved[0]["paper"]["8.0"] - moved[0]["paper"]["5.0"]
        axes[0].axhline(loss, color=COLOURS[prox], ls=":", lw=1.4)
        sizes = [row["kernel_size"] for row in trained]
        axes[1].plot(sizes, [row["trained"][prox]["5.0"] for row in trained], **style)
        axes[1].axhline(moved[0]["paper"]["5.0"], color=COLOURS[prox], ls=":", lw=1.4)
    cg = [row["classical"]["5.0"]["conjugate_gradients"]["20"] for row in rows]
    axes[1].plot([row["kernel_size"] for row in rows], cg, color=GREY, marker="s", label="20 CG steps")
    axes[0].set(ylabel="change from σ_b 5 to 8, dB", title="a fixed inverse (dotted: the paper's solvers)")
    axes[1].set(
        ylabel="PSNR at σ_b 5, dB",
        title="short trainings (dotted: the paper's solvers)",
        xlabel="kernel size, pixels",
    )
    axes[1].set_xticks([row["kernel_size"] for row in rows])
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9.5)
    return figure


@photographs
def fold_diagram(y, x0, folds, numbers, original):
    """The folds of one image as a diagram: each row one fold, the image after its data step, the path through
    the latent space, and the image after its prox. numbers: from records.describe_folds for the image."""
    side, step, left, right = 1.3, 1.82, 0.0, WIDTH - 1.3
    bottom, centre = -len(folds) * step - 0.05, WIDTH / 2
    figure, axis = plt.subplots(figsize=(WIDTH, side + 0.45 - bottom))
    axis.set(aspect="equal")
    axis.axis("off")

    def image(tensor, x, top, above="", below=""):
        axis.imshow(pixels(tensor), extent=(x, x + side, top - side, top), interpolation="nearest")
        axis.text(x + side / 2, top + 0.04, above, ha="center", va="bottom", fontsize=10)
        axis.text(x + side / 2, top - side - 0.04, below, ha="center", va="top", fontsize=10)

    def arrow(start, end, text=""):
        axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=GREY, lw=1.3))
        axis.text((start[0] + end[0]) / 2, start[1] + 0.05, text, ha="center", va="bottom", fontsize=10)

    image(x0, left, side, "$x_0 = g(0)$")
    image(y, centre - side / 2, side, "measurement $y$")
    image(original, right, side, "original")
    arrow((left + side / 2, -0.03), (left + side / 2, -0.3))
    for k, (fold, row) in enumerate(zip(folds, numbers), start=1):
        top = -0.32 - step * (k - 1)
        told = [
            f"{row[f'psnr{key}']:.1f} dB\n{row[f'bits_per_dim{key}']:.1f} bits/dim" for key in ("_tilde", "")
        ]
        image(fold.x_tilde[0], left, top, below=told[0])
        image(fold.x[0], right, top, below=told[1])
        axis.text(centre, top - 0.1, f"fold {k}", ha="center", va="center", fontsize=11, weight="bold")
        learnt = rf"$\mu$ = {row['step_size']:.2f}, $\lambda$ = {row['shrinkage']:+z.3f}"
        axis.text(centre, top - 0.32, learnt, ha="center", va="center", fontsize=10)
        norms = rf"$\Vert \tilde{{z}} \Vert$ = {row['latent_norm_tilde']:.0f}" + "\n÷ (1 + λ)\n"
        norms += rf"$\Vert z \Vert$ = {row['latent_norm']:.0f}"
        box, middle = dict(boxstyle="round,pad=0.35", fc="#EAF5F1", ec=COLOURS["glow"]), top - 0.9
        axis.text(centre, middle, norms, ha="center", va="center", fontsize=10, bbox=box, color=INK)
        arrow((left + side + 0.03, middle), (centre - 0.58, middle), "$f_k$")
        arrow((centre + 0.58, middle), (right - 0.03, middle), "$g_k$")
    axis.set(xlim=(0, WIDTH), ylim=(bottom, side + 0.3))
    return figure
