"""The book as a reader on the web meets it: what pages say of themselves, weigh, and offer to everybody."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from functools import partial
from http.server import ThreadingHTTPServer

import pytest
import yaml

from tests.conftest import CHROMIUM, ROOT, QuietHandler

PDF = "flowlib-book.pdf"
with_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="session")
def html(smoke_book):
    return smoke_book / "html"


@pytest.fixture(scope="session")
def names(html):
    return sorted(p.relative_to(html).as_posix() for p in html.rglob("*.html") if "_static" not in p.parts)


def test_each_page_has_one_title_one_heading_and_a_description_of_its_own(html, names):
    found = {}
    for name in names:
        text = (html / name).read_text()
        assert len(re.findall(r"<title\b", text.split("<svg")[0])) == 1, name
        assert len(re.findall(r"<h1\b", text)) == 1, name
        described = re.findall(
            r'<meta (?:content="([^"]+)" )?name="description"(?: content="([^"]+)")?', text
        )
        assert len(described) == 1, name
        found[name] = "".join(described[0])
        assert len(found[name]) > 20, name
    assert len(set(found.values())) == len(found)


def test_hosts_that_run_jekyll_leave_the_underscored_folders_alone(html):
    assert (html / ".nojekyll").is_file()


def test_pdf_of_the_whole_book(html):
    assert (html / PDF).is_file() == (CHROMIUM is not None)
    page = (html / "notebooks/tables.html").read_text()
    assert (f'href="../{PDF}"' in page) == (CHROMIUM is not None)
    if CHROMIUM:
        assert (html / PDF).read_bytes().count(b"/Type /Page\n") > 40


CUT = """() => [...document.querySelectorAll("article table.table")].flatMap((table) => {
  const box = table.closest(".pst-scrollable-table-container, .text_html") ?? table.parentElement;
  const right = Math.min(box.getBoundingClientRect().right, innerWidth) + 1;
  const ours = [...table.tHead.rows[0].cells].find((cell) => cell.textContent.startsWith("Ours, dB"));
  const seen = innerWidth > 1000 ? table : ours;
  return seen && seen.getBoundingClientRect().right > right ? [table.caption?.textContent.trim()] : [];
})"""
CODE = """() => {
  document.querySelectorAll("article details").forEach((hidden) => (hidden.open = true));
  return [...document.querySelectorAll("article .cell_input pre")]
    .filter((code) => code.scrollWidth > code.clientWidth + 1).map((code) => code.textContent.slice(0, 200));
}"""
STRETCHED = """async () => {
  const images = [...document.querySelectorAll("article img")];
  images.forEach((image) => (image.loading = "eager"));
  await Promise.all(images.map((image) => image.decode().catch(() => {})));
  return images.filter((image) => image.width && Math.abs(image.width / image.height /
    (image.naturalWidth / image.naturalHeight) - 1) > 0.02).map((image) => image.src);
}"""
SERIOUS = """async (options) => (await axe.run({...options, resultTypes: ["violations"]})).violations
  .filter((rule) => ["serious", "critical"].includes(rule.impact))
  .map((rule) => [rule.id, rule.nodes[0].html.slice(0, 200)])"""


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The script, or None without npm or a network."""
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts"]
    command.append("axe-core@4.14.1")
    if not shutil.which("npm") or subprocess.run(command, cwd=folder, capture_output=True).returncode:
        return None
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.fixture(scope="module")
def seen(browser, site, names, axe):
    """{what is measured: {page: found}}: each page is opened once, on a laptop, then shown in the dark, then
    as on a telephone."""
    found = defaultdict(dict)

    def look(page, name, width):
        found["cut", width][name] = page.evaluate(CUT)
        found["too wide", width][name] = page.evaluate("document.documentElement.scrollWidth") > width
        found["stretched", width][name] = page.evaluate(STRETCHED)

    for name in set(names) - {"index.html"}:  # which only forwards
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page = context.new_page()
        network, sizes = context.new_cdp_session(page), []
        network.send("Network.enable")
        network.on("Network.loadingFinished", lambda event, to=sizes: to.append(event["encodedDataLength"]))
        page.goto(site + name, wait_until="load")
        page.wait_for_selector("main h1")
        page.wait_for_load_state("networkidle", timeout=90_000)
        found["bytes"][name] = sum(sizes)
        look(page, name, 1280)
        if axe and not name.endswith(("-denoising.html", "-deblurring.html")):  # like those of inpainting
            page.evaluate(axe)
            found["serious", "light"][name] = page.evaluate(SERIOUS, {})
            page.emulate_media(color_scheme="dark")
            page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
            page.wait_for_timeout(500)  # colours fade
            found["serious", "dark"][name] = page.evaluate(SERIOUS, {"runOnly": ["color-contrast"]})
        found["code"][name] = page.evaluate(CODE)
        page.set_viewport_size({"width": 390, "height": 900})
        look(page, name, 390)
        context.close()
    return found


