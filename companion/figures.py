"""Plots and tables of the notebooks: every function takes data and returns a matplotlib Figure (or HTML).

Figures have a white background of their own, so that images look alike in a light and a dark page, and are
drawn small with large type, so that they can still be read on a telephone."""

import functools
import html
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import SVG, Markdown
from matplotlib.ticker import MaxNLocator
from matplotlib_inline.backend_inline import set_matplotlib_formats

from companion.records import of_seeds
from companion.settings import EDITION_WORDS, METHODS, TASKS, in_few_words, in_words
from companion.tables import (
    PAPER_TABLES,
    Link,
    anchor,
    claims,
    compare,
    listed,
    machine,
    minutes,
    outcomes,
    paper_table,
    part,
    plus_minus,
    record_of,
    seeds,
    signed,
    together,
    verdict,
)
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


# Plots are inverted in the book's dark theme, which photographs must not be: theirs have no ground of their
# own, and a grey that can be read on both.
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
def fold_curves(records):
    """PSNR, latent norm and bits per dimension through the folds of flow solvers, one column a record."""
    quantities = {"psnr": "PSNR, dB", "latent_norm": "latent norm", "bits_per_dim": "bits per dimension"}
    figure, axes = plt.subplots(3, len(records), figsize=(WIDTH, 6.4), squeeze=False, sharex="col")
    for column, record in zip(axes.T, records):
        colour, folds = COLOURS[record["method"]], record["folds"]
        positions = np.arange(1, len(folds) + 1)
        column[0].set_title(f"{TASKS[record['task']].label}\n{METHODS[record['method']].short}")
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


def mark_restarts(axis, record, history, positions, quality):
    """A cross where a training, whose validation had fallen, went back to its best weights."""
    steps = {restart["step"] for restart in record["training"].get("restarts") or ()}
    back = [point for row, *point in zip(history, positions, quality) if row["step"] in steps]
    if back:
        axis.plot(*zip(*back), "x", color=INK, zorder=3, label=SET_BACK)


def legend_entries(axes):
    """{text: handle} of these axes, each text once and the crosses last."""
    found = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    return dict(sorted(found.items(), key=lambda entry: entry[0] == SET_BACK))


@styled
def learning_curves(records, paper=None):
    """Validation quality, −10 log10 of the mean squared error, over images seen and, where all ran on one
    kind of machine, over minutes of training; one row a task, one line a method. paper: {(task, method):
    PSNR}, drawn as dotted lines in the methods' colours."""
    records = [r for r in records if r["kind"] == "solver" and len(r["training"]["history"]) > 1]
    records = [r for r in records if r["method"] in COLOURS]
    tasks = list(dict.fromkeys(r["task"] for r in records))
    num_columns = 2 if len({r["trained"]["hardware"] for r in records}) == 1 else 1
    size = (WIDTH, 0.6 + 2.6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), num_columns, figsize=size, squeeze=False, sharey="row")
    for row, task in zip(axes, tasks):
        for r in (r for r in records if r["task"] == task):
            history = [h for h in r["training"]["history"] if h["val_loss"]]
            quality = [-10 * np.log10(h["val_loss"]) for h in history]
            style = dict(ms=3, lw=1.4, color=COLOURS[r["method"]], label=METHODS[r["method"]].short)
            scales = [[h["images_seen"] / 1000 for h in history], [minutes(r, h) for h in history]]
            for axis, positions in zip(row, scales):
                axis.plot(positions, quality, "o-", **style)
                mark_restarts(axis, r, history, positions, quality)
        for (of, method), value in (paper or {}).items():
            if of == task and method in COLOURS:
                for axis in row:
                    axis.axhline(value, color=COLOURS[method], ls=":", lw=1.2)
        row[0].set(ylabel="validation, dB")
        row[0].set_title(TASKS[task].label, loc="left")
    axes[-1, 0].set_xlabel("thousand images seen")
    if num_columns == 2:
        axes[-1, 1].set_xlabel("minutes of training")
    found = legend_entries(axes[:, 0])
    style = dict(loc="outside upper center", ncols=3 if SET_BACK in found else 4, fontsize=9.5)
    figure.legend(found.values(), found.keys(), **style)
    return figure


