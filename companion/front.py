"""The front page: the bottom line in three sentences, the budgets, and one picture, all from records."""

import functools
import re
from collections.abc import Sequence

from companion import gallery
from companion.files import write_text
from companion.records import comparison, merged, of_seeds, recorded
from companion.settings import METHODS, PROFILE_WORDS
from companion.tables import compare, every_claim, listed, machine, minutes, paper_table, signed, verdict
from data.portraits import BOXES
from flowlib.files import write_atomically

MAIN_TASKS = ("inpainting", "denoising", "deblurring")
RIVALS = ("unet", "resnet")
SIZES = "† the numbers of parameters are those that its first edition gives; the final one gives none."
STAR = "\\* our flow that was pre-trained on noisy images; that of clean images was not run at this size."


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
    first += other_sizes(records, run)
    counts = {}
    claims = [row for e in ("v2", "v1") for row in every_claim(e, comparison(records, e), others=records)]
    for row in claims:
        key = "no claim" if row["Verdict"].startswith("no claim") else row["Verdict"]
        counts[key] = counts.get(key, 0) + 1
    told = {
        "replicated": "came out as printed",
        "the opposite": "the other way round",
        "not distinguishable": "could not be told apart",
        "no claim": "cannot be judged, as one of the two was not trained well enough",
        "not run": "were not run",
    }
    parts = [f"{counts[key]} {words}" for key, words in told.items() if key in counts]
    solvers = [r for r in run if r["kind"] == "solver"]
    seeds = sorted({len(of_seeds(r)) for r in solvers})
    trained = (
        f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' * (seeds[0] > 1)}"
    )
    twice = sum("all but repeats" in row["Task"] for row in claims)
    repeated = f" ({twice} of them all but repeat others, see there)" if twice else ""
    third = (
        f"Of all {len(claims)} orders of two methods in the paper's tables, both editions{repeated}, "
        f"{listed(parts)}; each method was trained with {trained}, and ± is the 95 % interval over test "
        "images" + " and, where a task has several, over seeds" * (seeds[-1] > 1) + "."
    )
    return [first, second, third]


def other_sizes(records: list[dict], shown: list[dict], tasks: Sequence[str] = MAIN_TASKS) -> str:
    """What runs of another size than those of the headline say of the main claim; "" where they agree."""
    sentences = []
    taken = {(r["task"], r["experiment"]["profile"]) for r in shown if r["kind"] == "solver"}
    for profile in ("gpu", "gpu-longer", "paper"):
        of_size = [r for r in records if r["experiment"]["edition"] == "v2" and _of(r, profile)]
        for task in tasks:
            pairs = {rival: compare(of_size, "I", "v2", task, "glow", rival) for rival in RIVALS}
            if not any(r["task"] == task and r["method"] == "glow" for r in of_size):
                sentences += _rivals_alone([r for r in of_size if r["task"] == task], profile)
            if (task, profile) in taken or not all(pairs.values()):
                continue
            if min(pair.difference for pair in pairs.values()) < 0:
                seen = {
                    r["method"]: r["training"]["images_seen"]
                    for r in of_size
                    if r["kind"] == "solver" and r["task"] == task
                }
                told = " and ".join(
                    f"{signed(pair.difference)} ± {pair.half_width:.2f} dB against the "
                    f"{METHODS[rival].short} (after {seen[rival]:,})"
                    for rival, pair in pairs.items()
                )
                sentences.append(
                    f" With networks of the paper's size (profile `{profile}`), in minutes on a GPU, the "
                    f"flow is not ahead in {task}: after {seen['glow']:,} training images {told}."
                )
    return "".join(sentences)


def _rivals_alone(records, profile):
    """What both rivals reach at a size at which the flow was not run."""
    found = {r["method"]: r for r in merged(records) if r["kind"] == "solver"}
    if not set(RIVALS) <= set(found):
        return []
    told = [
        f"the {METHODS[rival].short} reaches {found[rival]['psnr']['mean']:.2f} dB "
        f"(after {found[rival]['training']['images_seen']:,} images)"
        for rival in RIVALS
    ]
    return [
        f" Trained for longer (profile `{profile}`), {listed(told)}; the flow was not trained for so long, "
        "so which of them is best there is open."
    ]


