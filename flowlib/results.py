"""Result records: one JSON file a run, written by an evaluation, read by the tables. No number reaches the book otherwise."""

import csv
import json
import time
from collections import Counter
from pathlib import Path

import torch

from flowlib.checkpoints import load_checkpoint, load_tensors
from flowlib.data import dequantize, to_tensor
from flowlib.experiments import PROX_LABELS, TASKS
from flowlib.files import write_csv, write_json, write_text
from flowlib.metrics import mean_and_interval, psnr, ssim
from flowlib.provenance import provenance
from flowlib.training import batches, device, generator_for

RESULTS = Path(__file__).parents[1] / "results"  # recorded runs and the paper's own numbers, kept in the repository


def statistics(values, digits=4):
    """JSON-able mean, half width of its 95 % interval, and the values of all images."""
    mean, half_width = mean_and_interval(values)
    return dict(mean=mean, half_width=half_width, values=[round(float(v), digits) for v in values])


def _record(experiment, directory, name, **content):
    info = load_tensors(directory / "model.safetensors")[1]["info"]
    manifest = experiment.images().manifest
    record = dict(
        name=name,
        experiment=experiment.names,
        **content,
        training=info["summary"],
        trained=info["provenance"],
        evaluated=provenance(),
        data={k: manifest[k] for k in ("name", "source", "crop", "pixels_sha256")} | {"split": experiment.split_sizes},
    )
    write_json(directory / "record.json", record)


@torch.no_grad()
def record_flow(experiment, noisy=False):
    """Writes the record of a pre-trained flow: bits per dimension of the test images, its round trip, and what shrinking
    the latents by 1 + λ does to images, clean and not: their root-mean-square change."""
    directory = experiment.flow_directory(noisy)
    glow = load_checkpoint(directory / "model.safetensors").to(device())
    x = dequantize(experiment.split("test"), generator_for(experiment.seed, "test")).to(device())
    bits = torch.cat([glow.bits_per_dim(batch) for batch in batches(x, 50)])
    some = x[:50]
    noise = torch.randn(some.shape, generator=generator_for(experiment.seed, "round trip")).to(some)
    inputs = {"natural": some, "noise 0.2": some + 0.2 * noise, "constant": torch.zeros_like(some)}
    round_trip, response = {}, {}
    for name, image in inputs.items():
        latents, _ = glow(image)
        round_trip[name] = (glow.inverse(latents)[0] - image).abs().max().item()
        response[name] = {
            str(lam): (glow.inverse([z / (1 + lam) for z in latents])[0] - image).square().mean().sqrt().item()
            for lam in (0.001, 0.01, 0.1)
        }
    _record(
        experiment,
        directory,
        directory.name,
        kind="flow",
        num_parameters=sum(p.numel() for p in glow.parameters()),
        bits_per_dim=statistics(bits.tolist()),
        round_trip=round_trip,
        shrinkage_response=response,
    )