@styled
def accuracy_against_compute(solvers, paper):
    """Test PSNR over the minutes that it took, what a solver starts from included, one point a recorded run,
    with the course of its validation; one panel a kind of machine. solvers: see compute.solvers; paper:
    {method: PSNR}, as dotted lines."""
    kinds = sorted({r["machine"] == "a CPU core" for r in solvers}, reverse=True)
    size = (WIDTH, 0.6 + 2.7 * len(kinds))
    figure, axes = plt.subplots(len(kinds), 1, figsize=size, squeeze=False, sharey=True)
    for axis, of_core in zip(axes[:, 0], kinds):
        of_kind = [r for r in solvers if (r["machine"] == "a CPU core") == of_core]
        for r in of_kind:
            colour, history = COLOURS[r["method"]], [h for h in r["training"]["history"] if h["val_loss"]]
            before = r["spent"] - minutes(r)
            positions = [before + minutes(r, h) for h in history]
            axis.plot(
                positions, [-10 * np.log10(h["val_loss"]) for h in history], lw=0.8, alpha=0.5, color=colour
            )
            style = dict(color=colour, ls="none", label=METHODS[r["method"]].short)
            axis.plot(r["spent"], r["psnr"]["mean"], "o", **style)
            where = dict(textcoords="offset points", xytext=(5, -9), fontsize=8, color=colour)
            axis.annotate(r["experiment"]["profile"], (r["spent"], r["psnr"]["mean"]), **where)
        for method, value in paper.items():
            axis.axhline(value, color=COLOURS[method], ls=":", lw=1.2)
        axis.set(xscale="log", ylabel="dB", xlim=(0.3 * of_kind[0]["spent"], 2.2 * of_kind[-1]["spent"]))
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylim(min(r["psnr"]["mean"] for r in solvers) - 1)
    for axis, of_core in zip(axes[:, 0], kinds):
        machines = listed(sorted({r["machine"] for r in solvers} - {"a CPU core"}))
        axis.set_xlabel(f"minutes of {'one core' if of_core else machines}, log scale")
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
def psnr_dots(records, paper):
    """Mean PSNR with its 95 % interval for every run of Table I beside the paper's number; one panel a task.

    records: of one experiment; paper: {(task, method): PSNR}, see tables.paper_table."""
    tasks = list(dict.fromkeys(task for task, _ in paper))
    ours = {(r["task"], r["method"]): r["psnr"] for r in records if r["kind"] == "solver"}
    rows = [[m for m in COLOURS if (task, m) in paper or (task, m) in ours] for task in tasks]
    heights = [0.85 + 0.25 * len(methods) for methods in rows]
    size = (WIDTH, 0.7 + sum(heights))
    figure, axes = plt.subplots(len(tasks), figsize=size, squeeze=False, height_ratios=heights)
    figure.get_layout_engine().set(hspace=0.06)
    for axis, task, methods in zip(axes[:, 0], tasks, rows):
        for row, method in enumerate(methods):
            style = dict(color=COLOURS[method], markersize=8, linestyle="none")
            if (task, method) in paper:
                axis.plot(paper[task, method], row, "D", mfc="white", mew=1.8, **style)
            if (task, method) in ours:
                value = ours[task, method]
                axis.errorbar(value["mean"], row, xerr=value["half_width"], fmt="o", capsize=4, **style)
        axis.set(yticks=range(len(methods)), yticklabels=[METHODS[m].short for m in methods])
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.set_title(TASKS[task].label, loc="left")
        axis.margins(x=0.08)
    axes[-1, 0].set_xlabel("mean PSNR, dB")
    figure.legend(handles=paper_and_ours(), loc="outside upper center", ncols=2)
    return figure


@styled
def response_dots(rows):
    """How strongly each kind of input answers to shrinkage, one marker a scale rule: rows of
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
    """PSNR over kernel size, circular border, rows of benchmarks/blur.json: above, what an inverse that is
    as good as the paper's solvers at σ_b 5 loses at 8; below, what short trainings reach."""
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


def html_table(rows, caption, sortable=False):
    """A list of dicts with the same keys as a table for IPython.display.HTML; alike in Lab and in the book.
    Cells may be tables.Link. sortable: by a click on a heading, with a field to filter by, in the book. Many
    columns reach into the page's margin there."""
    if not rows:
        return f"<p>{html.escape(caption)} No run is recorded yet.</p>"

    def cell(tag, value):
        text = anchor(value) if isinstance(value, Link) else html.escape(str(value))
        wrap = "nowrap" if len(str(value)) < 15 else "normal; min-width: 5.5rem"
        wrap = "normal" if tag == "th" else wrap
        return f'<{tag} style="text-align: left; white-space: {wrap}">{text}</{tag}>'

    def line(tag, values):
        return f"<tr>{''.join(cell(tag, value) for value in values)}</tr>"

    body = "".join(line("td", row.values()) for row in rows)
    classes = "table dataframe" + " sortable" * sortable + " full-width" * (len(rows[0]) > 5)
    return (
        f'<table class="{classes}"><caption><span class="caption-text">'
        f"{html.escape(caption)}</span></caption>"
        f"<thead>{line('th', rows[0])}</thead><tbody>{body}</tbody></table>"
    )


