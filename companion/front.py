"""The front page: the bottom line, each claim with its verdict, the budgets, and one picture, all from
records."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from companion import gallery, going_on
from companion.files import write_text
from companion.records import comparison, merged, of_seeds, recorded
from companion.settings import METHODS, PROFILE_WORDS
from companion.tables import (
    MARKS,
    compare,
    counted,
    every_claim,
    listed,
    machine,
    minutes,
    page_of,
    paper_table,
    profile_of,
    signed,
    survivors,
    together,
    too_little_training,
    verdict,
)
from data.portraits import BOXES
from flowlib.files import write_atomically

MAIN_TASKS = ("inpainting", "denoising", "deblurring")
RIVALS = ("unet", "resnet")
PRE_TRAINED = ("unet-denoiser", "resnet-denoiser")
SIZES = "† the numbers of parameters are those that its first edition gives; the final one gives none."
STAR = "\\* our flow that was pre-trained on noisy images; that of clean images was not run at this size."

DOUBT = "? no claim is made of this training: {doc}`the remark in the tables <../notebooks/tables>` says why."


class Claim(NamedTuple):
    """What the paper says of the flow, and where: the table whose numbers show it, and the methods that the
    flow is above."""

    words: str
    table: str
    edition: str
    rivals: Sequence[str]


CLAIMS = (
    Claim("restores best of three networks", "I", "v2", RIVALS),
    Claim("also where its rivals are pre-trained as denoisers", "I", "v2", PRE_TRAINED),
    Claim("also where the measurement differs from that in training", "III", "v2", RIVALS),
    Claim("mostly also on anime faces", "IV", "v2", RIVALS),
    Claim("is better than one that is only plugged in", "II", "v2", ("glow-frozen",)),
    Claim("is better for its pre-training (v1)", "III", "v1", ("glow-scratch",)),
)


def decided(claim: Claim, task: str, records: list[dict], others: Sequence[dict] = ()):
    """(verdict, comparison with the rival that decides it, that rival, profile) of a claim for one task: "not
    run" and None where a rival or the flow was not, "–" and None where the paper has none; others: see
    tables.claims."""
    where = claim.table, claim.edition, task, "glow"
    rivals = [rival for rival in claim.rivals if (task, rival) in paper_table(claim.table, claim.edition)]
    if not rivals:
        return "–", None, None, "–"
    found = {rival: together(records, others, *where, rival) for rival in rivals}
    if not all(found.values()):
        return "not run", None, None, "–"
    pairs = {rival: compare(group, *where, rival, others) for rival, group in found.items()}
    verdicts = {rival: verdict(pair) for rival, pair in pairs.items()}
    order = ("the opposite", "no claim", "not distinguishable", "same sign", "size replicated")
    # One rival ahead is enough.
    rival = min(pairs, key=lambda m: (order.index(verdicts[m].split(":")[0]), pairs[m].difference))
    return verdicts[rival], pairs[rival], rival, profile_of(found[rival])


def scoreboard(records: list[dict]) -> list[str]:
    """Lines of a Markdown table: each claim of CLAIMS and each task, with its verdict."""
    heads = ["The paper: the solver with a flow …", *MAIN_TASKS]
    rows = [heads, ["---"] * len(heads)]
    for claim in CLAIMS:
        run, cells = comparison(records, claim.edition), [claim.words]
        usual = {r["experiment"]["profile"] for r in run if r["kind"] == "solver"}
        for task in MAIN_TASKS:
            found, pair, rival, profile = decided(claim, task, run, records)
            if pair is None:
                cells.append(found)
                continue
            page = page_of(claim.table, claim.edition, task).removesuffix(".html")
            notes = [METHODS[rival].short] * (len(claim.rivals) > 1) + [f"`{profile}`"] * (
                profile not in usual
            )
            cell = f"{MARKS.get(found, '?')} {{doc}}`{pair.text} <{page}>` ({signed(pair.paper)})"
            cells.append(" ".join([cell, *notes]))
        rows.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in rows]


UNTESTED = (
    "Two claims are not tested: that folds with a flow each (untied) do better than folds with one for all "
    "(tied), and that unfolding accelerates the search for the most probable image."
)
LEGEND = (
    "By how many dB the flow is above its rival (of two the one that decides, named); in brackets what the "
    "paper prints; a profile where that alone has the number. ✓ same sign, ✓✓ size replicated: the paper's "
    "difference lies in our interval, ✗ the opposite, ≈ not distinguishable, ? no claim, as not trained well "
    "enough. ± is the 95 % interval over test images and seeds; "
    "¹ over images alone, as there is one seed each; ² with the spread of seeds of v2. Each number leads to "
    "its page, where the records are."
)


def bottom_line(records: list[dict]) -> list[str]:
    """Sentences: where the main claim holds at the usual size; what other sizes say; how sure that is."""
    run, found = comparison(records, "v2"), {}
    for task in MAIN_TASKS:
        outcome, pair, rival, _ = decided(CLAIMS[0], task, run)
        ahead = f" (the {METHODS[rival].short} is ahead)" if outcome == "the opposite" else ""
        key = "no claim" if outcome.startswith("no claim") else outcome
        found.setdefault(key, []).append(task + ahead)
    solvers = [r for r in run if r["kind"] == "solver"]
    profiles = listed([f"`{name}`" for name in dict.fromkeys(r["experiment"]["profile"] for r in solvers)])
    holds = [t for word in ("same sign", "size replicated") for t in found.pop(word, [])]
    fails = found.pop("the opposite", [])
    first = f"best in {listed(holds)}" if holds else "best in no task"
    first += f", but not in {listed(fails)}" if fails else ""
    first = f"**With the networks of profile {profiles} (below), the flow restores {first}.**"
    rest = [task for tasks in found.values() for task in tasks]
    first += f" Undecided: {listed(rest)}." if rest else ""
    first += against_pre_trained(records, run)
    larger = other_sizes(records, run)
    rest = [f"**At the paper's size that is open.**{larger}"] if larger else []
    return [first, *with_more_training(records), *rest, how_sure(records)]


def against_pre_trained(records: list[dict], run: list[dict]) -> str:
    """Where the flow stands against rivals that were pre-trained as denoisers; "" where none was run."""
    told = []
    for task in MAIN_TASKS:
        outcome, pair, rival, _ = decided(CLAIMS[1], task, run, records)
        if pair:
            told.append(f"{pair.text} dB in {task} ({METHODS[rival].short}: *{outcome}*)")
    return f" Against rivals that are pre-trained as denoisers it is {listed(told)}." if told else ""


def with_more_training(records: list[dict]) -> list[str]:
    """What the main claim comes to where each solver goes on (see going_on), in a paragraph; [] where none
    did."""
    run, told, changed = comparison(records, "v2"), [], []
    for task in MAIN_TASKS:
        now = going_on.outcome(task, records)
        if now:
            told.append(f"{now[1]} in {task}")
            if now[0] != decided(CLAIMS[0], task, run)[0]:
                changed.append(f"{task} is *{now[0]}*")
    if not told:
        return []
    verdicts = f"With more training {listed(changed)}." if changed else "The same with more training."
    return [
        f"**{verdicts}** Each of these solvers went on for 900 steps, the rivals with BatchNorm fixed to its "
        "averages, as it had held them back ({doc}`choices`). The flow is then, against the better rival, "
        f"{listed(told)}."
    ]


def how_sure(records: list[dict]) -> str:
    """How all orders of two methods came out, and with how many seeds."""
    claims = every_claim(records)
    above, pre_trained, others = for_the_flow(claims)
    over = f"Of the {len(pre_trained)} in which it is above one pre-trained as a denoiser: "
    over += f"{counted(pre_trained)}. "
    profiles = listed([f"`{p}`" for p in dict.fromkeys(row["Profile"] for row in claims) if p != "–"])
    solvers = [r for r in comparison(records, "v2") if r["kind"] == "solver"]
    flows = max((len(of_seeds(r)) for r in solvers if r["method"] in gallery.FLOWS), default=0)
    most = max(len(of_seeds(r)) for r in solvers)
    seeds = f"the flow was trained with {flows} seed{'s' * (flows != 1)}"
    seeds += f", its rivals with up to {most}" if most > flows else ", like its rivals"
    single = sum(row["Seeds"] == "1 and 1" for row in claims)
    borrowed, alone = (sum(mark in row["Ours, dB"] for row in claims) for mark in "²¹")
    told = [f"{borrowed} have the spread of seeds of v2's runs of the same task"] * bool(borrowed)
    told += [f"the ± of {alone} is over images alone"] * bool(alone)
    single = f" Of these orders {'; '.join([f'{single} come from one seed each', *told])}." * bool(single)
    twice = sum("all but repeats" in row["Task"] for row in claims)
    repeated = f" ({twice} of them all but repeat others, see there)" if twice else ""
    return (
        f"**How sure.** The paper's tables, both editions, have {len(claims)} orders of two methods"
        f"{repeated}. Of the {len(above)} in which the flow is above a U-Net or ResNet: {counted(above)}. "
        f"{over}Of the other {len(others)}: {counted(others)}. {survivors(claims)} "
        f"They are at the profiles {profiles}; {seeds}.{single}"
    )


def for_the_flow(claims: list[dict]) -> list[list[dict]]:
    """The claims in which the paper has the flow above a U-Net or ResNet, those above a pre-trained one, and
    the rest."""
    parts = []
    for rivals in (RIVALS, PRE_TRAINED):
        over = {f"GLOW over {METHODS[rival].short}" for rival in rivals}
        parts.append([row for row in claims if row["Claim"] in over and row["Paper, dB"].startswith("+")])
    return [*parts, [row for row in claims if not any(row in part for part in parts)]]


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
                    f" After minutes on a GPU (profile `{profile}`), the flow is not ahead in {task}: after "
                    f"{seen['glow']:,} training images {told}; one seed each, so ± is over images alone."
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
        "so which of them is best there is not known."
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
    classical = [r for r in records if r["kind"] == "classical" and r["experiment"]["edition"] == "v2"]
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
        took = [minutes(one) for r in trained for one in of_seeds(r)]
        machines = sorted({machine(r) for r in trained + [flow]})
        columns.append(
            [
                f"ours, `{profile}`",
                *sizes,
                f"{here[0]['data']['split']['train']:,}",
                f"{flow['training']['images_seen']:,}",
                f"{min(seen):,} to {max(seen):,}, in {min(took):.0f} to {max(took):.0f} minutes",
                listed(machines),
                *(_results(here + classical, task) for task in MAIN_TASKS),
            ]
        )
    heads = ["edition v2", "flow, parameters", "U-Net", "ResNet", "training images", "flow saw"]
    heads += ["each solver saw", "on"]
    heads += [f"{task}: flow / U-Net / ResNet" for task in MAIN_TASKS]
    rows = [f"| {head} | " + " | ".join(cells) + " |" for head, cells in zip(heads, zip(*columns))]
    return [rows[0], "| --- " * (1 + len(columns)) + "|", *rows[1:]]


def _results(here, task):
    """Of the flow and its rivals; a star marks our flow of noisy images, where that of clean ones was not
    run, a question mark what no claim is made of."""
    solvers = [r for r in here if r["task"] == task and r["kind"] == "solver"]
    found = {
        r["method"]: f"{r['psnr']['mean']:.2f}" + "?" * bool(too_little_training(r, here)) for r in solvers
    }
    flow = "glow" if "glow" in found or "glow-noisy" not in found else "glow-noisy"
    if not set(RIVALS) & set(found):
        return "–"
    values = [found[m] + "*" * (m == "glow-noisy") if m in found else "–" for m in (flow, *RIVALS)]
    return " / ".join(values) + " dB"


def _of(record, profile):
    return record["experiment"]["profile"] == profile


def with_links(text: str) -> str:
    """Markdown in which each number's task leads to its page, and the count of orders to all of them."""
    tasks = "|".join(MAIN_TASKS)
    text = re.sub(rf"\b({tasks})(?=: )", r"{doc}`\1 <../notebooks/in_distribution-\1>`", text)
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
                f"{listed(list(BOXES))}, both in the public domain. Below each picture: its PSNR. "
                "{doc}`The explorer <../notebooks/explorer>` has others for these faces: it rounds weights.",
                "```",
                "",
            ]
        first, *rest = map(with_links, bottom_line(records))
        lines += ["## The bottom line", "", first, "", *scoreboard(records), "", LEGEND, "", UNTESTED]
        for paragraph in rest:
            lines += ["", paragraph]
        rows = budgets(records)
        lines += ["", "## The budgets", "", *told_profiles(records), "", *map(with_links, rows)]
        lines += ["", SIZES]
        for mark, text in (("*", STAR), ("?", DOUBT)):
            lines += ["", text] * any(mark in row for row in rows)
    write_text(tables / "front.md", "\n".join(lines) + "\n")
