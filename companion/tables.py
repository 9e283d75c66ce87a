"""The paper's tables with our numbers beside them, and what follows from both. All numbers come from
records."""

import csv
import html
import json
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from companion.files import write_csv, write_json, write_text
from companion.paths import RESULTS
from companion.records import comparison, merged, of_seeds, recorded
from companion.runs import records_of_build
from companion.settings import METHODS, TASKS, in_words
from flowlib import Blur


class PaperTable(NamedTuple):
    """One of the paper's tables: its title; which evaluation of a record holds our numbers (None: that on
    test images); and the pairs of methods whose order the paper's text draws conclusions from."""

    title: str
    evaluation: str | None
    pairs: tuple


_PROXES = (("glow", "unet"), ("glow", "resnet"))
_DENOISERS = (("unet-denoiser", "unet"), ("resnet-denoiser", "resnet"))
_OVER_DENOISERS = (("glow", "unet-denoiser"), ("glow", "resnet-denoiser"))
PAPER_TABLES = {
    ("I", "v2"): PaperTable("Three proximal mappings", None, (*_PROXES, *_DENOISERS, *_OVER_DENOISERS)),
    ("II", "v2"): PaperTable("The adapted prior against plug-and-play", None, (("glow", "glow-frozen"),)),
    ("III", "v2"): PaperTable("Measurements out of distribution", "ood_measurements", _PROXES),
    ("IV", "v2"): PaperTable("Images out of distribution", "ood_images", _PROXES),
    ("I", "v1"): PaperTable("Three proximal mappings", None, _PROXES),
    ("II", "v1"): PaperTable("Images out of distribution", "ood_images", _PROXES),
    ("III", "v1"): PaperTable("Pre-trained against from scratch", None, (("glow", "glow-scratch"),)),
}


def paper_table(table: str, edition: str) -> dict:
    """{(task, method): PSNR in dB} of one of the paper's tables."""
    with open(RESULTS / "paper.csv", newline="", encoding="utf-8") as f:
        rows = [r for r in csv.DictReader(f) if (r["table"], r["edition"]) == (table, edition)]
    return {(r["task"], r["method"]): float(r["psnr_db"]) for r in rows}


def setting(task: str, evaluation: str | None = None) -> str:
    """What the paper calls the setting of a task, for one of the evaluations."""
    return TASKS[task].ood_setting if evaluation == "ood_measurements" else TASKS[task].setting


def repeats(task: str, evaluation: str | None) -> str:
    """A remark where a setting out of distribution is the usual one to one part in a hundred, as blurs of 3
    taps with σ_b 5 and 8 are; "" elsewhere."""
    if evaluation != "ood_measurements" or TASKS[task].operator is not Blur:
        return ""
    usual, other = (TASKS[task].make_operator(64, **c).kernel for c in ({}, TASKS[task].ood_parameters))
    return "all but repeats table I" if (other - usual).abs().max() < 0.01 * usual.max() else ""


def part(record: dict, evaluation: str | None) -> dict | None:
    """What a record holds of one evaluation: "psnr" and "ssim". Inpainting of measurements out of
    distribution as the paper words it: only the last fold knows of the other hole (book/choices.md)."""
    if evaluation == "ood_measurements" and record["task"] == "inpainting":
        evaluation = "ood_measurements_last_fold"
    return record if evaluation is None else record.get(evaluation)


def outcomes(records: list[dict], evaluation: str | None = None) -> dict:
    """{(task, method): record, seeds merged} of the solvers that have this evaluation, and of those that
    diverged."""
    return {
        (r["task"], r["method"]): r
        for r in merged(records)
        if r["kind"] == "failed" or (r["kind"] == "solver" and part(r, evaluation))
    }


def plus_minus(value: dict, digits: int = 2) -> str:
    """ "12.34 ± 0.56", with spaces that do not break."""
    if value["half_width"] is None:
        return "not finite" if value["mean"] is None else f"{value['mean']:.{digits}f}"
    lost = f" ({value['not_finite']} not finite)" if "not_finite" in value else ""
    return f"{value['mean']:.{digits}f}\u00a0±\u00a0{value['half_width']:.{digits}f}{lost}"