# What the pages of the experiments share.


def with_curves(records, task):
    """The records of one task whose training left a curve."""
    of_task = [r for r in records if r["kind"] == "solver" and r["task"] == task]
    return [r for r in of_task if len(r["training"]["history"]) > 1]


@styled
def validation_curves(records, paper=None):
    """Validation quality over images seen, one line a record, of one task. paper: {(task, method): PSNR}."""
    colours = COLOURS | {"glow-frozen": "#D55E00", "glow-scratch": "#56B4E9"}
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    for r in records:
        history = [h for h in r["training"]["history"] if h["val_loss"]]
        seen, quality = [h["images_seen"] for h in history], [-10 * np.log10(h["val_loss"]) for h in history]
        axis.plot(seen, quality, "o-", color=colours[r["method"]], ms=4, label=METHODS[r["method"]].short)
        mark_restarts(axis, r, history, seen, quality)
        if (r["task"], r["method"]) in (paper or {}):
            axis.axhline(paper[r["task"], r["method"]], color=colours[r["method"]], ls=":", lw=1.2)
    axis.set(xlabel="images seen", ylabel="validation, dB")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    found = legend_entries([axis])
    axis.legend(found.values(), found.keys())
    return figure


def beside_paper(task, methods, paper, kept, here, evaluation=None):
    """Rows, one a method: the paper's number, that of the recorded run (kept), which leads to its record, and
    that of the one just made."""
    recorded, made = outcomes(kept, evaluation), outcomes(here, evaluation)

    def ours(record):
        if record is None or record["kind"] == "failed":
            return "diverged" if record else "not run"
        text, each = plus_minus(part(record, evaluation)["psnr"]), seeds(record, evaluation)
        return f"{text}, mean over seeds ({each})" if each != "1" else text

    def seen(record):
        return f"{record['training']['images_seen']:,}" if record else "–"

    def row(method):
        old, new = recorded.get((task, method)), made.get((task, method))
        return {
            "Method": METHODS[method].label,
            "Paper, dB": f"{paper[task, method]:.2f}" if (task, method) in paper else "–",
            "Recorded, dB": Link(ours(old), record_of(old).href) if old else "not run",
            "Images seen": seen(old),
            "Here, dB": ours(new),
            "Images seen here": f"{seen(new)}, {minutes(new):.1f} min" if new else "–",
        }

    return [row(method) for method in methods]


def every_run(task, edition, records):
    """Rows, one a recorded run of a task, whatever its budget: what it had, and what came out."""
    here = [r for r in records if r["kind"] == "solver" and r["task"] == task]
    return [
        {
            "Method": METHODS[r["method"]].label,
            "Ours, dB": plus_minus(r["psnr"]),
            "Profile": r["experiment"]["profile"],
            "Seed": r["experiment"]["seed"],
            "Parameters a fold": f"{r['num_parameters']:,}",
            "Images seen": f"{r['training']['images_seen']:,}",
            "Minutes": f"{minutes(r):.1f}",
            "On": machine(r),
            "Record": record_of(r),
        }
        for r in sorted(here, key=lambda r: -r["psnr"]["mean"])
        if r["experiment"]["edition"] == edition
    ]


@photographs
def fold_diagram(y, x0, folds, numbers, original):
    """The folds of one image as a diagram: each row one fold, the image after its data step, the path through
    the latent space, and the image after its prox. numbers: what records.describe_folds says of the image."""
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


def likelihood_sentence(record):
    """Whether the likelihood rises through the folds of a flow solver, in words, from its record."""
    folds = record["folds"]
    if any(value is None for fold in folds for value in fold.values()):
        return "not all of its numbers are finite, so nothing can be said."
    inside = [k for k, fold in enumerate(folds, start=1) if fold["bits_per_dim"] < fold["bits_per_dim_tilde"]]
    path = [fold["bits_per_dim"] for fold in folds]
    between = all(after < before for before, after in zip(path, path[1:]))
    some = f"only in fold{'s' * (len(inside) > 1)} {listed([*map(str, inside)])}" if inside else "in no fold"
    within = "in every fold" if len(inside) == len(folds) else some
    trail = " → ".join(f"{value:.2f}" for value in path)
    steady = "rises from fold to fold" if between else "does not rise from fold to fold"
    return (
        f"the prox raises the likelihood {within}, and what leaves the folds ({trail} bits per dimension, "
        f"each by its own flow) {steady}."
    )


