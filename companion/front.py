"""The front page: the bottom line in three sentences, the budgets, and one picture, all from records."""

import io

from companion import gallery
from companion.files import write_text
from companion.records import comparison, recorded
from companion.settings import METHODS
from companion.tables import compare, every_claim, machine, minutes, paper_table, signed, verdict
from data.portraits import BOXES
from flowlib.files import write_atomically

MAIN_TASKS = ("inpainting", "denoising", "deblurring")
RIVALS = ("unet", "resnet")
STAR = "\\* our flow that was pre-trained on noisy images; that of clean images was not run at this size."


def listed(words: list[str]) -> str:
    """ "a, b and c" """
    return ", ".join(words[:-1]) + " and " * (len(words) > 1) + words[-1] if words else ""


def main_claim(records: list[dict], task: str) -> tuple[str, str]:
    """Whether the flow restores best, for one task of edition v2: a verdict and the numbers behind it."""
    pairs = {rival: compare(records, "I", "v2", task, "glow", rival) for rival in RIVALS}
    if not all(pairs.values()):
        ours = {rival: compare(records, "I", "v2", task, "glow-noisy", rival) for rival in RIVALS}
        if not all(ours.values()):
            return "not run", task
        return "not run", f"{task} (only our flow of noisy images was run: {_nearest(ours)})"
    printed = min(pair.paper for pair in pairs.values())
    verdicts = {verdict(pair) for pair in pairs.values()}
    unclear = next((v for v in verdicts if v.startswith("no claim")), "replicated")
    order = ("the opposite", unclear, "not distinguishable", "replicated")  # one rival ahead is enough
    decided = next(v for v in order if v in verdicts)
    return decided, f"{task} ({_nearest(pairs)}; the paper's lead: {signed(printed)})"


def _nearest(pairs):
    """By how much the flow is above the better of its rivals."""
    rival = min(pairs, key=lambda rival: pairs[rival].difference)
    pair = pairs[rival]
    return f"{signed(pair.difference)} ± {pair.half_width:.2f} dB against the {METHODS[rival].short}"


def bottom_line(records: list[dict]) -> list[str]:
    """Three sentences: where the main claim holds; where not; and how much can be said at all."""
    run = comparison(records, "v2")
    found = {}
    for task in MAIN_TASKS:
        decided, text = main_claim(run, task)
        found.setdefault("no claim" if decided.startswith("no claim") else decided, []).append(text)
    holds, fails = found.get("replicated", []), found.get("the opposite", [])
    rest = [
        text for key, texts in found.items() if key not in ("replicated", "the opposite") for text in texts
    ]
    first = f"**With a flow as its prox the solver restores best in {listed(holds)}.**"
    if not holds:
        first = "**In no task does the flow restore best at our budget.**"
    second = f"**It does not in {listed(fails)}.**" if fails else "**No task shows the opposite.**"
    if rest:
        second += f" Undecided: {listed(rest)}."
    counts = {}
    claims = [row for edition in ("v2", "v1") for row in every_claim(edition, comparison(records, edition))]
    for row in claims:
        key = "no claim" if row["Verdict"].startswith("no claim") else row["Verdict"]
        counts[key] = counts.get(key, 0) + 1
    told = {
        "replicated": "came out as printed",
        "the opposite": "the other way round",
        "not distinguishable": "could not be told apart",
        "no claim": "cannot be judged, as one of the two was trained too little",
        "not run": "were not run",
    }
    parts = [f"{counts[key]} {words}" for key, words in told.items() if key in counts]
    solvers = [r for r in run if r["kind"] == "solver"]
    seeds = len({r["experiment"]["seed"] for r in solvers})
    third = (
        f"Of all {len(claims)} orders of two methods in the paper's tables, both editions, {listed(parts)}; "
        f"each method was trained with {seeds} seed{'s' * (seeds > 1)}, and ± is the 95 % interval over test "
        "images."
    )
    return [first, second, third]


def _millions(number):
    return f"{number / 1e6:.2f} M"