def with_seeds(record: dict, evaluation: str | None = None) -> str:
    """plus_minus, which is over images, of an evaluation, with the range of the seeds where there are
    several."""
    whole, *found = [r[evaluation] if evaluation else r for r in (record, *of_seeds(record))]
    means = [p["psnr"]["mean"] for p in found]
    told = f" (seeds {min(means):.2f} to {max(means):.2f})" if len(means) > 1 else ""
    return plus_minus(whole["psnr"]) + told


def minutes(record: dict, row: dict | None = None) -> float:
    """Of a training, or until a row of its history: of the processor, which others on the machine do not
    lengthen, where they were counted; on a GPU by the clock."""
    row = record["training"] if row is None else row
    counted = row.get("cpu_seconds") if machine(record) == "a CPU core" else None
    return (counted or row["seconds"]) / 60


def machine(record: dict, what: str = "trained") -> str:
    """What a run was "trained", or "evaluated", on, in short."""
    hardware = record[what]["hardware"]
    return "a CPU core" if "thread" in hardware else hardware.removeprefix("NVIDIA ").split(" 80GB")[0]


def seeds(record: dict, evaluation: str | None = None) -> str:
    """How many, and where there are several, the result of each: "2: 32.22, 32.44"."""
    found = [part(r, evaluation) for r in of_seeds(record)]
    values = [f"{p['psnr']['mean']:.2f}" if p and p.get("psnr") else "diverged" for p in found]
    return "1" if len(values) == 1 else f"{len(values)}: {', '.join(values)}"


def below_measurement(record: dict) -> int:
    """How many test images end below their measurement."""
    pairs = zip(record["psnr"]["values"], record["psnr_measurement"]["values"])
    return sum(ours is None or ours < before for ours, before in pairs)


def best_classical(task: str, records: list[dict]) -> dict | None:
    """The record of the best classical method of a task, the measurement itself apart."""
    found = [
        r
        for r in records
        if r["kind"] == "classical" and r["task"] == task and not r["name"].endswith("-measurement")
    ]
    return max(found, key=lambda r: r["psnr"]["mean"], default=None)


def too_little_training(record: dict, records: list[dict]) -> str:
    """Why no claim is made against a solver: "below its measurement", "below a classical method", or, of one
    of its seeds, "diverged", "no better since it broke down" or "set back without need"; "" where none holds.

    A flow that is only plugged in is meant to be as bad as it is, and a classical method that is above all
    of the paper's solvers too (deblurring without noise) says nothing of a training."""
    if any(r["kind"] == "failed" for r in of_seeds(record)):
        return "diverged"
    if METHODS[record["method"]].frozen:
        return ""
    for training in (r["training"] for r in of_seeds(record)):
        restarts = training.get("restarts")
        if restarts and training["best_step"] < restarts[-1]["step"]:
            return "no better since it broke down"
        if any(_without_need(training, restart) for restart in restarts or ()):
            return "set back without need"
    if record["psnr"]["mean"] is None or record["psnr"]["mean"] < record["psnr_measurement"]["mean"]:
        return "below its measurement"
    classical = best_classical(record["task"], records)
    printed = paper_table("I", record["experiment"]["edition"])
    best_printed = max(value for (task, _), value in printed.items() if task == record["task"])
    if classical and record["psnr"]["mean"] < classical["psnr"]["mean"] < best_printed:
        return "below a classical method"
    return ""


def _without_need(training, restart):
    """Whether a run went back to earlier weights although its training loss was as before: what exploded in
    validation were BatchNorm's averages (book/choices.md)."""
    losses = {row["step"]: row["loss"] for row in training.get("history", ())}
    before = [loss for step, loss in losses.items() if step < restart["step"] and loss]
    now = losses.get(restart["step"])
    return bool(before and now and now < 1.5 * before[-1])


def remark(record: dict, records: list[dict]) -> str:
    """What is to be known of a solver's training beside its result; "–" for nothing."""
    told = [too_little_training(record, records)]
    for r in of_seeds(record):
        which = f" of seed {r['experiment']['seed']}" * ("seeds" in record)
        restarts = r["training"].get("restarts") or ()
        needless = [_without_need(r["training"], restart) for restart in restarts]
        for what, unneeded in (("broke down", False), ("was set back", True)):
            found = [f"{x['step']:,}" for x, unasked in zip(restarts, needless) if unasked == unneeded]
            steps = f"step{'s' * (len(found) > 1)} {listed(found)}"
            told.append(f"training{which} {what} at {steps}, went on at half the rate" if found else "")
    return "; ".join(filter(None, told)) or "–"


