"""The front page: the bottom line, each claim with its verdict, the budgets, and one picture, all from
results."""

import functools
from collections.abc import Sequence

from companion import finetune, gallery
from companion.files import write_text
from companion.map import beside_flow, plugged_in_fairly
from companion.records import recorded
from companion.results import CLAIMS, Comparison, Results, Verdict, load, paper_table, rows
from companion.settings import METHODS, TASKS
from companion.words import lead as lead_of
from companion.words import page, say
from data.portraits import BOXES
from flowlib.files import write_atomically

MAIN_TASKS = ("inpainting", "denoising", "deblurring")
RIVALS = ("unet", "resnet")
PRE_TRAINED = ("unet-denoiser", "resnet-denoiser")
# What the paper says of the flow, each sentence with the rivals that it is about.
SENTENCES = CLAIMS[CLAIMS.sentence != ""].groupby("sentence", sort=False).second.nunique().to_dict()
# The rival whose verdict comes first decides: one rival ahead is enough.
DECISIVE = (
    Verdict.NOT_RUN,
    Verdict.OPPOSITE,
    Verdict.NO_CLAIM,
    Verdict.UNDECIDED,
    *reversed(list(Verdict)[:2]),
)


def decided(results: Results, sentence: str, task: str) -> Comparison | None:
    """The comparison that decides one of SENTENCES for a task; None where the paper has none."""
    found = [c for c in results.claims if (c.sentence, c.task) == (sentence, task)]
    return min(found, key=lambda c: (DECISIVE.index(c.verdict), c.difference), default=None)


def for_the_flow(claims: list[Comparison]) -> list[list[Comparison]]:
    """The claims in which the paper has the flow above a U-Net or ResNet, those above a pre-trained one, and
    the rest."""
    parts = [
        [c for c in claims if c.second in rivals and c.first == "glow"] for rivals in (RIVALS, PRE_TRAINED)
    ]
    parts = [[c for c in part if c.paper > 0] for part in parts]
    return [*parts, [c for c in claims if not any(c in part for part in parts)]]


def other_sizes(results: Results, tasks: Sequence[str] = MAIN_TASKS) -> list[dict]:
    """Where runs of another size than those compared contradict the main claim, or have only its rivals: for
    the template other_sizes."""
    found = []
    for size in ("gpu", "gpu-longer", "paper"):
        for task in tasks:
            usual, *others = results.groups("v2", task) or [[]]
            for group in (group for group in others if group[0].profile == size):
                pairs = [results.compare("I", "v2", task, "glow", rival, group) for rival in RIVALS]
                by_method = {r.method: r for r in group if r.kind == "solver"}
                told = dict(profile=size, task=task, pairs=pairs, alone=[by_method.get(m) for m in RIVALS])
                if "glow" not in by_method and all(told["alone"]):
                    found.append(told | {"pairs": []})
                elif all(c.run for c in pairs) and min(c.difference for c in pairs) < 0:
                    found.append(told)
    return found


def paragraphs(results: Results) -> list[str]:
    """Where the main claim holds at the usual size; what more training and other sizes say; how sure that
    is."""
    main, pre_trained, *_ = ([decided(results, s, task) for task in MAIN_TASKS] for s in SENTENCES)
    solvers = [r for r in rows(results.compared("v2")) if r.kind == "solver"]
    profiles = list(dict.fromkeys(r.profile for r in solvers))
    pre_trained = [c for c in pre_trained if c and c.run]
    told = [say("bottom_line", main=main, pre_trained=pre_trained, profiles=profiles)]
    longer = [c for task in MAIN_TASKS if (c := finetune.outcome(results, task))]
    if longer:
        before = {c.task: c.outcome for c in main}
        changed = [c for c in longer if c.outcome != before[c.task]]
        told.append(say("longer", longer=longer, changed=changed))
    if sizes := other_sizes(results):
        told.append(say("open_sizes", sizes=sizes, links=True))
    return [*told, how_sure(results, solvers)]


def lead(results: Results) -> str:
    """The main result in one sentence: each task's comparison with the better rival, also where rivals are
    pre-trained, or all are trained for longer."""
    main, pre_trained, *_ = ({task: decided(results, s, task) for task in MAIN_TASKS} for s in SENTENCES)
    longer = {task: finetune.outcome(results, task) for task in MAIN_TASKS}
    return say("lead", main=main, pre_trained=pre_trained, longer=longer, sizes=other_sizes(results))