@torch.no_grad()
def record_solver(experiment, task, prox):
    """Writes the record of a trained solver on the test images: PSNR and SSIM of each image, and what the folds did."""
    directory = experiment.directory(task, prox)
    solver = load_checkpoint(directory / "model.safetensors").to(device())
    x = to_tensor(experiment.split("test"))
    operator = TASKS[task].make_operator(x.shape[-1])
    y = operator.measure(x, generator_for(experiment.seed, "test"))
    operator.to(device())
    x_hat, folds, seconds = [], [], 0.0
    for batch in batches(y.to(device()), 50):
        start = time.monotonic()
        x_hat.append(solver(batch, operator).cpu())
        seconds += time.monotonic() - start
        folds.append(solver(batch, operator, return_folds=True)[1])
    x_hat = torch.cat(x_hat)

    def over_images(k, key):
        values = [getattr(batch[k], key) for batch in folds]
        return None if values[0] is None else torch.cat(values).cpu()

    def fold_record(k):
        fold = dict(
            step_size=float(solver.step_size[k]),
            psnr_tilde=psnr(over_images(k, "x_tilde"), x).mean().item(),
            psnr=psnr(over_images(k, "x"), x).mean().item(),
        )
        if solver.proxes[k].uses_shrinkage:
            bits = -x[0].numel() * 0.6931471805599453
            fold |= dict(
                shrinkage=float(solver.shrinkage[k]),
                latent_norm_tilde=over_images(k, "latent_norm_tilde").mean().item(),
                latent_norm=over_images(k, "latent_norm").mean().item(),
                bits_per_dim_tilde=8 + over_images(k, "log_prob_tilde").mean().item() / bits,
                bits_per_dim=8 + over_images(k, "log_prob").mean().item() / bits,
            )
        return fold

    _record(
        experiment,
        directory,
        directory.name,
        kind="solver",
        task=TASKS[task].name,
        setting=TASKS[task].setting,
        prox=prox,
        num_parameters=sum(p.numel() for p in solver.proxes[0].parameters()),
        num_folds=solver.num_folds,
        psnr=statistics(psnr(x_hat, x).tolist()),
        ssim=statistics(ssim(x_hat, x).tolist()),
        psnr_measurement=statistics(psnr(y, x).tolist()),
        folds=[fold_record(k) for k in range(solver.num_folds)],
        milliseconds_per_image=1000 * seconds / len(x),
    )


def record_files(experiment):
    """The record.json files of this build's experiment: its flows', then its solvers'."""
    edition = experiment.names["edition"]
    return [
        *sorted(experiment.runs.glob("flow*/record.json")),
        *sorted(experiment.runs.glob(f"{edition}/*/record.json")),
    ]


def publish(experiment):
    """Copies all records of an experiment into results/runs/, to be kept with the code."""
    for path in record_files(experiment):
        kept = RESULTS / "runs" / path.parent.relative_to(experiment.runs.parent)
        write_json(kept.with_suffix(".json"), json.loads(path.read_text()))


def read_records(paths):
    """The records in these files, in order; ValueError naming a file that is none."""
    records = []
    for path in paths:
        try:
            record = json.loads(Path(path).read_text())
            record["kind"], record["experiment"]["edition"]  # KeyError where it is something else
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result record ({error!r}): delete it and evaluate that run again"
            ) from error
        records.append(record)
    return records


def load_solver(experiment, task, *proxes):
    """(prox, solver) of the first of these proxes whose training for this task did not diverge, in this build."""
    for prox in proxes:
        path = experiment.directory(task, prox) / "model.safetensors"
        if path.is_file():
            return prox, load_checkpoint(path).requires_grad_(False)
    raise FileNotFoundError(
        f"no {' or '.join(proxes)} solver for {task} in {experiment.runs}: train one (python -m flowlib)"
    )


def build_records(experiment):
    """Records of this build's experiment."""
    return read_records(record_files(experiment))


def recorded():
    """Records kept in results/runs/."""
    return read_records(sorted((RESULTS / "runs").rglob("*.json")))