def table(
    name: str, edition: str, records: list[dict], of_build: bool = False, others: Sequence[dict] = ()
) -> list[dict]:
    """Rows of one of the paper's tables: its number beside ours. Table I also has the measurement and the
    best classical method; our extension, glow-noisy, gets a row wherever the paper compares proximal
    mappings. of_build: the records are this build's, not those kept with the code; others: where to look for
    what is not among them, of other profiles."""
    paper, evaluation = paper_table(name, edition), PAPER_TABLES[name, edition].evaluation
    ours, rows = outcomes(records, evaluation), []
    for task in dict.fromkeys(key[0] for key in paper):
        compared = [method for of, method in paper if of == task]
        head = {"Task": TASKS[task].kind, "Setting": setting(task, evaluation)}
        if evaluation is None and name == "I":
            rows += [head | row for row in _without_training(task, records, of_build)]
        for method in [*compared, *(["glow-noisy"] if "unet" in compared else [])]:
            printed = {
                "Method": METHODS[method].label,
                "Paper, dB": f"{paper.get((task, method), np.nan):.2f}".replace("nan", "–"),
            }
            record = ours.get((task, method))
            source = {"Record": record_of(record, of_build) if record else "–"}
            row = head | printed | _ours(record, evaluation, records) | source
            if record is None:
                row |= _elsewhere(others, edition, evaluation, task, method)
            remarks = [row["Remark"], repeats(task, evaluation)]
            row["Remark"] = "; ".join(r for r in remarks if r not in ("", "–")) or "–"
            rows.append(row)
    return rows


def _elsewhere(others, edition, evaluation, task, method):
    """Remark and record of a run that another profile has, seeds merged."""
    found = [r for r in merged(others) if r["kind"] == "solver" and r["experiment"]["edition"] == edition]
    found = [r for r in found if (r["task"], r["method"]) == (task, method) and part(r, evaluation)]
    if not found:
        return {}
    profile, quality = found[0]["experiment"]["profile"], part(found[0], evaluation)["psnr"]
    return {"Remark": f"profile {profile}: {plus_minus(quality)} dB", "Record": record_of(found[0])}


_NOT_RUN = {
    "Ours, dB": "not run",
    "Seeds": "–",
    "Worst image": "–",
    "Below y": "–",
    "SSIM": "–",
    "Images seen": "–",
    "Remark": "–",
}


def _ours(record, evaluation, records):
    """What a row says of our run."""
    if record is None:
        return _NOT_RUN
    trained = {"Images seen": f"{record['training']['images_seen']:,}"}
    if record["kind"] == "failed":
        return _NOT_RUN | trained | {"Ours, dB": "diverged", "Remark": "diverged"}
    found = part(record, evaluation)
    finite = [v for v in found["psnr"]["values"] if v is not None]
    return (
        _NOT_RUN
        | trained
        | {
            "Ours, dB": plus_minus(found["psnr"]),
            "Seeds": seeds(record, evaluation),
            "Worst image": f"{min(finite, default=np.nan):.1f}",
            "Below y": f"{below_measurement(record)} of {len(finite)}" if evaluation is None else "–",
            "SSIM": plus_minus(found["ssim"], 3).split("\u00a0")[0],
            "Remark": remark(record, records),
        }
    )


def _without_training(task, records, of_build):
    """The rows of the measurement and of the best classical method."""
    measurement = next(
        (
            r
            for r in records
            if r["kind"] == "classical" and r["task"] == task and r["name"].endswith("-measurement")
        ),
        None,
    )
    for label, r in (("Measurement", measurement), ("Best classical", best_classical(task, records))):
        if r:
            label = label if label == "Measurement" else f"{label}: {r['method']}"
            numbers = {"Ours, dB": plus_minus(r["psnr"]), "SSIM": f"{r['ssim']['mean']:.3f}"}
            worst = {"Worst image": f"{min(r['psnr']['values']):.1f}"}
            source = {"Record": record_of(r, of_build)}
            yield {"Method": label, "Paper, dB": "–"} | _NOT_RUN | numbers | worst | source


