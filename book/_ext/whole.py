"""The whole book as one PDF, printed by a Chromium where there is one, and a link to it on each page."""

import posixpath
import re
import shutil
from html import escape
from pathlib import Path

from playwright.sync_api import Error, sync_playwright
from sphinx.util import logging

NAME = "flowlib-book.pdf"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu"]
BUTTON = "download-book-button"


def chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def offer(app, page, template, context, doctree):
    for button in context.get("header_buttons", []):
        if button.get("label") == "download-buttons" and chromium():
            whole = {"type": "link", "url": context["pathto"](NAME, 1), "icon": "fas fa-file-pdf"}
            whole |= {"text": "whole book .pdf", "tooltip": "Download the whole book", "label": BUTTON}
            button["buttons"].append(whole)


def reading_order(env):
    page = env.config.root_doc
    relations = env.collect_relations()
    while page:
        yield page
        page = relations.get(page, [None] * 3)[2]


def article(page, text):
    """A page's text; ids get the page's name, and links between pages become links inside one document."""

    def link(found):
        path, _, anchor = found[1].partition("#")
        if ":" in path:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else f"{page}.html"
        inside = f'href="#{target.removesuffix(".html")}:{anchor}"'
        return inside if target.endswith(".html") else "data-left-out"  # a file, which is not in the PDF

    text = re.search(r'<article class="bd-article">(.*)</article>', text, re.DOTALL)[1]
    text = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL).replace(' loading="lazy"', "")
    text = re.sub(r'\bid="([^"]*)"', rf'id="{page}:\1"', text)
    text = re.sub(r'\bhref="([^"]*)"', link, text)
    return f'<article class="bd-article" id="{page}:">{text}</article>'


def one_document(app):
    """All pages as one, beside the first; all lie one folder deep, so that paths to images stay right."""
    root, env = Path(app.outdir), app.env
    pages = list(reading_order(env))
    texts = {page: (root / f"{page}.html").read_text("utf-8") for page in pages}
    head = re.search(r"<head>.*</head>", texts[pages[0]], re.DOTALL)[0]
    head = re.sub(r"<script\b.*?</script>", "", head, flags=re.DOTALL)
    names = [(page, env.external_site_map[page].title or env.titles[page].astext()) for page in pages[1:]]
    contents = "".join(f'<li><a href="#{page}:">{escape(name)}</a></li>' for page, name in names)
    articles = [article(page, text) for page, text in texts.items()]
    articles.insert(1, f"<nav><h2>Contents</h2><ol>{contents}</ol></nav>")
    path = root / posixpath.dirname(pages[0]) / "whole.html"
    body = f'<body class="whole">{"".join(articles)}</body>'
    path.write_text(f'<!doctype html><html lang="en" data-theme="light">{head}{body}</html>', "utf-8")
    return path


def print_book(app, exception):
    if exception or app.builder.name != "html" or not chromium():
        return
    document = one_document(app)
    number = '<p style="font-size: 8px; text-align: center; width: 100%"><span class="pageNumber"></span></p>'
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            page = browser.new_page(color_scheme="light")
            page.goto(document.as_uri(), wait_until="load", timeout=120_000)
            page.pdf(
                path=Path(app.outdir) / NAME,
                format="A4",
                margin=dict.fromkeys(("top", "bottom", "left", "right"), "16mm"),
                display_header_footer=True,
                header_template="<span></span>",
                footer_template=number,
            )
            browser.close()
    except (Error, OSError) as error:  # a book without its PDF is a book
        logging.getLogger(__name__).info("the book was not printed: %s", error)
        for path in Path(app.outdir).rglob("*.html"):
            text = path.read_text("utf-8")
            path.write_text(re.sub(rf"<li>\s*<a [^>]*{NAME}.*?</li>", "", text, flags=re.DOTALL), "utf-8")
    finally:
        document.unlink()


def setup(app):
    app.connect("html-page-context", offer, priority=502)  # after the theme's own buttons
    app.connect("build-finished", print_book, priority=900)  # what formulas are set in
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