def survival(results: Results) -> list[dict]:
    """Rows, one a task: how far the flow is above the better rival, as compared and under each doubt."""

    def cell(c, otherwise):
        if not c or c.difference is None:
            return "not run" if c else otherwise
        return f"{c.verdict.mark} {lead_of(c)}, {METHODS[c.second].short}"

    as_compared, pre_trained, *_ = SENTENCES
    return [
        {
            "Task": TASKS[task].label,
            "As compared": cell(decided(results, as_compared, task), "–"),
            "Rivals pre-trained": cell(decided(results, pre_trained, task), "not in the paper"),
            "All trained for longer": cell(finetune.outcome(results, task), "not recorded"),
        }
        for task in MAIN_TASKS
    ]


def how_sure(results: Results, solvers) -> str:
    """How all orders of two methods came out, and with how many seeds."""
    above, above_pre_trained, others = for_the_flow(results.claims)
    return say(
        "how_sure",
        claims=results.claims,
        above=above,
        above_pre_trained=above_pre_trained,
        others=others,
        flow_seeds=max((len(r.seeds) for r in solvers if r.method in gallery.FLOWS), default=0),
        most_seeds=max(len(r.seeds) for r in solvers),
    )


def budgets(results: Results) -> list[dict]:
    """Budgets and results of each profile that is compared, or shown beside, and whose flow is
    recorded."""
    found, compared = [], {r.profile for r in rows(results.compared("v2")) if r.kind == "solver"}
    of_v2 = [r for r in rows(results.settings) if r.kind == "solver" and r.edition == "v2"]
    for profile in ("gpu", "gpu-longer", "cpu", "short"):
        here = [r for r in of_v2 if r.profile == profile]
        flow = next((r for r in rows(results.runs) if (r.name, r.profile) == ("flow", profile)), None)
        if not here or not flow or profile not in compared | {"gpu", "gpu-longer"}:
            continue
        trained = [r for r in here if not r.frozen]
        found.append(
            dict(
                profile=profile,
                flow=flow,
                rivals=[next((r for r in here if r.method == rival), None) for rival in RIVALS],
                train_images=here[0].train_images,
                seen=[r.images_seen for r in trained],
                minutes=[one.minutes for r in trained for one in r.seeds],
                machines=sorted({r.machine for r in [*trained, flow]}),
                reached={task: _reached(results, [r for r in here if r.task == task]) for task in MAIN_TASKS},
            )
        )
    return found


def _reached(results, solvers):
    """(PSNR, marks) of the flow and its rivals; a star marks our flow of noisy images, where that of clean
    ones was not run, a question mark a training that no claim is made of. [] without rivals."""
    found = {r.method: (r.psnr, "?" * bool(results.doubt(r))) for r in solvers}
    flow = "glow" if "glow" in found or "glow-noisy" not in found else "glow-noisy"
    if not set(RIVALS) & set(found):
        return []
    values = [found.get(method, (None, "")) for method in (flow, *RIVALS)]
    return [(values[0][0], values[0][1] + "*" * (flow == "glow-noisy")), *values[1:]]


def front(
    results: Results, pictures: Sequence[str] = (), estimates: dict | None = None, fair: dict | None = None
) -> str:
    """What the front page includes, as Markdown. estimates, fair: beside_flow and plugged_in_fairly of
    companion.map."""
    if not len(results.runs):
        return page("front", run=False)
    paper = paper_table("I", "v2")
    return page(
        "front",
        run=True,
        pictures=pictures,
        faces=BOXES,
        tasks=MAIN_TASKS,
        lead=lead(results),
        estimates=estimates or {},
        fair=fair or {},
        paragraphs=paragraphs(results),
        rivals=SENTENCES,
        board={s: {task: decided(results, s, task) for task in MAIN_TASKS} for s in SENTENCES},
        budgets=budgets(results),
        paper={task: [paper[task, method] for method in ("glow", *RIVALS)] for task in MAIN_TASKS},
    )


def write_front(tables):
    """Writes tables/front.md, which the front page includes, and its picture."""
    results, pictures = load(), {}
    if (results.runs.kind == "solver").any():
        pictures = gallery.hero() or {}
        for name in ("hero", "hero-narrow"):
            (tables / f"{name}.png").unlink(missing_ok=True)
        for name, picture in pictures.items():
            write_atomically(tables / f"{name}.png", functools.partial(picture.savefig, format="png"))
    records = recorded()
    text = front(results, pictures, beside_flow(records), plugged_in_fairly(records))
    write_text(tables / "front.md", text)
