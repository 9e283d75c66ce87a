"""Numbers as text, and sentences: the Jinja templates in book/_templates/words, filled with results."""

import re

import jinja2
import numpy as np

from companion.links import anchor, benchmark, record_of
from companion.paths import ROOT
from companion.results import Verdict, claims_of, machine, rows
from companion.settings import (
    DATASET_WORDS,
    EDITION_WORDS,
    METHODS,
    PROFILE_WORDS,
    TASKS,
    in_few_words,
    in_words,
)

TEMPLATES = ROOT / "book/_templates/words"


def listed(words) -> str:
    """ "a, b and c" """
    *others, last = [*words] or [""]
    return f"{', '.join(map(str, others))} and {last}" if others else str(last)


def signed(value: float) -> str:
    """The text "+1.20" or "−1.20", with a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def power_of_ten(value: float) -> str:
    """The text "2 · 10⁻⁶"."""
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit} · 10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def plus_minus(value, digits: int = 2) -> str:
    """ "12.34 ± 0.56", with spaces that do not break, of a Score or of a mean in a record."""
    if isinstance(value, dict):
        mean, half_width, lost = value["mean"], value["half_width"], value.get("not_finite", 0)
    else:
        mean, half_width, lost = value.mean, value.half_width, value.images - value.finite
    if mean is None or np.isnan(mean):
        return "not finite"
    if half_width is None or np.isnan(half_width):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f}\u00a0±\u00a0{half_width:.{digits}f}" + f" ({lost} not finite)" * bool(lost)


def lead(pair) -> str:
    """The difference of a Comparison: "+0.56 ± 0.34", with its mark."""
    return f"{signed(pair.difference)} ± {pair.half_width:.2f}{pair.mark}"


def _separator(loop):
    """What follows an item of a list in words."""
    return "" if loop.last else " and " if loop.revindex == 2 else ", "


def _seeds_of_methods(claims):
    """A run of each method in these claims, and the source of its spread of seeds."""
    return {r.method: (r, whose) for c in claims for r, whose in zip(c.pair, c.spread)}.values()


def _names(run):
    return {"profile": run.profile, "dataset": run.dataset}


environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    undefined=jinja2.StrictUndefined,
    extensions=["jinja2.ext.do"],
)
environment.filters |= {
    "anchor": anchor,
    "benchmark": benchmark,
    "code": lambda names: [f"`{name}`" for name in names],
    "counts": lambda claims: [(v, n) for v in Verdict if (n := sum(c.verdict is v for c in claims))],
    "dB": lambda value, digits=2: f"{value:.{digits}f}",
    "few_words": lambda run: in_few_words(_names(run)),
    "has_score": lambda runs, evaluation: [r for r in runs if evaluation in r.scores],
    "in_words": lambda run: in_words(_names(run)),
    "lead": lead,
    "listed": listed,
    "machine": machine,
    "millions": lambda number: f"{number / 1e6:.2f} M",
    "number": lambda value: f"{value:,}",
    "plus_minus": plus_minus,
    "power_of_ten": power_of_ten,
    "record_of": record_of,
    "rows": rows,
    "seeds_of_methods": _seeds_of_methods,
    "separator": _separator,
    "short": lambda method: METHODS[method].short,
    "signed": signed,
}
environment.globals |= {
    "DATASETS": DATASET_WORDS,
    "EDITIONS": EDITION_WORDS,
    "METHODS": METHODS,
    "PROFILES": PROFILE_WORDS,
    "TASKS": TASKS,
}


def say(template: str, **about) -> str:
    """A template of book/_templates/words as one paragraph of Markdown."""
    return re.sub(r"[ \n]+", " ", environment.get_template(f"{template}.md").render(about)).strip()


def page(template: str, **about) -> str:
    """A template of book/_templates/words as a part of a page, with its lines."""
    lines = environment.overlay(trim_blocks=True, lstrip_blocks=True)
    return lines.get_template(f"{template}.md").render(about)


def on_this_page(recorded, made, table: str, edition: str, task: str) -> str:
    """What came out of the runs made on a page, without a verdict. recorded: the settings that it shows."""
    known = {(r.settings_hash, r.pixels) for setting in rows(recorded) for r in setting.seeds}
    solved = [r for r in rows(made.runs) if r.kind == "solver"]
    rivals = claims_of(table, edition).query("first == 'glow'").second
    pairs = [made.compare(table, edition, task, "glow", rival, rows(made.settings)) for rival in rivals]
    same = bool(solved) and all((r.settings_hash, r.pixels) in known for r in solved)
    return say(
        "on_this_page", same=same, pairs=[pair for pair in pairs if pair.run and pair.paper is not None]
    )