def budgets(records: list[dict]) -> list[str]:
    """Lines of a Markdown table: the paper's budget and ours, for each profile whose runs are compared."""
    of_v2 = [r for r in records if r["experiment"]["edition"] == "v2" and r["kind"] == "solver"]
    shown = {r["experiment"]["profile"] for r in comparison(records, "v2") if r["kind"] == "solver"}
    shown = [p for p in ("gpu", "cpu", "short") if p in shown | {"gpu"} and any(_of(r, p) for r in of_v2)]
    # What the paper prints; it stops "based on the validation loss", after a number of steps that it does not
    # give.
    columns = [["the paper", "25.78 M", "31.04 M", "0.16 M", "23,000", "not said", "not said", "not said"]]
    paper = paper_table("I", "v2")
    columns[0] += [
        " / ".join(f"{paper[task, m]:.2f}" for m in ("glow", *RIVALS)) + " dB" for task in MAIN_TASKS
    ]
    for profile in shown:
        here = [r for r in of_v2 if _of(r, profile)]
        flow = next(r for r in records if r["kind"] == "flow" and r["name"] == "flow" and _of(r, profile))
        sizes = [
            next((_millions(r["num_parameters"]) for r in here if r["method"] == method), "–")
            for method in ("glow", "unet", "resnet")
        ]
        trained = [r for r in here if not METHODS[r["method"]].frozen]
        seen = [r["training"]["images_seen"] for r in trained]
        took = [minutes(r["training"]) for r in trained]
        machines = sorted({machine(r) for r in trained + [flow]})
        columns.append(
            [
                f"ours, `{profile}`",
                *sizes,
                f"{here[0]['data']['split']['train']:,}",
                f"{flow['training']['images_seen']:,}",
                f"{min(seen):,} to {max(seen):,}, in {min(took):.0f} to {max(took):.0f} minutes",
                listed(machines),
                *(_results(here, task) for task in MAIN_TASKS),
            ]
        )
    heads = ["edition v2", "flow, parameters", "U-Net", "ResNet", "training images", "flow saw"]
    heads += ["each solver saw", "on"]
    heads += [f"{task}: flow / U-Net / ResNet" for task in MAIN_TASKS]
    rows = [f"| {head} | " + " | ".join(cells) + " |" for head, cells in zip(heads, zip(*columns))]
    return [rows[0], "| --- " * (1 + len(columns)) + "|", *rows[1:]]


def _results(here, task):
    """Of the flow and its rivals; a star marks our flow of noisy images, where that of clean ones was not
    run."""
    found = {r["method"]: r["psnr"]["mean"] for r in here if r["task"] == task}
    flow = "glow" if "glow" in found or "glow-noisy" not in found else "glow-noisy"
    if not set(RIVALS) & set(found):
        return "–"
    values = [f"{found[m]:.2f}" + "*" * (m == "glow-noisy") if m in found else "–" for m in (flow, *RIVALS)]
    return " / ".join(values) + " dB"


def _of(record, profile):
    return record["experiment"]["profile"] == profile


def write_front(tables):
    """Writes tables/front.md, which the front page includes, and its picture."""
    records = recorded()
    lines = ["No run on real faces is recorded yet; {doc}`build` shows what was run."]
    if any(r["kind"] == "solver" for r in records):
        picture, lines = gallery.hero(), []
        (tables / "hero.png").unlink(missing_ok=True)
        if picture:
            image = io.BytesIO()
            picture.savefig(image, format="png")
            write_atomically(tables / "hero.png", lambda path: path.write_bytes(image.getvalue()))
            lines = [
                "```{figure} ../tables/hero.png",
                ":alt: Two faces with a hole, noise and blur, and what the flow solvers make of them",
                "",
                "Two faces that no training has seen, measured and restored by the recorded flow solvers. "
                f"{listed(list(BOXES))}, both in the public domain.",
                "```",
                "",
            ]
        lines += [
            "## The bottom line",
            "",
            *(f"{i}. {text}" for i, text in enumerate(bottom_line(records), 1)),
        ]
        lines += ["", "## The budgets", "", *budgets(records), "", STAR]
    write_text(tables / "front.md", "\n".join(lines) + "\n")
