"""Notebooks that a reader downloads have words where their pages have roles, such as {eq}: only the book
knows what these stand for."""

import json
import re
from pathlib import Path

from sphinx.addnodes import pending_xref

ROLE = re.compile(r"\{(?:\w+:)?(\w+)\}`([^`]+?)(?:\s*<([^`>]*)>)?`")
LABEL = re.compile(r"^\([\w-]+\)=\n", re.MULTILINE)


def words(app, page):
    """What the page shows in place of references, by role and target, where it has no words of its own."""
    found = {}
    for node in app.env.get_doctree(page).findall(pending_xref):
        if node.get("refexplicit") and node["reftype"] != "numref":
            continue
        where = app.env, page, app.builder, node["reftype"], node["reftarget"], node, node[0]
        shown = app.env.domains[node["refdomain"]].resolve_xref(*where)
        if shown is not None:
            found[node["reftype"], node["reftarget"]] = shown.astext()
    return found


def in_plain_words(app, exception):
    if exception or app.builder.format != "html":
        return
    sources = Path(app.outdir) / "_sources"
    for path in sources.rglob("*.ipynb"):
        known = words(app, path.relative_to(sources).with_suffix("").as_posix())

        def plain(role, known=known):
            given = role[3] and role[1] != "numref"  # whose words have a place for the number
            return role[2] if given else known.get((role[1], role[3] or role[2]), role[2])

        notebook = json.loads(path.read_text("utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = LABEL.sub("", ROLE.sub(plain, "".join(cell["source"])))
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def setup(app):
    app.connect("build-finished", in_plain_words)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