def paper_claims() -> list[str]:
    """Lines of Markdown: what the final edition claims, with the paper's own numbers."""
    table = {name: paper_table(name, "v2") for name in ("I", "II", "III", "IV")}
    tasks = ("denoising", "inpainting", "deblurring")

    def leads(name):
        return {
            task: table[name][task, "glow"] - max(table[name][task, rival] for rival in RIVALS)
            for task in tasks
        }

    first = listed([f"{signed(lead)} dB in {task}" for task, lead in leads("I").items()])
    moved = listed([f"{signed(lead)} dB in {task}" for task, lead in leads("III").items()])
    drawn = listed([f"{signed(lead)} dB in {task}" for task, lead in leads("IV").items()])
    cost = listed(
        [f"{table['II'][task, 'glow'] - table['II'][task, 'glow-frozen']:.1f} dB in {task}" for task in tasks]
    )
    return [
        "- the flow restores best of three networks; its lead over the better of the other two is "
        f"{first} ({{doc}}`one page a task <../notebooks/in_distribution-inpainting>`);",
        f"- it also leads when the measurement at test time differs from that in training, by {moved} "
        "({doc}`here <../notebooks/ood_measurements-inpainting>`), but not always on anime faces, with "
        f"{drawn} ({{doc}}`here <../notebooks/ood_images-inpainting>`);",
        f"- a flow that is only plugged in, not trained for the task, is worse by {cost} "
        "({doc}`here <../notebooks/plug_and_play-inpainting>`).",
    ]


def _millions(number):
    return f"{number / 1e6:.2f} M"


def _shown(records):
    """The solvers of edition v2, and the profiles of the budgets' table."""
    of_v2 = [r for r in merged(records) if r["experiment"]["edition"] == "v2" and r["kind"] == "solver"]
    shown = {r["experiment"]["profile"] for r in comparison(records, "v2") if r["kind"] == "solver"}
    shown |= {"gpu", "gpu-longer"} & {r["experiment"]["profile"] for r in of_v2}
    return of_v2, [profile for profile in ("gpu", "gpu-longer", "cpu", "short") if profile in shown]


def told_profiles(records: list[dict]) -> list[str]:
    """What a profile is, and those of the table."""
    told = listed([f"`{profile}` stands for {PROFILE_WORDS[profile]}" for profile in _shown(records)[1]])
    return [f"A *profile* says how large the networks are and how long they are trained: {told}."]


def budgets(records: list[dict]) -> list[str]:
    """Lines of a Markdown table: the paper's budget and ours, for each profile whose runs are compared."""
    of_v2, shown = _shown(records)
    # What the paper prints; it stops "based on the validation loss", after a number of steps that it does not
    # give.
    columns = [["the paper†", "25.78 M", "31.04 M", "0.16 M", "23,000", "not said", "not said", "not said"]]
    paper = paper_table("I", "v2")
    columns[0] += [
        " / ".join(f"{paper[task, m]:.2f}" for m in ("glow", *RIVALS)) + " dB" for task in MAIN_TASKS
    ]
    for profile in shown:
        here = [r for r in of_v2 if _of(r, profile)]
        flow = next(r for r in records if r["kind"] == "flow" and r["name"] == "flow" and _of(r, profile))
        sizes = [_millions(flow["num_parameters"])] + [
            next((_millions(r["num_parameters"]) for r in here if r["method"] == rival), "–")
            for rival in RIVALS
        ]
        trained = [r for r in here if not METHODS[r["method"]].frozen]
        seen = [r["training"]["images_seen"] for r in trained]
        took = [minutes(r) for r in trained]
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


def with_links(text: str) -> str:
    """Markdown in which each number's task leads to its page, and the count of orders to all of them."""
    tasks = "|".join(MAIN_TASKS)
    text = re.sub(rf"\b({tasks})(?= \(|: )", r"{doc}`\1 <../notebooks/in_distribution-\1>`", text)
    return re.sub(r"\d+ orders", r"{doc}`\g<0> <../notebooks/tables>`", text)


def write_front(tables):
    """Writes tables/front.md, which the front page includes, and its picture."""
    records = recorded()
    lines = ["No run on real faces is recorded yet; {doc}`build` shows what was run."]
    if any(r["kind"] == "solver" for r in records):
        pictures, lines = gallery.hero() or {}, []
        for name in ("hero", "hero-narrow"):
            (tables / f"{name}.png").unlink(missing_ok=True)
        for name, picture in pictures.items():
            write_atomically(tables / f"{name}.png", functools.partial(picture.savefig, format="png"))
            lines += [
                f"```{{figure}} ../tables/{name}.png",
                ":alt: Two faces with a hole, noise and blur, and what the flow solvers make of them",
                f":figclass: {name}",
                "",
                "Two faces that no training has seen, measured and restored by the recorded flow solvers. "
                f"{listed(list(BOXES))}, both in the public domain.",
                "```",
                "",
            ]
        lines += [
            "## The bottom line",
            "",
            *(f"{i}. {with_links(text)}" for i, text in enumerate(bottom_line(records), 1)),
        ]
        rows = budgets(records)
        lines += ["", "## The budgets", "", *told_profiles(records), "", *map(with_links, rows)]
        lines += ["", SIZES] + ["", STAR] * any("*" in row for row in rows)
    write_text(tables / "front.md", "\n".join(lines) + "\n")
    write_text(tables / "claims.md", "\n".join(paper_claims()) + "\n")