def paper_table(table, edition):
    """{(task, setting, method): PSNR in dB} of one of the paper's tables."""
    with open(RESULTS / "paper.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["table"] == table and r["edition"] == edition]
    return {(r["task"], r["setting"], r["method"]): float(r["psnr_db"]) for r in rows}


def setting_text(setting):
    """A setting as the reader sees it: "sigma_n=0.2" -> "σₙ = 0.2"."""
    return setting.replace("sigma_n=", "σₙ = ").replace("sigma_b=", "σ_b = ").replace("W=", "W = ")


def plus_minus(value, digits=2):
    """ "12.34 ± 0.56", with spaces that do not break."""
    return f"{value['mean']:.{digits}f}\u00a0±\u00a0{value['half_width']:.{digits}f}"


def table1(records):
    """Rows of Table I: the paper's number beside ours, for one experiment's records."""
    edition = next((r["experiment"]["edition"] for r in records if r["kind"] != "flow"), "v2")
    paper = paper_table("I", edition)
    ours = {(r["task"], r["setting"], PROX_LABELS[r["prox"]]): r for r in records if r["kind"] == "solver"}
    diverged = {(r["task"], r["setting"], PROX_LABELS[r["prox"]]) for r in records if r["kind"] == "failed"}
    rows = []
    for key in [*paper, *(k for k in ours if k not in paper)]:
        task, setting, method = key
        record = ours.get(key)
        rows.append(
            {
                "Task": task,
                "Setting": setting_text(setting),
                "Method": method,
                "Paper, dB": f"{paper[key]:.2f}" if key in paper else "–",
                "Ours, dB": plus_minus(record["psnr"]) if record else "diverged" if key in diverged else "not run",
                "SSIM": f"{record['ssim']['mean']:.3f}" if record else "–",
                "Measured y, dB": f"{record['psnr_measurement']['mean']:.2f}" if record else "–",
                "Images seen": f"{record['training']['images_seen']:,}" if record else "–",
                "Training": f"{record['training']['seconds'] / 60:.1f} min" if record else "–",
            }
        )
    order = list(dict.fromkeys((row["Task"], row["Setting"]) for row in rows))
    return sorted(rows, key=lambda row: order.index((row["Task"], row["Setting"])))


def provenance_rows(records):
    """One row a run: what made it, on what, when and in what time."""
    return [
        {
            "Run": r["name"],
            "Edition": r["experiment"]["edition"],
            "Commit": r["trained"]["commit"],
            "Profile": r["experiment"]["profile"],
            "Data set": r["experiment"]["dataset"],
            "Seed": r["experiment"]["seed"],
            "Hardware": r["trained"]["hardware"],
            "Date": r["trained"]["date"][:10],
            "Training": f"{r['training']['seconds'] / 60:.1f} min",
            "Steps": f"{r['training']['steps']:,}",
            "Parameters": f"{r['num_parameters']:,}",
        }
        for r in records
    ]


def compare(records, edition, task, setting, first="glow", second="unet"):
    """How far `first` is above `second`, ours and the paper's: (mean of the paired differences in dB, half width, paper's
    difference or None where the paper has none), or None where one of the runs is missing."""
    paper = paper_table("I", edition)
    found = {r["prox"]: r for r in records if r["kind"] == "solver" and (r["task"], r["setting"]) == (task, setting)}
    keys = [(task, setting, PROX_LABELS[p]) for p in (first, second)]
    if first not in found or second not in found:
        return None
    pairs = zip(found[first]["psnr"]["values"], found[second]["psnr"]["values"])
    in_paper = all(k in paper for k in keys)
    return (*mean_and_interval([a - b for a, b in pairs]), paper[keys[0]] - paper[keys[1]] if in_paper else None)


def signed(value):
    """The text "+1.20" or "−1.20", with a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def verdict(difference, half_width, paper):
    """In words, whether a paired difference has the sign of the paper's."""
    if abs(difference) < half_width:
        return "not distinguishable"
    return "the paper's order" if difference * paper > 0 else "**the opposite order**"


def findings(records):
    """Markdown: what one experiment's records say of the paper's order of methods, with the budget they had."""
    solvers = [r for r in records if r["kind"] == "solver"]
    experiment = solvers[0]["experiment"]
    images = [r["training"]["images_seen"] for r in solvers]
    minutes = [r["training"]["seconds"] / 60 for r in solvers]
    paper = paper_table("I", experiment["edition"])
    lines = [
        f"Recorded runs of the profile **{experiment['profile']}** on **{experiment['dataset']}**, protocol of edition "
        f"{experiment['edition']}. The budget is far below the paper's: each solver saw {min(images):,} to {max(images):,} "
        f"images in {min(minutes):.0f} to {max(minutes):.0f} minutes. Mean PSNR in dB, differences over the same test "
        "images with 95 % intervals:",
        "",
    ]
    for task, setting in dict.fromkeys(key[:2] for key in paper):
        found = {r["prox"]: r for r in solvers if (r["task"], r["setting"]) == (task, setting)}
        failed = [r for r in records if r["kind"] == "failed" and (r["task"], r["setting"]) == (task, setting)]
        if not found:
            continue
        values = ", ".join(
            f"{PROX_LABELS[prox]} {r['psnr']['mean']:.2f}"
            + (
                f" (paper {paper[key]:.2f})"
                if (key := (task, setting, PROX_LABELS[prox])) in paper
                else " (ours alone)"
            )
            for prox in PROX_LABELS
            if (r := found.get(prox))
        )
        line = f"- **{task}**, {setting_text(setting)}: {values}."
        line += "".join(f" {PROX_LABELS[r['prox']]} **diverged** at step {r['training']['steps']}." for r in failed)
        for first, second in (("glow", "unet"), ("glow", "resnet"), ("unet", "resnet")):
            pair = compare(records, experiment["edition"], task, setting, first, second)
            if pair and pair[2] is not None:
                difference, half_width, in_paper = pair
                line += (
                    f" {PROX_LABELS[first]} over {PROX_LABELS[second]}: {signed(difference)} ± {half_width:.2f} "
                    f"(paper {signed(in_paper)}): {verdict(*pair)}."
                )
        lines.append(line)
    for flow in (r for r in records if r["kind"] == "flow" and "shrinkage_response" in r):
        change = {name: response["0.01"] / 0.01 for name, response in flow["shrinkage_response"].items()}
        lines.append(
            f"- The flow `{flow['name']}`: {plus_minus(flow['bits_per_dim'])} bits per dimension of clean test images. Shrinking "
            f"the latents by 1 + λ (λ = 0.01) moves clean images by {change['natural']:.1f} λ and noisy ones by "
            f"{change['noise 0.2']:.1f} λ, root mean square: the larger, the less the flow can be trusted there."
        )
    return lines


def main_run(records, edition=None):
    """The records of the one experiment that has most solvers, with its flows: profiles must not be mixed in a comparison."""

    def key(record, *names):
        return tuple(record["experiment"][name] for name in ("profile", "dataset", "seed", *names))

    solvers = [r for r in records if r["kind"] != "flow" and edition in (None, r["experiment"]["edition"])]
    most = Counter(key(r, "edition") for r in solvers).most_common(1)
    if not most:
        return []
    chosen = most[0][0]
    return [r for r in records if (key(r) == chosen[:3] if r["kind"] == "flow" else key(r, "edition") == chosen)]


def tabulate(experiment):
    """Writes all tables that the book includes to build/tables/."""
    here, kept = build_records(experiment), recorded()
    tables = experiment.build / "tables"
    main = main_run(kept)
    write_csv(tables / "table1.csv", table1(here))
    write_csv(tables / "table1_recorded.csv", table1(main))
    write_csv(tables / "provenance.csv", provenance_rows(here + kept))
    names = experiment.names
    total = sum(r["training"]["seconds"] for r in here) / 60
    write_text(
        tables / "build.md",
        f"This build used the profile **{names['profile']}** on the data set **{names['dataset']}** with the protocol of edition "
        f"**{names['edition']}** ({experiment.edition.num_folds} folds; {experiment.split_sizes['train']} training, "
        f"{experiment.split_sizes['val']} validation and {experiment.split_sizes['test']} test images), seed {names['seed']}: "
        f"{len(here)} trainings, {total:.1f} minutes in all. Recorded runs kept with the code: {len(kept)}.",
    )
    lines = findings(main) if main else ["No run on real faces is recorded yet; {doc}`build` shows what was run."]
    write_text(tables / "findings.md", "\n".join(lines))
