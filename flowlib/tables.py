"""The paper's tables with our numbers beside them, and what follows from both. All numbers come from records."""

import csv

from flowlib.experiments import METHODS, TASKS
from flowlib.files import write_csv, write_text
from flowlib.metrics import mean_and_interval
from flowlib.results import RESULTS, build_records, main_run, recorded

# Of the paper's tables, (name, edition): its title; which evaluation of a record holds our numbers (None: that on test images);
# and the pairs of methods whose order the paper's text draws conclusions from.
_PROXES = (("glow", "unet"), ("glow", "resnet"))
_DENOISERS = (("unet-denoiser", "unet"), ("resnet-denoiser", "resnet"))
PAPER_TABLES = {
    ("I", "v2"): ("Three proximal mappings", None, (*_PROXES, *_DENOISERS)),
    ("II", "v2"): ("The adapted prior against plug-and-play", None, (("glow", "glow-frozen"),)),
    ("III", "v2"): ("Measurements out of distribution", "shifted", _PROXES),
    ("IV", "v2"): ("Images out of distribution", "foreign", _PROXES),
    ("I", "v1"): ("Three proximal mappings", None, _PROXES),
    ("II", "v1"): ("Images out of distribution", "foreign", _PROXES),
    ("III", "v1"): ("Pre-trained against from scratch", None, (("glow", "glow-scratch"),)),
}


