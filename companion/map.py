"""Recorded estimates without training (benchmarks/map.py and plugged_in.py) beside the recorded solvers."""

import json

import matplotlib.pyplot as plt
import numpy as np

from companion import gallery
from companion.figures import COLOURS, GREY, WIDTH, styled
from companion.links import Link, benchmark, record_of
from companion.paths import RESULTS
from companion.records import mean_and_interval
from companion.settings import METHODS, TASKS
from companion.words import plus_minus, signed
from flowlib import map_estimate, psnr

SHOWN = ("denoising", "inpainting", "deblurring")
NUMBERS = 3 * 64 * 64  # of an image


def recorded(folder: str = "map", needs: str = "test") -> dict[str, dict]:
    """{task: record} of the records in results/benchmarks/folder that have got as far as `needs`."""
    found = {}
    for task in SHOWN:
        path = RESULTS / "benchmarks" / folder / f"{task}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "psnr" in record.get(needs, {}):
            found[task] = record
    return found


def solvers(record: dict, records: list[dict]) -> dict[str, dict]:
    """{method: record} of the solvers of the same experiment, which got the very measurements of this one."""
    same = {name: record[name] for name in ("task", "experiment", "data")}
    found = {r["method"]: r for r in records if r["kind"] == "solver" and same.items() <= r.items()}
    return {method: found[method] for method in METHODS if method in found}


def difference(record: dict, solver: dict, part: str = "test") -> tuple[float, float, int]:
    """How far the estimate is above a solver, in dB: mean over the images that the estimate has, half
    its 95 % interval, and how many they are."""
    ours = record[part]["psnr"]["values"]
    theirs = (solver if part == "test" else solver[part])["psnr"]["values"][: len(ours)]
    away = np.array(ours, dtype=float) - np.array(theirs, dtype=float)  # None becomes NaN
    away = away[np.isfinite(away)]
    return *mean_and_interval(away), len(away)


def seconds(record: dict, part: str = "test") -> float:
    """Processor time for one image."""
    runs = record[part]["runs"]
    return sum(run["seconds"] for run in runs) / sum(run["images"] for run in runs)


def rows(records: list[dict], part: str = "test") -> list[dict]:
    """One a recorded task and solver: the estimate, the solver on the same images, their difference."""
    found = []
    for task, record in recorded().items():
        if "psnr" not in record.get(part, {}):
            continue
        for method, solver in solvers(record, records).items():
            if part != "test" and not solver.get(part):
                continue
            away, half_width, n = difference(record, solver, part)
            values = (solver if part == "test" else solver[part])["psnr"]["values"][:n]
            time = record.get("solver_seconds", {}).get(method)
            found.append(
                {
                    "Task": TASKS[task].label,
                    "Images": n,
                    "Estimate, dB": Link(plus_minus(record[part]["psnr"]), benchmark(f"map/{task}").href),
                    "Solver": METHODS[method].short,
                    "Solver, dB": Link(f"{np.mean(values):.2f}", record_of(solver).href),
                    "Estimate above it, dB": f"{signed(away)} ± {half_width:.2f}",
                    "Estimate, s an image": f"{seconds(record, part):.1f}",
                    "Solver, s an image": f"{time:.2f}" if time else "–",
                }
            )
    return found


def validation_rows(task: str) -> list[dict]:
    """One for each setting that was tried on validation images, and for each start."""
    record = recorded().get(task)
    found = []
    for row in record["validation"] if record else ():
        found.append(_tried(row, "z = 0", record["chosen"].items() <= row.items()))
    for start, row in record["starts"].items() if record else ():
        if row.get("psnr_of_start") is not None:
            start = f"{start}, itself {row['psnr_of_start']:.2f} dB"
            found.append(_tried(row | record["chosen"], start, False))
    return found


def _tried(row, start, chosen):
    return {
        "γ": f"{row['weight']:g}",
        "Rate": f"{row['lr']:g}",
        "Steps": row["num_steps"],
        "Start": start,
        "Objective": f"{row['objective']:,.1f}",
        "PSNR, dB": f"{row['psnr']:.2f}",
        "s an image": f"{row['seconds']:.1f}",
        "Chosen": "yes" if chosen else "",
    }


def stops_early(record: dict) -> bool:
    """Whether some setting with more steps than the chosen one has a lower objective and a lower PSNR."""
    same = [r for r in record["validation"] if all(r[k] == record["chosen"][k] for k in ("weight", "lr"))]
    [chosen] = [r for r in same if r["num_steps"] == record["chosen"]["num_steps"]]
    later = [r for r in same if r["num_steps"] > chosen["num_steps"]]
    return any(r["objective"] < chosen["objective"] and r["psnr"] < chosen["psnr"] for r in later)


def likelihood_rows() -> list[dict]:
    """One for each task: (7) and the flow's likelihood of the estimate and of the original, whose misfit is
    the noise's mean."""
    found = []
    for task, record in recorded().items():
        part, weight = record["test"], record["chosen"]["weight"]
        mean = {name: value["mean"] for name, value in part.items() if name != "runs"}
        noise = NUMBERS * TASKS[task].make_operator(64).sigma ** 2
        found.append(
            {
                "Task": TASKS[task].label,
                "γ": f"{weight:g}",
                "Objective": f"{mean['objective']:.0f}",
                "Objective, original": f"{noise + weight * mean['norm_squared_original']:.0f}",
                "‖y − A x‖²": f"{mean['objective'] - weight * mean['norm_squared']:.1f}",
                "‖y − A x‖², original": f"{noise:.1f}",
                "‖z‖² a number": f"{mean['norm_squared'] / NUMBERS:.2f}",
                "‖z‖² a number, original": f"{mean['norm_squared_original'] / NUMBERS:.2f}",
                "Bits/dim": f"{mean['bits_per_dim']:.2f}",
                "Bits/dim, original": f"{mean['bits_per_dim_original']:.2f}",
            }
        )
    return found