def provenance_rows(here: list[dict], kept: list[dict]) -> list[dict]:
    """One row a run of this build, then one a recorded one: what made it, on what, when and in what time.
    Classical methods have no training."""
    return [
        {
            "Run": r["name"],
            "Edition": r["experiment"]["edition"],
            "Record": record_of(r, r in here),
            "Commit": made["commit"],
            "Profile": r["experiment"]["profile"],
            "Data set": r["experiment"]["dataset"],
            "Seed": r["experiment"]["seed"],
            "Hardware": made["hardware"],
            "Date": made["date"][:10],
            "Training": f"{minutes(r):.1f} min" if "training" in r else "–",
            "Steps": f"{r['training']['steps']:,}" if "training" in r else "–",
            "Parameters": f"{r['num_parameters']:,}" if "num_parameters" in r else "–",
        }
        for r in here + [r for r in kept if r not in here]
        for made in [r.get("trained") or r["evaluated"]]
    ]


class Comparison(NamedTuple):
    """Two methods of one task: mean of the paired differences in dB over images, half the width of its 95 %
    interval, the paper's difference (None where it has none), the number of seeds of each, why no claim is
    made ("" otherwise), and whose spread of seeds the interval has for each: "own", "pooled" over the methods
    of the task, either of them "of v2 cpu" and the like, or "" where it is about images alone; and
    the p-value of no difference."""

    difference: float
    half_width: float
    paper: float | None
    num_seeds: tuple[int, int]
    reason: str
    spread: tuple[str, str]
    p: float

    @property
    def text(self) -> str:
        """ "+0.56 ± 0.34", with a ¹ where the interval is about images alone, a ² where the spread of
        seeds is that of other runs."""
        mark = "²" if " of " in self.spread[0] else "" if any(self.spread) else "¹"
        return f"{signed(self.difference)} ± {self.half_width:.2f}{mark}"


def compare(
    records: list[dict],
    name: str,
    edition: str,
    task: str,
    first: str = "glow",
    second: str = "unet",
    others: Sequence[dict] = (),
):
    """How far method `first` is above `second` in one of the paper's tables, or None where one of the runs
    is missing. Of a method with several seeds an image's PSNR is its mean over them, and their spread widens
    the interval; others: whose spread to take, of v2's runs of the same kind of task, where no method of the
    task has several."""
    paper, evaluation = paper_table(name, edition), PAPER_TABLES[name, edition].evaluation
    ours = outcomes(records, evaluation)
    pair = [ours.get((task, method)) for method in (first, second)]
    values = [part(r, evaluation)["psnr"]["values"] for r in pair if r and r["kind"] == "solver"]
    if len(values) < 2 or None in values[0] + values[1]:
        return None
    num_seeds = tuple(len(of_seeds(r)) for r in pair)
    counts = {first: num_seeds[0], second: num_seeds[1]}
    terms, spread = spread_of_seeds([r for (of, _), r in ours.items() if of == task], evaluation, counts)
    if not terms:
        kind = [r for r in others if r["task"] and TASKS[r["task"]].kind == TASKS[task].kind]
        terms, spread = spread_of_seeds(comparison(kind, "v2"), evaluation, counts, " of v2")
    printed = {(task, first), (task, second)} <= set(paper)
    in_paper = paper[task, first] - paper[task, second] if printed else None
    told = ((METHODS[m].short, too_little_training(r, records)) for m, r in zip((first, second), pair))
    reason = next((f"{method} {why}" for method, why in told if why), "")
    difference, half_width, p = over_images_and_seeds(*values, terms)
    return Comparison(difference, half_width, in_paper, num_seeds, reason, spread, p)


def over_images_and_seeds(first, second, terms) -> tuple[float, float, float]:
    """Mean of the paired differences, half its 95 % interval and its p-value: those of Welch and
    Satterthwaite, for the variance over images and those of terms, see spread_of_seeds."""
    away = np.subtract(first, second)
    terms = [(away.var(ddof=1) / len(away), len(away) - 1), *terms]
    variance = sum(value for value, _ in terms)
    freedom = variance**2 / sum(value**2 / of for value, of in terms) if variance else 1
    mean, error, student = float(away.mean()), float(np.sqrt(variance)), scipy.stats.t(freedom)
    p = 2 * student.sf(abs(mean) / error) if error else float(mean == 0)
    return mean, float(student.ppf(0.975)) * error, float(p)


