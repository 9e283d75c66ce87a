"""The book's tables: their rows, from results, and how they are shown. A row is a dict; its numbers become
text when it is shown or written."""

import base64
import csv
import html
import io
import json
import numbers
import shutil

import numpy as np

from companion.files import write_csv, write_json, write_text
from companion.links import Link, anchor
from companion.paths import RESULTS
from companion.results import (
    PAPER_TABLES,
    Comparison,
    Results,
    Run,
    Score,
    evaluation_of,
    load,
    page_of,
    paper_table,
    repeats,
    rows,
    tasks_of,
)
from companion.runs import records_of_build
from companion.settings import METHODS, TASKS
from companion.words import lead, plus_minus, say, signed

# How numbers are written in columns whose numbers are not in dB.
FORMS = {"SSIM": ".3f", "Worst image": ".1f", "ms an image": ".1f", "Minutes": ".1f", "p": ".3g"}
FORMS |= {"p, Holm": ".3f", "‖z̃‖": ".1f", "‖z‖": ".1f", "μ": ".3f", "λ": "+.3f", "Rate": "g"}
FORMS |= {"Solver, min": ".0f", "With pre-training, min": ".0f", "Learning rate": "g"}
REPEATS = "all but repeats table I"


def text(value, column: str = "") -> str:
    """A cell; "–" for nothing."""
    if isinstance(value, Score):
        return plus_minus(value)
    if value is None or value == "" or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, numbers.Real):
        return format(value, "," if isinstance(value, numbers.Integral) else FORMS.get(column, ".2f"))
    return str(value)