def fold_rows(records):
    """Rows, one a fold of each flow solver: what it learnt and did, means over the test images."""

    def shown(value, form):
        return "not finite" if value is None else format(value, form)

    return [
        {
            "Task": TASKS[r["task"]].label,
            "Prox": METHODS[r["method"]].short,
            "Fold": k,
            "μ": f"{fold['step_size']:.3f}",
            "λ": f"{fold['shrinkage']:+.3f}",
            "PSNR x̃, dB": shown(fold["psnr_tilde"], ".2f"),
            "PSNR x, dB": shown(fold["psnr"], ".2f"),
            "Worth, dB": shown(fold["worth"], ".2f") if "worth" in fold else "–",
            "‖z̃‖": shown(fold["latent_norm_tilde"], ".1f"),
            "‖z‖": shown(fold["latent_norm"], ".1f"),
            "bits/dim x̃": shown(fold["bits_per_dim_tilde"], ".2f"),
            "bits/dim x": shown(fold["bits_per_dim"], ".2f"),
        }
        for r in records
        for k, fold in enumerate(r["folds"], start=1)
    ]


def _above(difference, rival, half_width=None):
    """ "0.60 ± 0.43 dB above U-Net" """
    side = "above" if difference > 0 else "below"
    sure = "" if half_width is None else f" ± {half_width:.2f}"
    return f"{abs(difference):.2f}{sure} dB {side} {METHODS[rival].short}"


def _rivals(name, edition, task):
    """Those that one of the paper's tables compares its flow with in a task."""
    pairs, printed = PAPER_TABLES[name, edition].pairs, paper_table(name, edition)
    return [second for first, second in pairs if first == "glow" and (task, second) in printed]


SPREADS = "their spread is a method's own where it has three seeds, else pooled over the task's methods"


def in_short(name, edition, task, kept, others=()):
    """The claim of a page: by how much the paper's flow is above its rivals, by how much ours, with the
    verdicts of tables.claims, and what ± covers. others: see tables.together."""
    rivals, printed = _rivals(name, edition, task), paper_table(name, edition)
    if not rivals:
        return ""
    paper = [_above(printed[task, "glow"] - printed[task, rival], rival) for rival in rivals]
    sentences = [f"Table {name} of the paper's {EDITION_WORDS[edition]} has GLOW {listed(paper)}."]
    ours, counts, seeded = {}, {}, False
    for rival in rivals:
        found = together(kept, others, name, edition, task, "glow", rival)
        pair = compare(found, name, edition, task, "glow", rival, others)
        if pair:
            where = in_words(next(r for r in found if r["kind"] == "solver")["experiment"])
            for method, number, whose in zip(("glow", rival), pair.num_seeds, pair.spread):
                counts[method] = f"{number} of {METHODS[method].short}" + f", {whose}" * bool(whose)
            seeded |= any(pair.spread)
            text = f"{_above(pair.difference, rival, pair.half_width)} (**{verdict(pair)}**)"
            ours.setdefault(where, []).append(text)
    if not ours:
        return f"**In short.** {sentences[0]} The two were not run, so there is no answer yet."
    for where, texts in ours.items():
        sentences.append(f"In the recorded runs, trained {where}, it is {listed(texts)}.")
    spread = f" and over seeds ({'; '.join(counts.values())}; {SPREADS})"
    alone = " alone; there is one seed of each"
    sentences.append(f"± is the 95 % interval over test images{spread if seeded else alone}.")
    return f"**In short.** {' '.join(sentences)}"


def verdicts(name, edition, task, kept, others=()):
    """HTML: tables.claims of one task."""
    rows = claims(name, edition, kept, others, task)
    rows = [{key: cell for key, cell in row.items() if key not in ("Task", "Page")} for row in rows]
    caption = "What the paper concludes from its table, and what the recorded runs say."
    alone, borrowed = (any(mark in row["Ours, dB"] for row in rows) for mark in "¹²")
    caption += " ¹ One seed of each: ± is over images alone." * alone
    caption += " ² One seed of each: their spread is that of v2's runs of this kind of task." * borrowed
    return html_table(rows, caption)