def holm(values: Sequence[float]) -> np.ndarray:
    """p-values corrected by Holm's method: below 0.05 all differ with 95 % confidence, however they depend on
    one another."""
    order = np.argsort(values)
    scaled = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def spread_of_seeds(solvers, evaluation, counts, where=""):
    """The variances over seeds, each with its degrees of freedom, of a difference of two methods, counts:
    {method: number of seeds}, and whose they are (see Comparison): a method's own where three seeds or more
    tell it, else one that is pooled over the solvers of a task. None where no solver has several."""
    groups, profile = {}, profile_of(solvers)
    for record in solvers:
        parts = [part(r, evaluation) for r in of_seeds(record) if r["kind"] == "solver"]
        means = [p["psnr"]["mean"] for p in parts if p and p["psnr"]["mean"] is not None]
        groups |= {record["method"]: means} if means else {}
    freedom = sum(len(group) - 1 for group in groups.values())
    if not freedom:
        return [], ("", "")
    pooled = sum(np.var(group) * len(group) for group in groups.values()) / freedom
    own = {method: groups[method] for method in counts if len(groups.get(method, ())) >= 3}
    terms = [(np.var(group, ddof=1) / counts[method], len(group) - 1) for method, group in own.items()]
    rest = sum(1 / number for method, number in counts.items() if method not in own)
    terms += [(pooled * rest, freedom)] if rest else []
    where = f"{where} {profile}" if where else ""
    return terms, tuple(("own" if method in own else "pooled") + where for method in counts)


def beside_classical(task, edition, records, of_build=False):
    """Rows of one task: the paper's best, our best learned solver of all profiles, and the classical methods;
    a number leads to its record."""
    paper = {method: value for (of, method), value in paper_table("I", edition).items() if of == task}
    best = max(paper, key=paper.get)
    empty = {"PSNR, dB": "not run", "SSIM": "–", "ms an image": "–", "On": "–", "Parameter": "–"}
    rows = [
        {"Method": f"Best of the paper: {METHODS[best].label}"} | empty | {"PSNR, dB": f"{paper[best]:.2f}"}
    ]

    def row(label, r):
        chosen = r.get("parameter")
        return {
            "Method": label,
            "PSNR, dB": Link(plus_minus(r["psnr"]), record_of(r, of_build).href),
            "SSIM": f"{r['ssim']['mean']:.3f}",
            "ms an image": f"{r['milliseconds_per_image']:.1f}",
            "On": machine(r, "evaluated"),
            "Parameter": f"{chosen['name']} = {chosen['value']:g}" if chosen else "–",
        }

    here = [r for r in records if r["task"] == task]
    here = sorted((r for r in here if r["kind"] in ("solver", "classical")), key=lambda r: -r["psnr"]["mean"])
    learned = next((r for r in here if r["kind"] == "solver"), None)
    label = "Our best learned"
    if learned:
        label += f", profile {learned['experiment']['profile']}: {METHODS[learned['method']].label}"
    rows.append(row(label, learned) if learned else {"Method": label} | empty)
    return rows + [row(r["method"], r) for r in here if r["kind"] == "classical"]


def costs(task, records):
    """Rows of one task: what each learned method of one experiment costs, beside what it gives."""
    return [
        {
            "Method": METHODS[r["method"]].label,
            "Ours, dB": with_seeds(r),
            "Parameters a fold": f"{r['num_parameters']:,}",
            "GFLOP an image": f"{r['gflop_per_image']:.2f}" if "gflop_per_image" in r else "–",
            "ms an image": f"{r['milliseconds_per_image']:.1f}",
            "Training": f"{minutes(r):.1f} min",
            "On": machine(r),
            "Images seen": f"{r['training']['images_seen']:,}",
        }
        for r in records
        if r["kind"] == "solver" and r["task"] == task
    ]


def listed(words: list[str]) -> str:
    """ "a, b and c" """
    return ", ".join(words[:-1]) + " and " * (len(words) > 1) + words[-1] if words else ""