def html_table(table: list[dict], caption: str, sortable: bool = False) -> str:
    """Rows with the same keys as a table for IPython.display.HTML; alike in Lab and in the book. sortable: by
    a click on a heading, with a field to filter by, in the book. Many columns reach into the page's margin
    there."""
    if not table:
        return f"<p>{html.escape(caption)} No run is recorded yet.</p>"

    def cell(tag, value, column=""):
        shown = anchor(value) if isinstance(value, Link) else html.escape(text(value, column))
        wrap = "nowrap" if tag == "td" and len(text(value, column)) < 15 else "normal"
        wrap += "; min-width: 5.5rem" * (tag == "td" and wrap == "normal")
        return f'<{tag} style="text-align: left; white-space: {wrap}">{shown}</{tag}>'

    head = "".join(cell("th", column) for column in table[0])
    body = "".join(f"<tr>{''.join(cell('td', v, column) for column, v in row.items())}</tr>" for row in table)
    classes = "table dataframe" + " sortable" * sortable + " full-width" * (len(table[0]) > 5)
    return (
        f'<table class="{classes}"><caption><span class="caption-text">{html.escape(caption)}</span>'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def as_text(table: list[dict], links: bool = False) -> list[dict]:
    """Rows for a CSV file; links: in HTML, for a file that a page of the book shows."""

    def cell(value, column):
        return anchor(value) if links and isinstance(value, Link) else text(value, column)

    return [{column: cell(value, column) for column, value in row.items()} for row in table]


def csv_link(table: list[dict], name: str) -> str:
    """HTML: a link by which the reader saves these rows as the file `name`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(as_text(table))
    encoded = base64.b64encode(file.getvalue().encode()).decode()
    address = f"data:text/csv;charset=utf-8;base64,{encoded}"
    return f'<p><a download="{name}" href="{address}">These rows as a CSV file</a></p>'


# The paper's numbers beside ours.


def setting(task: str, evaluation: str = "test") -> str:
    """The paper's words for the setting of a task in one of the evaluations."""
    return TASKS[task].ood_setting if evaluation.startswith("ood_measurements") else TASKS[task].setting


def _task_cell(task, evaluation):
    return f"{TASKS[task].kind}, {setting(task, evaluation)}" + f" ({REPEATS})" * repeats(task, evaluation)


def seeds(run: Run, evaluation: str = "test") -> str:
    """How many, and where there are several, the result of each: "2: 32.22, 32.44"."""
    found = [r.scores.get(evaluation) for r in run.seeds]
    values = [f"{score.mean:.2f}" if score else "diverged" for score in found]
    return "1" if len(values) == 1 else f"{len(values)}: {', '.join(values)}"


def with_seeds(run: Run, evaluation: str = "test") -> str:
    """The mean with its interval over images, and the range of the seeds where there are several."""
    means = [r.scores[evaluation].mean for r in run.seeds if evaluation in r.scores]
    told = f" (seeds {min(means):.2f} to {max(means):.2f})" if len(means) > 1 else ""
    return plus_minus(run.scores[evaluation]) + told


def remark(results: Results, run: Run) -> str:
    """A remark on a solver's training, to stand beside its result; "" for none."""
    return say("remark", doubt=results.doubt(run), run=run)


OURS = ("Seeds", "Worst image", "Below y", "SSIM", "Images seen", "Remark")


def _ours(results, run, evaluation):
    """The cells of a row for a run, or for a missing one."""
    cells = {"Ours, dB": "not run"} | dict.fromkeys(OURS)
    if run is None:
        return cells
    cells |= {"Images seen": run.images_seen, "Ours, dB": "diverged", "Remark": "diverged"}
    if run.kind == "failed":
        return cells
    score = run.scores[evaluation]
    cells |= {"Ours, dB": score, "Worst image": score.worst, "SSIM": score.ssim, "Remark": None}
    if run.kind == "solver":
        cells |= {"Seeds": seeds(run, evaluation), "Remark": remark(results, run)}
        if evaluation == "test":
            ours, before = (results.values(run, name) for name in ("test", "measurement"))
            cells["Below y"] = f"{(~(ours >= before)).sum()} of {score.finite}"
    return cells


def _beside(results, name, edition, task, method):
    """One of the paper's numbers beside ours. A run that the compared profile lacks is looked for in other
    profiles."""
    printed, evaluation = paper_table(name, edition).get((task, method)), evaluation_of(name, edition, task)
    run, usual = results.find(edition, task, method, evaluation)
    cells = {"Paper, dB": printed} | _ours(results, run if usual else None, evaluation)
    if run and not usual:
        cells["Remark"] = f"profile {run.profile}: {plus_minus(run.scores[evaluation])} dB"
    ours = cells["Ours, dB"]
    told = printed is not None and isinstance(ours, Score) and ours.finite
    cells["Ours − paper"] = signed(ours.mean - printed) if told else None
    return cells | {"Profile": run.profile if usual else None, "Record": run and run.record}


def table(results: Results, name: str, edition: str) -> list[dict]:
    """Rows of one of the paper's tables: its number beside ours. Table I also has the measurement and the
    best classical method; our extension, glow-noisy, gets a row wherever the paper compares proximal
    mappings."""
    paper, found = paper_table(name, edition), []
    for task in tasks_of(name, edition):
        evaluation = evaluation_of(name, edition, task)
        head = {"Task": TASKS[task].kind, "Setting": setting(task, evaluation)}
        if name == "I":
            measurement = [r for r in results.classical(edition, task) if r.name.endswith("-measurement")]
            best = results.best_classical(edition, task)
            shown = [("Measurement", r) for r in measurement]
            shown += [(f"Best classical: {best.method}", best)] if best else []
            for label, r in shown:
                cells = {"Method": label, "Paper, dB": None} | _ours(results, r, "test")
                found.append(head | cells | {"Record": r.record})
        compared = [method for of, method in paper if of == task]
        for method in [*compared, *(["glow-noisy"] if "unet" in compared else [])]:
            cells = _beside(results, name, edition, task, method)
            row = head | {"Method": METHODS[method].label}
            row |= {column: cells[column] for column in ("Paper, dB", "Ours, dB", *OURS, "Record")}
            row["Remark"] = "; ".join(filter(None, [row["Remark"], REPEATS * repeats(task, evaluation)]))
            found.append(row)
    return found


def every_number(results: Results) -> list[dict]:
    """Rows: every number of the paper's tables, of both editions, beside ours."""
    columns = ("Paper, dB", "Ours, dB", "Ours − paper", "Seeds", "Remark", "Profile", "Record")
    found = []
    for edition, name in PAPER_TABLES:
        for task, method in paper_table(name, edition):
            cells = _beside(results, name, edition, task, method)
            about = _task_cell(task, evaluation_of(name, edition, task))
            row = {"Table": f"{edition} {name}", "Task": about, "Method": METHODS[method].short}
            page = Link("page", f"{page_of(name, edition, task)}.html")
            found.append(row | {column: cells[column] for column in columns} | {"Page": page})
    return found


# Claims.


def claim_rows(claims: list[Comparison], *without: str) -> list[dict]:
    """One a claim: the paper's difference, ours, and the verdict; without these columns."""
    found = []
    for c in claims:
        told = f" (all folds told: {signed(c.all_told)})" if c.all_told is not None else ""
        row = {
            "Table": f"{c.edition} {c.table}",
            "Task": _task_cell(c.task, c.evaluation),
            "Claim": c.words,
            "Paper, dB": signed(c.paper),
            "Ours, dB": lead(c) + told if c.run else None,
            "Verdict": c.outcome,
            "p": c.p,
            "p, Holm": c.p_holm,
            "Profile": c.profile,
            "Seeds": " and ".join(map(str, c.num_seeds)),
            "Spread": " and ".join(filter(None, c.spread)),
            "Page": Link("page", f"{c.page}.html"),
        }
        found.append({column: value for column, value in row.items() if column not in without})
    return found


def overview(results: Results, edition: str) -> list[dict]:
    """Rows: every pair of methods that the paper's tables compare, one column a task of Table I; in brackets
    the paper's difference."""
    found = {}
    for c in results.claims:
        if c.edition == edition:
            row = found.setdefault((c.table, c.words), dict.fromkeys(tasks_of("I", edition)))
            row[c.task] = _at_a_glance(c) if c.run else None
    shown = {key: cells for key, cells in found.items() if any(cells.values())}
    return [
        {"Table": name, "First over second": claim} | {TASKS[task].label: c for task, c in cells.items()}
        for (name, claim), cells in shown.items()
    ]


def _at_a_glance(c):
    repeated = "all but repeats I" * c.repeated
    told = f"last fold told; all told: {signed(c.all_told)}" if c.all_told is not None else ""
    cells = [f"{c.verdict.mark} {lead(c)} ({signed(c.paper)})", repeated, told, c.profile * c.elsewhere]
    return ", ".join(filter(None, cells))


def verdicts(results: Results, table: str, edition: str, task: str) -> str:
    """HTML: the claims of one table and task."""
    claims = results.claims_in(table, edition, task)
    marks = {c.mark for c in claims if c.run}
    without = ("Table", "Task", "p, Holm", "Page")
    return html_table(claim_rows(claims, *without), say("verdicts", marks=marks))


# What runs had and cost.


def beside_paper(task, methods, paper, recorded, here, evaluation="test") -> list[dict]:
    """Rows, one a method: the paper's number, the recorded run's, which links to its record, and that of the
    run just made."""

    def ours(run):
        if run is None or run.kind == "failed":
            return "diverged" if run else "not run"
        each, mean = seeds(run, evaluation), plus_minus(run.scores[evaluation])
        return f"{mean}, mean over seeds ({each})" if each != "1" else mean

    def outcome(settings, method):
        found = (r for r in rows(settings) if (r.task, r.method) == (task, method))
        return next((r for r in found if evaluation in r.scores or r.kind == "failed"), None)

    def row(method):
        old, new = outcome(recorded, method), outcome(here, method)
        return {
            "Method": METHODS[method].label,
            "Paper, dB": paper.get((task, method)),
            "Recorded, dB": Link(ours(old), old.record.href) if old else "not run",
            "Images seen": old and old.images_seen,
            "Here, dB": ours(new),
            "Images seen here": f"{new.images_seen:,}, {new.minutes:.1f} min" if new else None,
        }

    return [row(method) for method in methods]


def every_run(results: Results, edition: str, task: str) -> list[dict]:
    """Rows, one a recorded run of a task, of any budget: its budget and its result."""
    found = results.runs.query("kind == 'solver' and task == @task and edition == @edition")
    return [
        {
            "Method": METHODS[r.method].label,
            "Ours, dB": r.scores["test"],
            "Profile": r.profile,
            "Seed": r.seed,
            "Parameters a fold": r.parameters,
            "Images seen": r.images_seen,
            "Minutes": r.minutes,
            "On": r.machine,
            "Record": r.record,
        }
        for r in sorted(rows(found), key=lambda r: -r.scores["test"].mean)
    ]


def costs(results: Results, edition: str, task: str) -> list[dict]:
    """Rows of one task: the cost of each compared learned method, beside its result."""
    return [
        {
            "Method": METHODS[r.method].label,
            "Ours, dB": with_seeds(r),
            "Parameters a fold": r.parameters,
            "GFLOP an image": r.gflop,
            "Training": f"{r.minutes:.1f} min",
            "On": r.machine,
            "Images seen": r.images_seen,
        }
        for r in rows(results.compared(edition, task))
        if r.kind == "solver"
    ]


def beside_classical(results: Results, edition: str, task: str) -> list[dict]:
    """Rows of one task: the paper's best, our best learned solver of all profiles, and the classical methods;
    a number links to its record."""
    paper = {method: value for (of, method), value in paper_table("I", edition).items() if of == task}
    best, learned = max(paper, key=paper.get), results.best_learned(edition, task)

    def row(label, r=None, value="not run"):
        chosen = r and r.parameter
        return {
            "Method": label,
            "PSNR, dB": Link(plus_minus(r.scores["test"]), r.record.href) if r else value,
            "SSIM": r and r.scores["test"].ssim,
            "ms an image": r and r.milliseconds,
            "On": r and r.evaluated_on,
            "Parameter": chosen and f"{chosen['name']} = {chosen['value']:g}",
        }

    label = "Our best learned"
    label += f", profile {learned.profile}: {METHODS[learned.method].label}" if learned else ""
    first = [row(f"Best of the paper: {METHODS[best].label}", value=paper[best]), row(label, learned)]
    return first + [row(r.method, r) for r in results.classical(edition, task)]


def fold_rows(runs: list[Run]) -> list[dict]:
    """Rows, one a fold of each flow solver: its scalars and effects, means over the test images."""
    found = []
    for r in runs:
        for k, fold in enumerate(r.folds, start=1):
            shown = {key: "not finite" if value is None else value for key, value in fold.items()}
            found.append(
                {
                    "Task": TASKS[r.task].label,
                    "Prox": METHODS[r.method].short,
                    "Fold": k,
                    "μ": shown["step_size"],
                    "λ": shown["shrinkage"],
                    "PSNR x̃, dB": shown["psnr_tilde"],
                    "PSNR x, dB": shown["psnr"],
                    "Worth, dB": shown.get("worth"),
                    "‖z̃‖": shown["latent_norm_tilde"],
                    "‖z‖": shown["latent_norm"],
                    "bits/dim x̃": shown["bits_per_dim_tilde"],
                    "bits/dim x": shown["bits_per_dim"],
                }
            )
    return found


def provenance_rows(here: Results, recorded: Results) -> list[dict]:
    """One row a run of this build, then one a recorded one: its code, machine, date and time. Classical
    methods have no training; their records may be recorded ones."""
    taken_over = [(r.name, r.made) for r in rows(here.runs) if r.kind == "classical"]
    found = rows(here.runs) + [r for r in rows(recorded.runs) if (r.name, r.made) not in taken_over]
    return [
        {
            "Run": r.name,
            "Edition": r.edition,
            "Record": r.record,
            "Commit": r.made["commit"],
            "Profile": r.profile,
            "Data set": r.dataset,
            "Seed": r.seed,
            "Hardware": r.made["hardware"],
            "Date": r.made["date"][:10],
            "Training": r.minutes and f"{r.minutes:.1f} min",
            "Steps": r.steps,
            "Parameters": r.parameters,
        }
        for r in found
    ]


def learning_rates() -> list[dict]:
    """Rows: results of short trainings at several learning rates, from benchmarks/learning_rates.py."""
    content = json.loads((RESULTS / "benchmarks/learning_rates.json").read_text(encoding="utf-8"))
    return [
        {
            "Method": METHODS[row["method"]].short,
            "Learning rate": float(row["lr"]),
            "At steps": ", ".join(row.get("psnr", {})),
            "Validation, dB": " → ".join(f"{v:.2f}" for v in row.get("psnr", {}).values()) or "diverged",
        }
        for row in content["rows"]
    ]


def tabulate(experiment):
    """Writes all tables that the book includes to build/tables/."""
    made = records_of_build(experiment)
    here, recorded = load(made, of_build=True), load()
    folder = experiment.build / "tables"

    def write(name, found, links=True):
        write_csv(folder / f"{name}.csv", as_text(found, links))

    write("table1", table(here, "I", experiment.names["edition"]))
    for edition in ("v2", "v1"):
        write(f"recorded_{edition}", table(recorded, "I", edition))
    write("numbers", every_number(recorded), links=False)
    write("learning_rates", learning_rates())
    write("provenance", provenance_rows(here, recorded))
    shutil.rmtree(experiment.build / "records", ignore_errors=True)
    for record, run in zip(made, rows(here.runs)):  # those that are recorded lie in results/
        write_json(experiment.build / run.record.href.removeprefix("../"), record)
    times = [r.minutes for r in rows(here.runs) if r.minutes is not None]
    write_text(folder / "build.md", say("build", experiment=experiment, times=times, recorded=recorded))