def paper_table(table, edition):
    """{(task, setting, method): PSNR in dB} of one of the paper's tables."""
    with open(RESULTS / "paper.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["table"] == table and r["edition"] == edition]
    return {(r["task"], r["setting"], r["method"]): float(r["psnr_db"]) for r in rows}


def outcomes(records, evaluation=None):
    """{(task, setting, method): what holds "psnr" and "ssim"} of these records; those that diverged have "diverged"."""
    found = {}
    for r in records:
        # Inpainting out of distribution as the paper words it: only the last fold knows of the other hole (book/choices.md).
        literal = evaluation == "shifted" and r.get("task") == "inpainting"
        part = r if evaluation is None else r.get("shifted_last_fold" if literal else evaluation)
        if r["kind"] == "failed":
            setting = (
                TASKS[r["name"].removesuffix(f"-{r['prox']}")].shifted_setting
                if evaluation == "shifted"
                else r["setting"]
            )
            found[r["task"], setting, METHODS[r["prox"]].label] = {"diverged": r["training"]["steps"], "record": r}
        elif r["kind"] == "solver" and part:
            found[r["task"], part["setting"], METHODS[r["prox"]].label] = part | {"record": r}
    return found


def setting_text(setting):
    """A setting as the reader sees it: "sigma_n=0.2" -> "σₙ = 0.2"."""
    return setting.replace("sigma_n=", "σₙ = ").replace("sigma_b=", "σ_b = ").replace("W=", "W = ")


def plus_minus(value, digits=2):
    """ "12.34 ± 0.56", with spaces that do not break."""
    return f"{value['mean']:.{digits}f}\u00a0±\u00a0{value['half_width']:.{digits}f}"


def table(name, edition, records):
    """Rows of one of the paper's tables: its number beside ours, from one experiment's records. Our extension, flow-noisy,
    gets a row wherever the paper compares proximal mappings."""
    paper, ours = paper_table(name, edition), outcomes(records, PAPER_TABLES[name, edition][1])
    extra = METHODS["glow-noisy"].label
    order = list(dict.fromkeys(key[:2] for key in paper))
    methods = {setting: [key[2] for key in paper if key[:2] == setting] for setting in order}
    rows = []
    for task, setting in order:
        compared = methods[task, setting]
        for method in [*compared, *([extra] if METHODS["unet"].label in compared else [])]:
            key = (task, setting, method)
            result = ours.get(key, {})
            training = result["record"]["training"] if result else {}
            has = "psnr" in result
            rows.append(
                {
                    "Task": task,
                    "Setting": setting_text(setting),
                    "Method": method,
                    "Paper, dB": f"{paper[key]:.2f}" if key in paper else "–",
                    "Ours, dB": plus_minus(result["psnr"]) if has else "diverged" if result else "not run",
                    "SSIM": f"{result['ssim']['mean']:.3f}" if has else "–",
                    "Images seen": f"{training['images_seen']:,}" if training else "–",
                    "Training": f"{training['seconds'] / 60:.1f} min" if training else "–",
                }
            )
    return rows


def provenance_rows(records):
    """One row a run: what made it, on what, when and in what time. Classical methods have no training."""
    return [
        {
            "Run": r["name"],
            "Edition": r["experiment"]["edition"],
            "Commit": made["commit"],
            "Profile": r["experiment"]["profile"],
            "Data set": r["experiment"]["dataset"],
            "Seed": r["experiment"]["seed"],
            "Hardware": made["hardware"],
            "Date": made["date"][:10],
            "Training": f"{r['training']['seconds'] / 60:.1f} min" if "training" in r else "–",
            "Steps": f"{r['training']['steps']:,}" if "training" in r else "–",
            "Parameters": f"{r['num_parameters']:,}" if "num_parameters" in r else "–",
        }
        for r in records
        for made in [r.get("trained") or r["evaluated"]]
    ]


def compare(records, name, edition, task, setting, first="glow", second="unet"):
    """How far method `first` is above `second` in one of the paper's tables, ours and the paper's: (mean of the paired
    differences in dB, half width, the paper's difference or None), or None where one of the runs is missing."""
    paper, ours = paper_table(name, edition), outcomes(records, PAPER_TABLES[name, edition][1])
    keys = [(task, setting, METHODS[method].label) for method in (first, second)]
    if not all("psnr" in ours.get(key, {}) for key in keys):
        return None
    a, b = (ours[key]["psnr"]["values"] for key in keys)
    in_paper = paper[keys[0]] - paper[keys[1]] if all(key in paper for key in keys) else None
    return (*mean_and_interval([p - q for p, q in zip(a, b)]), in_paper)


def beside_classical(task, setting, edition, records):
    """Rows of one task: the paper's best, our best learned solver and the classical methods, from one experiment's records."""
    paper = {key[2]: value for key, value in paper_table("I", edition).items() if key[:2] == (task, setting)}
    best = max(paper, key=paper.get)
    empty = {"PSNR, dB": "not run", "SSIM": "–", "ms an image": "–", "Parameter": "–"}
    rows = [{"Method": f"Best of the paper: {best}"} | empty | {"PSNR, dB": f"{paper[best]:.2f}"}]

    def row(label, r):
        chosen = r.get("parameter")
        return {
            "Method": label,
            "PSNR, dB": plus_minus(r["psnr"]),
            "SSIM": f"{r['ssim']['mean']:.3f}",
            "ms an image": f"{r['milliseconds_per_image']:.1f}",
            "Parameter": f"{chosen['name']} = {chosen['value']:g}" if chosen else "–",
        }

    here = [r for r in records if (r.get("task"), r.get("setting")) == (task, setting)]
    here = sorted((r for r in here if r["kind"] in ("solver", "classical")), key=lambda r: -r["psnr"]["mean"])
    learned = next((r for r in here if r["kind"] == "solver"), None)
    label = "Our best learned"
    rows.append(row(f"{label}: {METHODS[learned['prox']].label}", learned) if learned else {"Method": label} | empty)
    return rows + [row(r["method"], r) for r in here if r["kind"] == "classical"]


def costs(task, setting, records):
    """Rows of one task: what each learned method of one experiment costs, beside what it gives."""
    return [
        {
            "Method": METHODS[r["prox"]].label,
            "Parameters a fold": f"{r['num_parameters']:,}",
            "GFLOP an image": f"{r['gflop_per_image']:.2f}" if "gflop_per_image" in r else "–",
            "ms an image": f"{r['milliseconds_per_image']:.1f}",
            "Training": f"{r['training']['seconds'] / 60:.1f} min",
            "Images seen": f"{r['training']['images_seen']:,}",
            "Ours, dB": plus_minus(r["psnr"]),
        }
        for r in records
        if r["kind"] == "solver" and (r["task"], r["setting"]) == (task, setting)
    ]


def signed(value):
    """The text "+1.20" or "−1.20", with a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def verdict(difference, half_width, paper):
    """In words, whether a paired difference has the sign of the paper's."""
    if abs(difference) < half_width:
        return "not distinguishable"
    return "replicated" if difference * paper > 0 else "the opposite"


def claims(name, edition, records):
    """Rows: every order of methods that one of the paper's tables holds, the paper's difference, ours, and the verdict."""
    rows = []
    for task, setting in dict.fromkeys(key[:2] for key in paper_table(name, edition)):
        for first, second in PAPER_TABLES[name, edition][2]:
            pair = compare(records, name, edition, task, setting, first, second)
            if pair and pair[2] is not None:
                rows.append(
                    {
                        "Task": task,
                        "Setting": setting_text(setting),
                        "Claim": f"{METHODS[first].label} over {METHODS[second].label}",
                        "Paper, dB": signed(pair[2]),
                        "Ours, dB": f"{signed(pair[0])} ± {pair[1]:.2f}",
                        "Verdict": verdict(*pair),
                    }
                )
    return rows


def budget(records):
    """One sentence on what the runs of one experiment had."""
    solvers = [r for r in records if r["kind"] == "solver"]
    names = solvers[0]["experiment"]
    images = [r["training"]["images_seen"] for r in solvers]
    minutes = [r["training"]["seconds"] / 60 for r in solvers]
    return (
        f"Profile **{names['profile']}** on **{names['dataset']}**, protocol of edition {names['edition']}: each solver saw "
        f"{min(images):,} to {max(images):,} training images, in {min(minutes):.0f} to {max(minutes):.0f} minutes."
    )


MARKS = {"replicated": "✓", "the opposite": "✗", "not distinguishable": "≈"}


def overview(edition, records):
    """Lines of a Markdown table: every pair of methods that the paper's tables compare, one column a setting of Table I.
    All tables have the same order of settings, and other values only out of distribution."""
    heads = [
        f"{task}, {setting_text(setting)}" for task, setting in dict.fromkeys(k[:2] for k in paper_table("I", edition))
    ]
    lines = ["| Table | First over second | " + " | ".join(heads) + " |", "| --- " * (2 + len(heads)) + "|"]
    for name, _ in (key for key in PAPER_TABLES if key[1] == edition):
        rows = claims(name, edition, records)
        settings = dict.fromkeys((task, setting_text(value)) for task, value, _ in paper_table(name, edition))
        for claim in dict.fromkeys(row["Claim"] for row in rows):
            found = {(row["Task"], row["Setting"]): row for row in rows if row["Claim"] == claim}
            cells = [
                f"{MARKS[row['Verdict']]} {row['Ours, dB']} ({row['Paper, dB']})" if row else "–"
                for row in map(found.get, settings)
            ]
            lines.append(f"| {name} | {claim.replace(' prox', '')} | {' | '.join(cells)} |")
    return lines


def findings(records):
    """Markdown for the front page: for each edition with recorded solvers its budget and what became of the claims of the paper's
    tables; then what the flows are like."""
    lines = [
        "By how many decibels one method is above another, ours and, in brackets, the paper's. "
        "✓: the paper's order, ✗: the opposite, ≈: not distinguishable, –: not run or not in the paper."
    ]
    for edition in sorted({r["experiment"]["edition"] for r in records if r["kind"] == "solver"}, reverse=True):
        run = main_run(records, edition)
        lines += ["", budget(run) + " This is far below the paper's budget.", "", *overview(edition, run), ""]
        for r in run:
            if r["kind"] == "failed":
                lines += [f"- {METHODS[r['prox']].label}, {r['task']}: **diverged** at step {r['training']['steps']}."]
    lines.append("")
    for r in main_run(records):
        if r["kind"] == "flow":
            change = {name: response["0.01"] / 0.01 for name, response in r["shrinkage_response"].items()}
            lines.append(
                f"- The flow `{r['name']}`: {plus_minus(r['bits_per_dim'])} bits per dimension of clean test images. "
                f"Shrinking its latents by 1 + λ (λ = 0.01) moves clean images by {change['natural']:.1f} λ and noisy ones by "
                f"{change['noise 0.2']:.1f} λ, root mean square."
            )
    return lines


def tabulate(experiment):
    """Writes all tables that the book includes to build/tables/."""
    here, kept = build_records(experiment), recorded()
    tables = experiment.build / "tables"
    main = main_run(kept)
    edition = experiment.names["edition"]
    write_csv(tables / "table1.csv", table("I", edition, here))
    write_csv(tables / "table1_recorded.csv", table("I", main[-1]["experiment"]["edition"] if main else edition, main))
    write_csv(tables / "provenance.csv", provenance_rows(here + [r for r in kept if r not in here]))
    names = experiment.names
    minutes = [r["training"]["seconds"] / 60 for r in here if "training" in r]
    write_text(
        tables / "build.md",
        f"This build used the profile **{names['profile']}** on the data set **{names['dataset']}** with the protocol of edition "
        f"**{names['edition']}** ({experiment.edition.num_folds} folds; {experiment.split_sizes['train']} training, "
        f"{experiment.split_sizes['val']} validation and {experiment.split_sizes['test']} test images), seed {names['seed']}: "
        f"{len(minutes)} trainings, {sum(minutes):.1f} minutes in all. Recorded runs kept with the code: {len(kept)}.",
    )
    lines = findings(kept) if main else ["No run on real faces is recorded yet; {doc}`build` shows what was run."]
    write_text(tables / "findings.md", "\n".join(lines))