def signed(value):
    """The text "+1.20" or "−1.20", with a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def power_of_ten(value: float) -> str:
    """The text "2 · 10⁻⁶"."""
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit} · 10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# Where an interval does not hold zero, its sign is told; of the paper's sign also whether the paper's
# difference lies within.
VERDICTS = ("size replicated", "same sign", "not distinguishable", "the opposite", "no claim", "not run")
MARKS = {"size replicated": "✓✓", "same sign": "✓", "the opposite": "✗", "not distinguishable": "≈"}


def verdict(pair: Comparison) -> str:
    """One of VERDICTS; "no claim" with its reason."""
    if pair.reason:
        return f"no claim: {pair.reason}"
    if abs(pair.difference) <= pair.half_width:
        return "not distinguishable"
    if pair.difference * pair.paper < 0:
        return "the opposite"
    return "size replicated" if abs(pair.difference - pair.paper) <= pair.half_width else "same sign"


def counted(rows: Sequence[dict]) -> str:
    """How many of the claims have which verdict: "2 *same sign*, 1 *no claim*"."""
    found = [row["Verdict"].split(":")[0] for row in rows]
    return ", ".join(f"{found.count(word)} *{word}*" for word in VERDICTS if word in found)


def claims(
    name: str, edition: str, records: list[dict], others: Sequence[dict] = (), only: str | None = None
) -> list[dict]:
    """Rows: every order of two methods that the paper draws conclusions from in one of its tables, run or
    not: its difference, ours, and the verdict. others: see together; only: of one task."""
    rows, paper, about = [], paper_table(name, edition), PAPER_TABLES[name, edition]
    for task in [only] if only else dict.fromkeys(key[0] for key in paper):
        for first, second in about.pairs:
            if {(task, first), (task, second)} <= set(paper):
                found = together(records, others, name, edition, task, first, second)
                pair = compare(found, name, edition, task, first, second, others)
                told = all_told(found, first, second) if about.evaluation == "ood_measurements" else None
                rows.append(
                    {
                        "Task": _task_cell(task, about.evaluation),
                        "Claim": f"{METHODS[first].short} over {METHODS[second].short}",
                        "Paper, dB": signed(paper[task, first] - paper[task, second]),
                        "Ours, dB": (pair.text if pair else "–")
                        + (f" (all folds told: {signed(told)})" if told is not None else ""),
                        "Verdict": verdict(pair) if pair else "not run",
                        "p": f"{pair.p:.3g}" if pair else "–",
                        "Profile": profile_of(found),
                        "Seeds": " and ".join(map(str, pair.num_seeds)) if pair else "–",
                        "Spread": (" and ".join(filter(None, pair.spread)) if pair else "") or "–",
                        "Page": Link("page", page_of(name, edition, task)),
                    }
                )
    return rows


def together(records, others, name, edition, task, first="glow", second="unet") -> list[dict]:
    """The records of a task in which to compare two methods: these or, where they lack one of the two, those
    of one of the others' profiles that has both, seeds merged; [] where none has."""
    groups, others = [records], merged(others)
    for profile in dict.fromkeys(r["experiment"]["profile"] for r in others):
        groups.append(
            [r for r in others if r["experiment"]["profile"] == profile or r["kind"] == "classical"]
        )
    for group in groups:
        found = [r for r in group if r["task"] == task and r["experiment"]["edition"] == edition]
        if compare(found, name, edition, task, first, second):
            return found
    return []


def profile_of(records: list[dict]) -> str:
    """Of the solvers among records of one task."""
    return next((r["experiment"]["profile"] for r in records if r["kind"] != "classical"), "–")


def all_told(records: list[dict], first: str, second: str) -> float | None:
    """Inpainting of a smaller hole in the other reading, in which all folds are told of it: by how many dB
    one method is above another (see part)."""
    means = {
        r["method"]: r["ood_measurements"]["psnr"]["mean"]
        for r in merged(records)
        if r["kind"] == "solver" and r["task"] == "inpainting"
    }
    return means[first] - means[second] if {first, second} <= set(means) else None


def _task_cell(task, evaluation):
    remark = repeats(task, evaluation)
    return f"{TASKS[task].kind}, {setting(task, evaluation)}" + f" ({remark})" * bool(remark)


def every_claim(records: list[dict]) -> list[dict]:
    """Rows: the claims of all tables of both editions, with p-values corrected for the number of those that
    are tested, which those with no claim are not."""
    compared = {edition: comparison(records, edition) for _, edition in PAPER_TABLES}
    rows = []
    for name, edition in PAPER_TABLES:
        found = claims(name, edition, compared[edition], records)
        for row in found:
            cells = [("Table", f"{edition} {name}"), *row.items()]
            after_p = 2 + list(row).index("p")
            rows.append(dict(cells[:after_p] + [("p, Holm", "–")] + cells[after_p:]))
    tested = [row for row in rows if row["Verdict"].split(":")[0] not in ("no claim", "not run")]
    for row, p in zip(tested, holm([float(row["p"]) for row in tested])):
        row["p, Holm"] = f"{p:.3f}"
    return rows


