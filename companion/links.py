"""Where the book holds the record of a run or of a benchmark."""

import html
from typing import NamedTuple


class Link(NamedTuple):
    """A text that leads somewhere; href: from a page of the book."""

    text: str
    href: str

    def __str__(self):
        return self.text


def record_of(record: dict, of_build: bool = False) -> Link:
    """The record of a run, recorded or of this build; as text, its profile and where the hash of its settings
    begins, which two profiles may share."""
    names = record["experiment"]
    place = ["this-build" if of_build else f"{names['profile']}-{names['dataset']}-s{names['seed']}"]
    place += [names["edition"]] if record["kind"] != "flow" else []
    which = record["settings_hash"][:6] if "settings_hash" in record else record["name"]
    return Link(f"{names['profile']} {which}", "/".join(["../records", *place, f"{record['name']}.json"]))


def benchmark(name: str) -> Link:
    """The record of a benchmark."""
    return Link(f"{name}.json", f"../records/benchmarks/{name}.json")


def anchor(link: Link) -> str:
    """A link in HTML."""
    return f'<a href="{html.escape(link.href)}">{html.escape(link.text)}</a>'
