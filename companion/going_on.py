"""What recorded solvers gain from more steps (benchmarks/going_on.py), and whether the paper's main claim
comes out otherwise then."""

import json

from companion.paths import RESULTS
from companion.records import comparison
from companion.settings import METHODS
from companion.tables import (
    Comparison,
    Link,
    over_images_and_seeds,
    paper_table,
    plus_minus,
    spread_of_seeds,
    verdict,
)

FOLDER = "benchmarks/going_on"


def gone_on(task: str, records: list[dict]) -> dict[str, dict]:
    """{method: record} of solvers that are among records: the flow as before, its rivals with BatchNorm fixed
    to its averages; edition v2."""
    seen = {r.get("settings_hash"): r["training"]["images_seen"] for r in records if "training" in r}
    found = {}
    for method in METHODS:
        name = f"{task}-{method}-{'going-on' if method == 'glow' else 'fixed-norms'}.json"
        for path in (RESULTS / FOLDER).glob(f"*/{name}"):
            r = json.loads(path.read_text(encoding="utf-8"))
            if r["settings_hash"] in seen:
                images = seen[r["settings_hash"]] + r["training"]["images_seen"]
                found[method] = r | {"place": f"{path.parent.name}/{name}", "images_seen": images}
    return found


def lead(task: str, records: list[dict]) -> dict[str, Comparison]:
    """{rival: how far the flow is above it}, over images and, with the spread of the recorded solvers, over
    seeds, of which each has one here."""
    values = {method: r["psnr"]["values"] for method, r in gone_on(task, records).items()}
    flow, paper = values.pop("glow", None), paper_table("I", "v2")
    solvers = [r for r in comparison(records, "v2") if r["kind"] == "solver" and r["task"] == task]
    found = {}
    for method, of_rival in values.items() if flow else ():
        terms, spread = spread_of_seeds(solvers, None, {"glow": 1, method: 1})
        printed = paper[task, "glow"] - paper[task, method]
        difference, half_width, p = over_images_and_seeds(flow, of_rival, terms)
        found[method] = Comparison(difference, half_width, printed, (1, 1), "", spread, p)
    return found


def rows(task: str, records: list[dict]) -> list[dict]:
    """One a solver: its result as recorded and now."""
    above = lead(task, records)
    return [
        {
            "Method": METHODS[method].short + ", BatchNorm fixed" * r["fixed_norms"],
            "Seed": r["experiment"]["seed"],
            "Images seen": f"{r['images_seen']:,}",
            "As recorded, dB": plus_minus(r["before"]),
            "Now, dB": Link(plus_minus(r["psnr"]), f"../records/{FOLDER}/{r['place']}"),
            "GLOW above it, dB": above[method].text if method in above else "–",
        }
        for method, r in gone_on(task, records).items()
    ]


def outcome(task: str, records: list[dict]) -> tuple[str, str] | None:
    """How the flow then stands to the better of its rivals, as a verdict and in words; None where one of the
    three has not gone on."""
    above = lead(task, records)
    if not {"unet", "resnet"} <= set(above):
        return None
    rival = min(above, key=lambda method: above[method].difference)
    return verdict(above[rival]), f"{above[rival].text} dB ({METHODS[rival].short})"