def survivors(rows: list[dict]) -> str:
    """A sentence: how many of the signs of every_claim stand after Holm's correction."""
    p = [(float(row["p"]), float(row["p, Holm"])) for row in rows if row["p, Holm"] != "–"]
    before, after = (sum(value[k] < 0.05 for value in p) for k in (0, 1))
    return (
        f"Of {len(p)} orders tested, {before} signs are told at 5 % each; {after} of them stand after Holm's "
        f"correction, which keeps the chance of even one wrong sign among all {len(p)} below 5 %, however "
        "the tests depend on one another."
    )


class Link(NamedTuple):
    """A cell of a table that leads somewhere; href: from a page of the book."""

    text: str
    href: str

    def __str__(self):
        return self.text


_PAGES = {
    ("I", "v2"): "in_distribution",
    ("II", "v2"): "plug_and_play",
    ("III", "v2"): "ood_measurements",
    ("IV", "v2"): "ood_images",
    ("I", "v1"): "in_distribution",
    ("II", "v1"): "ood_images",
    ("III", "v1"): "pretraining_ablation",
}


def page_of(name: str, edition: str, task: str) -> str:
    """The page of the experiment behind one of the paper's tables, for a task."""
    return f"../notebooks/{_PAGES[name, edition]}-{TASKS[task].kind}.html"


def record_of(record: dict, of_build: bool = False) -> Link:
    """Where the book holds the record of a run, recorded or of this build; as text, its profile and where
    the hash of its settings begins, which two profiles may share."""
    names = record["experiment"]
    place = ["this-build" if of_build else f"{names['profile']}-{names['dataset']}-s{names['seed']}"]
    place += [names["edition"]] if record["kind"] != "flow" else []
    text = (
        f"{names['profile']} {record['settings_hash'][:6] if 'settings_hash' in record else record['name']}"
    )
    return Link(text, "../records/" + "/".join([*place, f"{record['name']}.json"]))


def benchmark(name: str) -> Link:
    """Where the book holds the record of a benchmark."""
    return Link(f"{name}.json", f"../records/benchmarks/{name}.json")


def anchor(link: Link) -> str:
    """A link in HTML."""
    return f'<a href="{html.escape(link.href)}">{html.escape(link.text)}</a>'


def linked(rows: list[dict]) -> list[dict]:
    """Rows with their links in HTML, for a CSV file that a page of the book shows."""
    return [{k: anchor(v) if isinstance(v, Link) else v for k, v in row.items()} for row in rows]


def every_number(records: list[dict], others: Sequence[dict] = ()) -> list[dict]:
    """Rows: every number of the paper's tables, of both editions, beside ours. others: see table."""
    rows = []
    for (name, edition), about in PAPER_TABLES.items():
        of_edition = [r for r in records if r["experiment"]["edition"] == edition]
        ours = outcomes(of_edition, about.evaluation)
        for (task, method), value in paper_table(name, edition).items():
            record = ours.get((task, method))
            found = part(record, about.evaluation)["psnr"] if record and record["kind"] == "solver" else None
            finite = found and found["mean"] is not None
            away = found["mean"] - value if finite else None
            elsewhere = {} if record else _elsewhere(others, edition, about.evaluation, task, method)
            rows.append(
                {
                    "Table": f"{edition} {name}",
                    "Task": _task_cell(task, about.evaluation),
                    "Method": METHODS[method].short,
                    "Paper, dB": f"{value:.2f}",
                    "Ours, dB": plus_minus(found) if found else "diverged" if record else "not run",
                    "Ours − paper": signed(away) if finite else "–",
                    "Seeds": seeds(record, about.evaluation) if found else "–",
                    "Remark": remark(record, of_edition) if found else "–",
                    "Profile": record["experiment"]["profile"] if record else "–",
                    "Record": record_of(record) if record else "–",
                    "Page": Link("page", page_of(name, edition, task)),
                }
                | elsewhere
            )
    return rows