def nonempty(found):
    return {name: what for name, what in found.items() if what}


@with_browser
def test_no_page_is_heavy(seen):
    """Bytes that come over the wire when a page is opened. The explorer brings its models."""
    weights = {name: size for name, size in seen["bytes"].items() if name != "notebooks/explorer.html"}
    assert {name: size for name, size in weights.items() if size > 1.5e6} == {}
    assert min(weights.values()) > 1e4


@with_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_tables_are_not_cut(seen, width):
    """All columns on a laptop; on a telephone those up to ours."""
    assert nonempty(seen["cut", width]) == nonempty(seen["too wide", width]) == {}


@with_browser
def test_code_is_not_cut(seen):
    assert nonempty(seen["code"]) == {}


@with_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_images_keep_their_shape(seen, width):
    assert nonempty(seen["stretched", width]) == {}


@with_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(seen, axe, theme):
    if not axe:
        pytest.skip("npm did not bring axe-core")
    assert nonempty(seen["serious", theme]) == {}


@with_browser
def test_the_book_works_under_any_path(browser, html, tmp_path):
    (tmp_path / "some/sub").mkdir(parents=True)
    (tmp_path / "some/sub/path").symlink_to(html)
    problems = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/some/sub/path/"
        page = browser.new_page()
        page.on("response", lambda answer: answer.ok or problems.append(answer.url))
        page.on("request", lambda request: request.url.startswith((address, "data:", "blob:"))
                or request.url.endswith("/favicon.ico") or problems.append(request.url))  # fmt: skip
        page.on("pageerror", lambda error: problems.append(str(error)))
        for path in (
            "",
            "notebooks/in_distribution-inpainting.html",
            "notebooks/explorer.html",
            "search.html",
        ):
            page.goto(address + path)
            page.wait_for_selector("main h1")
            page.wait_for_load_state("networkidle", timeout=90_000)
        page.goto(address)
        page.wait_for_url(address + "book/index.html")
        page.close()
        server.shutdown()
    assert problems == []


def test_a_notebook_alone_says_what_it_needs(html, tmp_path):
    """In a Python that has nothing but its own library."""
    downloads = sorted((html / "_sources/notebooks").glob("*.ipynb"))
    assert len(downloads) > 20
    for path in downloads:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        (tmp_path / "alone.py").write_text(code, encoding="utf-8")
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-S", "alone.py"]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert "make environment" in done.stderr.splitlines()[-1], path.name


NOTEBOOK = {
    "cells": [
        {
            "cell_type": "markdown",
            "id": "a",
            "metadata": {},
            "source": [
                "# A page\n\nOf $x^2$.\n",
                "In {doc}`../book/index`, {eq}`eq-one` and {doc}`its words <../book/index>`.",
            ],
        }
    ],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.mark.parametrize(
    ("address", "programs"), [("", True), ("https://github.com/me/flowlib", False)], ids=["nowhere", "github"]
)
def test_a_small_book(tmp_path, address, programs):
    """With an address and without; with node and Chromium where this machine has them, and without."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["config"]["html_theme_options"]["repository_url"] = address
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    (tmp_path / "extra").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    toc = {
        "format": "jb-book",
        "root": "book/index",
        "chapters": [{"file": "notebooks/ood_images-denoising"}],
    }
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    (tmp_path / "book/index.md").write_text(
        "# A book\n\nThe first words.\n\n$$ x $$ (eq-one)\n", encoding="utf-8"
    )
    (tmp_path / "notebooks/ood_images-denoising.ipynb").write_text(json.dumps(NOTEBOOK), encoding="utf-8")
    code = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", ".", "-W", "-n", "--keep-going"]
    path = os.environ["PATH"] if programs else ""
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    built = tmp_path / "_build/html"
    page = (built / "notebooks/ood_images-denoising.html").read_text()
    assert 'content="A page: Of' in page
    binder = "https://mybinder.org/v2/gh/me/flowlib/main?urlpath=lab/tree/notebooks/ood_images.ipynb"
    assert (binder in page) == bool(address)
    assert (f'href="{address}"' in page) == bool(address)
    assert ("mybinder" in page) == ("fa-rocket" in page) == ("github.com/me" in page) == bool(address)
    (cell,) = json.loads((built / "_sources/notebooks/ood_images-denoising.ipynb").read_text("utf-8"))[
        "cells"
    ]
    assert cell["source"].endswith("\nIn A book, (1) and its words.")  # no roles in what a reader downloads
    set_at_build = programs and bool(shutil.which("node"))
    assert ("<mjx-container" in page) == set_at_build
    assert ("tex-svg-full.js" in page) != set_at_build
    assert (PDF in page) == (built / PDF).is_file() == (programs and CHROMIUM is not None)