def plugged_in_rows(records: list[dict]) -> list[dict]:
    """The plugged-in flow with λ and μ chosen, then as in the paper, no flow, and no solver at all."""
    found = []
    for task, record in recorded("plugged_in", "plugged_in").items():
        here = benchmark(f"plugged_in/{task}").href
        label = TASKS[task].label

        def row(what, part, setting="–", href=here, label=label):
            quality = Link(plus_minus(part["psnr"]), href)
            return {"Task": label, "What": what, "λ, μ": setting, "PSNR, dB": quality}

        compared = solvers(record, records)
        found.append(row("the measurement as it is", record["measurement"]))
        for name, what in (
            ("without_flow", "data steps alone"),
            ("plugged_in", "plugged in, λ and μ chosen"),
        ):
            chosen = record[name]
            found.append(row(what, chosen, f"{chosen['shrinkage']:g}, {chosen['step_size']:g}"))
        for method, what in (("glow-frozen", "plugged in, as the paper has it"), ("glow", "trained")):
            if method in compared:
                r = compared[method]
                setting = f"{r['folds'][0]['shrinkage']:.2g}, trained" if method != "glow" else "trained"
                found.append(row(what, r, setting, record_of(r).href))
    return found


def plugged_in_fairly(records: list[dict]) -> dict[str, dict]:
    """{task: mean PSNR of the flow that is plugged in with λ and μ chosen ("chosen"), of data steps alone
    ("no_flow"), as the paper has it ("frozen") and of the trained flow ("trained", its "gain"); of recorded
    ones."""
    found = {}
    for task, record in recorded("plugged_in", "plugged_in").items():
        compared = solvers(record, records)
        if {"glow", "glow-frozen"} <= set(compared):
            parts = dict(chosen=record["plugged_in"], no_flow=record["without_flow"])
            parts |= dict(frozen=compared["glow-frozen"], trained=compared["glow"])
            found[task] = {name: part["psnr"]["mean"] for name, part in parts.items()}
            found[task]["gain"] = found[task]["trained"] - found[task]["chosen"]
    return found


def beside_flow(records: list[dict]) -> dict[str, dict]:
    """{task: the trained flow solver against the estimate}: difference in dB, half_width, images,
    how many times as fast it is, and the estimate's mean PSNR."""
    found = {}
    for task, record in recorded().items():
        glow, time = solvers(record, records).get("glow"), record.get("solver_seconds", {}).get("glow")
        if glow and time:
            away, half_width, images = difference(record, glow)
            faster = seconds(record) / time
            found[task] = dict(difference=-away, half_width=half_width, images=images, faster=faster)
            found[task]["mean"] = record["test"]["psnr"]["mean"]
    return found


def summary(records: list[dict]) -> dict:
    """The content of the template map: beside_flow, the tasks in which more steps lower the objective and
    lose PSNR, and where the worst start costs more than 1 dB."""
    found, bad_starts = recorded(), []
    for task, record in found.items():
        reached = {start: row["psnr"] for start, row in record["starts"].items()}
        worst = min(reached, key=reached.get)
        if (gap := reached[worst] - reached["z = 0"]) < -1:
            bad_starts.append((task, worst, gap))
    stopped = [task for task, record in found.items() if stops_early(record)]
    return dict(recorded=found, beside=beside_flow(records), stopped=stopped, bad_starts=bad_starts)


@styled
def objective_curves(curves: dict, noise: float):
    """The objective over steps, one line a start: {label: values}; noise: the misfit of noise alone."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    for (label, values), colour in zip(curves.items(), (COLOURS["glow"], COLOURS["unet"])):
        axis.plot(values, color=colour, label=label)
    axis.axhline(noise, color=GREY, ls=":")
    axis.set(xlabel="steps", ylabel="objective (7)", yscale="log")
    axis.legend()
    return figure


def on_faces(num_steps: int) -> tuple[dict, dict]:
    """Columns and captions for figures.image_grid: the two faces with noise, restored by the kept flow and by
    the kept solver."""
    flow, _ = gallery.kept_flow()
    x, (y, solved) = gallery.faces(), gallery.restored("denoising")
    operator = TASKS["denoising"].make_operator(x.shape[-1]).to(y.device)
    flow, method = flow.to(y.device), next(m for m in gallery.FLOWS if m in solved)
    columns = {"measurement": y}
    for label, start in {"from f(Aᵀy)": y, "from z = 0": None}.items():
        columns[label], _ = map_estimate(flow, operator, y, operator.sigma**2, start, num_steps)
    columns[METHODS[method].short] = solved[method]
    columns = {label: images.cpu() for label, images in columns.items()}
    below = {label: [f"{value:.1f} dB" for value in psnr(images, x)] for label, images in columns.items()}
    return columns | {"original": x}, below