def budget(records: list[dict]) -> str:
    """One sentence on what the runs of a comparison had, those apart that train step sizes only."""
    solvers = [r for r in records if r["kind"] == "solver" and not METHODS[r["method"]].frozen]
    images = [r["training"]["images_seen"] for r in solvers]
    times = [minutes(r) for r in solvers]
    told = sorted({in_words(r["experiment"]) for r in solvers})
    return (
        f"The runs compared are those {' and '.join(told)}. Each solver saw {min(images):,} to "
        f"{max(images):,} training images, in {min(times):.0f} to {max(times):.0f} minutes."
    )


def overview(edition: str, records: list[dict], others: Sequence[dict] = ()) -> list[dict]:
    """Rows: every pair of methods that the paper's tables compare, one column a task of Table I; in brackets
    the paper's difference. others: see claims."""
    tasks = list(dict.fromkeys(key[0] for key in paper_table("I", edition)))
    rows = []
    for (name, of), about in PAPER_TABLES.items():
        for first, second in about.pairs if of == edition else ():
            cells = {}
            for task in tasks:
                found = together(records, others, name, edition, task, first, second)
                pair = compare(found, name, edition, task, first, second, others)
                profile = profile_of(found)
                cells[TASKS[task].label] = "–"
                if pair and pair.paper is not None:
                    mark = MARKS.get(verdict(pair), "?")
                    numbers = f"{pair.text} ({signed(pair.paper)})"
                    notes = [repeats(task, about.evaluation).replace("table ", "")]
                    if about.evaluation == "ood_measurements" and task == "inpainting":
                        notes += [f"last fold told; all told: {signed(all_told(found, first, second))}"]
                    of_task = (r for r in records if r["task"] == task and r["kind"] != "classical")
                    same = any(r["experiment"]["profile"] == profile for r in of_task)
                    notes += [] if same else [profile]
                    cells[TASKS[task].label] = ", ".join(filter(None, (f"{mark} {numbers}", *notes)))
            if set(cells.values()) != {"–"}:
                label = f"{METHODS[first].short} over {METHODS[second].short}"
                rows.append({"Table": name, "First over second": label} | cells)
    return rows


def learning_rates() -> list[dict]:
    """Rows: what short trainings at several learning rates reached, of benchmarks/learning_rates.py."""
    text = (RESULTS / "benchmarks/learning_rates.json").read_text(encoding="utf-8")
    rows = []
    for row in json.loads(text)["rows"]:
        curve = row.get("psnr", {})
        told = " → ".join(f"{value:.2f}" for value in curve.values()) or "diverged"
        rate = {"Method": METHODS[row["method"]].short, "Learning rate": f"{row['lr']:g}"}
        rows.append(rate | {"At steps": ", ".join(curve) or "–", "Validation, dB": told})
    return rows


def tabulate(experiment):
    """Writes all tables that the book includes to build/tables/."""
    here, kept = records_of_build(experiment), recorded()
    tables = experiment.build / "tables"
    edition, names, sizes = experiment.names["edition"], experiment.names, experiment.split_sizes
    write_csv(tables / "table1.csv", linked(table("I", edition, here, of_build=True)))
    for of in ("v2", "v1"):
        write_csv(tables / f"recorded_{of}.csv", linked(table("I", of, comparison(kept, of), others=kept)))
    compared = [r for e in ("v2", "v1") for r in comparison(kept, e)]
    write_csv(tables / "numbers.csv", every_number(compared, others=kept))
    write_csv(tables / "learning_rates.csv", learning_rates())
    write_csv(tables / "provenance.csv", linked(provenance_rows(here, kept)))
    shutil.rmtree(experiment.build / "records", ignore_errors=True)
    for r in here:  # those that are recorded lie in results/
        write_json(experiment.build / record_of(r, of_build=True).href.removeprefix("../"), r)
    times = [minutes(r) for r in here if "training" in r]
    write_text(
        tables / "build.md",
        f"This build used the profile **{names['profile']}** on the data set **{names['dataset']}** with the "
        f"protocol of edition **{edition}** ({experiment.edition.num_folds} folds; "
        f"{sizes['train']} training, {sizes['val']} validation and {sizes['test']} test images), "
        f"seed {names['seed']}: "
        f"{len(times)} trainings, {sum(times):.1f} minutes in all. "
        f"Recorded runs kept with the code: {len(kept)}.",
    )
