"""What recorded solvers gain from more steps (benchmarks/finetune.py), and whether this changes the
paper's main claim."""

import json

from companion.links import Link
from companion.paths import RESULTS
from companion.results import Comparison, Results, decide, paper_table, rows
from companion.settings import METHODS
from companion.statistics import over_images_and_seeds, spread_of_seeds
from companion.words import lead, plus_minus

FOLDER = "benchmarks/finetune"


def gone_on(results: Results, task: str) -> dict[str, dict]:
    """{method: record} of solvers that are among the results: the flow as before, its rivals with BatchNorm
    fixed to its averages; edition v2."""
    seen, found = dict(zip(results.runs.settings_hash, results.runs.images_seen)), {}
    for method in METHODS:
        name = f"{task}-{method}-{'going-on' if method == 'glow' else 'fixed-norms'}.json"
        for path in (RESULTS / FOLDER).glob(f"*/{name}"):
            r = json.loads(path.read_text(encoding="utf-8"))
            if r["settings_hash"] in seen:
                images = seen[r["settings_hash"]] + r["training"]["images_seen"]
                found[method] = r | {"place": f"{path.parent.name}/{name}", "images_seen": images}
    return found


def above(results: Results, task: str) -> dict[str, Comparison]:
    """{rival: how far the flow is above it}, over images and, with the spread of the recorded solvers, over
    seeds, of which each has one here."""
    values = {method: r["psnr"]["values"] for method, r in gone_on(results, task).items()}
    flow, paper, found = values.pop("glow", None), paper_table("I", "v2"), {}
    for rival, of_rival in values.items() if flow else ():
        solvers = rows(results.compared("v2", task))
        terms, spread = spread_of_seeds(solvers, "test", {"glow": 1, rival: 1})
        numbers = dict(zip(("difference", "half_width", "p"), over_images_and_seeds(flow, of_rival, terms)))
        printed = paper[task, "glow"] - paper[task, rival]
        verdict = decide(numbers["difference"], numbers["half_width"], printed)
        about = dict(paper=printed, verdict=verdict, spread=spread)
        found[rival] = Comparison("I", "v2", task, "glow", rival, **about, **numbers)
    return found


def table(results: Results, task: str) -> list[dict]:
    """Rows, one a solver: its result as recorded and now."""
    leads = above(results, task)
    return [
        {
            "Method": METHODS[method].short + ", BatchNorm fixed" * r["fixed_norms"],
            "Seed": r["experiment"]["seed"],
            "Images seen": r["images_seen"],
            "As recorded, dB": plus_minus(r["before"]),
            "Now, dB": Link(plus_minus(r["psnr"]), f"../records/{FOLDER}/{r['place']}"),
            "GLOW above it, dB": lead(leads[method]) if method in leads else None,
        }
        for method, r in gone_on(results, task).items()
    ]


def outcome(results: Results, task: str) -> Comparison | None:
    """The flow against the better of its rivals then; None where one of the three has no further training."""
    found = above(results, task)
    if not {"unet", "resnet"} <= set(found):
        return None
    return min(found.values(), key=lambda pair: pair.difference)
