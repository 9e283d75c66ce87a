"""The book, built from nothing with warnings as errors: complete, linked, and filled in."""

import base64
import binascii
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.conftest import ROOT, build_smoke_book

TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())


def files(entries):
    """The pages of a part of the contents, with the sections of its chapters."""
    return [page for entry in entries for page in [entry["file"], *files(entry.get("sections", []))]]


PAGES = [TOC["root"]] + [page for part in TOC["parts"] for page in files(part["chapters"])]
NOTEBOOKS = [page for page in PAGES if page.startswith("notebooks/")]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    """Outputs depend on data set, profile or machine; they come from executing the notebook."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["id"]


class Page(HTMLParser):
    """Links, ids and table cells of an html page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.cells = [], set(), []
        self.in_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag in ("td", "th"):
            self.in_cell = True
            self.cells.append("")
        elif self.in_cell and tag in ("img", "svg"):
            self.cells[-1] += tag

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.cells[-1] += data


@pytest.fixture(scope="session")
def html(smoke_book):
    return smoke_book / "html"


@pytest.fixture(scope="session")
def pages(html):
    return {path: Page(path) for path in html.rglob("*.html") if "_static" not in path.parts}


def test_no_warning(smoke_book):
    log = (smoke_book / "logs/book.log").read_text()
    assert "build succeeded" in log
    assert "WARNING:" not in log  # Sphinx's; a kernel's, of its own connection, has no colon


def test_every_page_of_the_contents_is_there(html):
    assert (html / "index.html").is_file()
    assert [page for page in PAGES if not (html / f"{page}.html").is_file()] == []


def test_internal_links_resolve(html, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            lost = url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            if lost or not target.is_file():
                broken.append((path.relative_to(html).as_posix(), link))
    assert broken == []


def test_every_page_has_a_heading_of_its_own(html):
    """Also where one notebook makes several."""
    heading = re.compile(r'<h1>(?:<span class="section-number">.*?</span>)?(.*?)<a', re.DOTALL)
    headings = [heading.search((html / f"{page}.html").read_text())[1] for page in PAGES]
    assert sorted(headings) == sorted(set(headings))


def test_every_caption_has_a_picture(pages):
    figure = re.compile(r"<figure.*?</figure>", re.DOTALL)
    found = [(path.name, text[:300]) for path in pages for text in figure.findall(path.read_text())]
    assert [(name, text) for name, text in found if "<img" not in text and "<svg" not in text] == []


def test_every_output_is_on_its_page(smoke_book):
    """Pictures, which the book names after what they hold, and no object that cannot be shown."""
    sources = sorted((smoke_book / "html/_sources/notebooks").glob("*.ipynb"))
    pictures, lost, shown = 0, [], []
    for source in sources:
        page = (smoke_book / f"html/notebooks/{source.stem}.html").read_text(encoding="utf-8")
        shown += [source.stem] * ("IPython.core" in page)
        for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
            data = [output.get("data", {}).get("image/png") for output in cell.get("outputs", ())]
            names = [hashlib.sha256(binascii.a2b_base64(picture)).hexdigest() for picture in data if picture]
            pictures += len(names)
            lost += [(source.stem, cell["id"]) for name in names if name not in page]
    assert pictures > len(sources) and lost == [] and shown == []


def test_every_picture_says_what_it_shows(pages):
    """Sphinx takes the path of a picture that nobody described."""
    images = re.compile(r"<img [^>]*>")
    mute = [
        (path.name, image)
        for path in pages
        for image in images.findall(path.read_text())
        if not re.search(r'alt="(?!\.\./_images)[^"]', image)
    ]
    assert mute == []


def test_nothing_is_loaded_from_elsewhere(pages):
    url = r"=[\"']?(?:https?:)?//"
    pattern = re.compile(rf"<(?:script|img|iframe)[^>]+src{url}|<link[^>]+stylesheet[^>]+href{url}")
    assert [path.name for path in pages if pattern.search(path.read_text())] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_ran_without_error(smoke_book, notebook):
    cells = json.loads((smoke_book / f"executed/{notebook.split('/')[1]}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    assert code
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output["ename"] for output in outputs if output["output_type"] == "error"] == []


def test_table_cells_are_filled(html, pages):
    tables = {path: page.cells for path, page in pages.items() if page.cells}
    assert html / "book/build.html" in tables
    assert html / "notebooks/tables.html" in tables
    empty = {
        path.name: cells.count("")
        for path, cells in tables.items()
        if not all(cell.strip() for cell in cells)
    }
    assert empty == {}


def test_claims_and_numbers_can_be_saved(html):
    page = (html / "notebooks/tables.html").read_text()
    for name, column in {"claims.csv": "Verdict", "numbers.csv": "Record"}.items():
        (data,) = re.findall(rf'download="{name}" href="data:text/csv;charset=utf-8;base64,([^"]+)"', page)
        rows = list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))
        assert len(rows) > 40 and all(row[column] for row in rows)


def test_build_page_says_what_was_run(smoke_book, html):
    page = (html / "book/build.html").read_text()
    with open(smoke_book / "tables/provenance.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert "smoke" in {row["Profile"] for row in rows}
    for row in rows:
        assert row["Commit"] and row["Commit"] in page
        assert row["Profile"] in page


def test_the_user_guide_was_executed(html):
    """book/use.md is executed when the book is built, and a cell that fails stops the build: here, that it
    was, from the first picture to the last."""
    page = (html / "book/use.html").read_text()
    cells = re.findall(r"^```\{code-cell\}$", (ROOT / "book/use.md").read_text(), re.MULTILINE)
    assert page.count('class="cell_input') == len(cells) > 15
    assert page.count("<img") >= 2 and "Traceback" not in page
    assert "Largest difference" in page  # from deepinv, or from the record of it


@pytest.mark.long
def test_the_book_is_built_on_a_processor_with_avx512_alone():
    """Without bfloat16 arithmetic, which the fixture's AVX2 lacks as well."""
    build = build_smoke_book("build/smoke-avx512", "AVX512_CORE")
    assert (build / "html" / "index.html").exists()
    ask = "from flowlib.precision import bf16_pays; print('bfloat16' if bf16_pays() else 'float32')"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (build / "runs").rglob("record.json")]
    trained = [record["training"]["precision"] for record in found]
    assert trained and all(precision == [told.stdout.strip()] for precision in trained)


def test_downloaded_notebooks_have_no_roles(html):
    """Only the book knows what {eq} and {doc} stand for."""
    sources = list((html / "_sources").rglob("*.ipynb"))
    texts = [json.loads(path.read_text(encoding="utf-8"))["cells"] for path in sources]
    markdown = [
        "".join(cell["source"]) for cells in texts for cell in cells if cell["cell_type"] == "markdown"
    ]
    assert (
        len(markdown) > 100
        and [text for text in markdown if re.search(r"\{[\w:]+\}`|^\([\w-]+\)=", text)] == []
    )
    assert any("(10)" in text for text in markdown)


def test_the_search_finds_what_readers_look_for(html):
    text = (html / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {"licenc", "licens", "upload", "photo", "memori"} <= {*index["terms"], *index["titleterms"]}