def on_this_page(name, edition, task, kept, here):
    """What came out of the runs made on a page, in words, without a verdict; None where there were none."""
    known = {
        (r["settings_hash"], r["data"]["pixels_sha256"])
        for k in kept
        if k["kind"] == "solver"
        for r in of_seeds(k)
    }
    solved = [r for r in here if r["kind"] == "solver"]
    if solved and all((r["settings_hash"], r["data"]["pixels_sha256"]) in known for r in solved):
        return Markdown("The runs of this page are the recorded ones.")
    pairs = {m: compare(here, name, edition, task, "glow", m) for m in _rivals(name, edition, task)}
    pairs = {m: pair for m, pair in pairs.items() if pair}
    if not pairs:
        return None
    told = [_above(pair.difference, m, pair.half_width) for m, pair in pairs.items() if not pair.reason]
    doubts = list(dict.fromkeys(pair.reason for pair in pairs.values() if pair.reason))
    found = f"GLOW is {listed(told)}" if told else "no comparison is made"
    found += f"; not compared: {'; '.join(doubts)}" if doubts else ""
    names = solved[0]["experiment"]
    drawn = " Drawn faces test the code and decide nothing about the paper."
    drawn *= names["dataset"].startswith("synthetic")
    return Markdown(f"In the runs of this page, trained {in_few_words(names)}, {found}.{drawn}")


def by_heart(records):
    """A sentence where all of these solvers fit their training images far better than new ones; else ""."""
    kept = {METHODS[r["method"]].short: r["training"] for r in records}
    ends = {name: np.mean([row["loss"] for row in t["history"][-3:]]) for name, t in kept.items()}
    ratios = {name: t["best_val_loss"] / ends[name] for name, t in kept.items()}
    if min(ratios.values()) < 1.5:
        return ""
    told = listed([f"{ratio:.1f} times for {name}" for name, ratio in ratios.items()])
    number = records[0]["data"]["split"]["train"]
    return (
        f"The mean squared error in validation is {told} what it is at last on the {number:,} training "
        "images: the solvers come to know these by heart, and longer training would not help on new faces."
    )


def images_seen(records, task, methods):
    """A sentence: the recorded budgets."""
    seen = [
        f"{r['training']['images_seen']:,} for {METHODS[r['method']].short}"
        for r in records
        if r["kind"] == "solver" and r["task"] == task and r["method"] in methods
    ]
    told = f"training images seen, with repetition, in the recorded runs: {listed(seen)}"
    return f"The order is one at this budget ({told})." if seen else ""


def proxes_sentence(records):
    """In which folds of recorded flow solvers the prox raises the PSNR, and in which it lowers it."""
    told = []
    for r in records:
        pairs = [(fold["psnr_tilde"], fold["psnr"]) for fold in r["folds"]]
        if all(None not in pair for pair in pairs):
            gains = [f"{signed(b - a)} dB in fold {k}" for k, (a, b) in enumerate(pairs, start=1)]
            told.append(f"of {METHODS[r['method']].short} by {listed(gains)}")
    return f"In the recorded runs the prox changes the mean PSNR: that {'; that '.join(told)}." * bool(told)


def change_sentence(records, task, methods, evaluation, change):
    """What recorded solvers lose or gain out of distribution; change: "from photographs to anime faces"."""
    told = []
    for r in records:
        if r["kind"] == "solver" and r["task"] == task and r["method"] in methods and part(r, evaluation):
            moved = part(r, evaluation)["psnr"]["mean"] - r["psnr"]["mean"]
            told.append(f"{signed(moved)} dB for {METHODS[r['method']].short}")
    return f"In the recorded runs the mean PSNR changes, {change}, by {listed(told)}." if told else ""


def all_told_sentence(records):
    """Where the recorded flow stands in inpainting with a smaller hole if all folds are told of it."""
    found = {r["method"]: r["ood_measurements"]["psnr"]["mean"] for r in records if r["kind"] == "solver"}
    found = {m: found[m] for m in ("glow", "unet", "resnet") if m in found}
    if len(found) < 3:
        return ""
    place = ("first", "second", "last")[sorted(found.values(), reverse=True).index(found["glow"])]
    told = listed([f"{METHODS[m].short} {value:.2f} dB" for m, value in found.items()])
    return (
        "Here only the last fold is told of the smaller hole, as the paper words it; with all folds told the "
        f"flow is {place} ({told})."
    )


def readings_sentence(records, methods):
    """What the smaller hole does to each inpainting solver, by who knows of it, in words."""
    told = []
    for r in records:
        if r["kind"] == "solver" and r["task"] == "inpainting" and r["method"] in methods:
            literal, everywhere = (
                r[key]["psnr"]["mean"] - r["psnr"]["mean"]
                for key in ("ood_measurements_last_fold", "ood_measurements")
            )
            told.append(
                f"{METHODS[r['method']].short} by {signed(literal)} dB where the last fold alone knows of it "
                f"and by {signed(everywhere)} dB where all folds do"
            )
    return f"In the recorded runs the smaller hole changes {listed(told)}." if told else ""
