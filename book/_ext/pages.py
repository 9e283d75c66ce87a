"""What a page has beside its text: a description, buttons that fit, images that load when they are seen."""

import re
from html import escape
from pathlib import Path
from textwrap import shorten

import imagesize
from docutils import nodes


def show_buttons_with_a_repository(app, config):
    """The address of the repository, one line of _config.yml, turns on all buttons that lead there."""
    options = config.html_theme_options
    there = bool(options.get("repository_url"))
    options |= {"use_repository_button": there, "use_issues_button": there}
    if not there:
        options.pop("launch_buttons", None)


def fit_buttons(app, page, template, context, doctree):
    """Launch the notebook that a page is made from: in_distribution.ipynb for in_distribution-denoising."""
    for button in context.get("header_buttons", []):
        if button.get("label") == "launch-buttons":
            for launch in button["buttons"]:
                launch["url"] = re.sub(r"(notebooks/\w+)-\w+\.ipynb", r"\1.ipynb", launch["url"])


def describe(app, page, template, context, doctree):
    """A title and a description that no other page has: the name in the contents, and the first words.
    Pages that are made from one notebook share its heading."""
    item, titles = app.env.external_site_map.get(page), app.env.titles
    if item and item.title:
        context["title"] = item.title
    if 'name="description"' in (context.get("metatags") or ""):
        return
    name = (item and item.title) or (titles[page].astext() if page in titles else page)
    paragraphs = doctree.findall(nodes.paragraph) if doctree else []
    book = titles[app.config.root_doc].astext()
    first = next((p.astext() for p in paragraphs if isinstance(p.parent, nodes.section)), book)
    text = escape(shorten(f"{name}: {first}", 160, placeholder=" …"))
    context["metatags"] = (context.get("metatags") or "") + f'<meta name="description" content="{text}" />'


def load_images_late(app, page, template, context, doctree):
    """With their sizes, so that nothing moves when they come."""
    sources = {name: Path(app.srcdir) / path for path, name in app.builder.images.items()}

    def late(image):
        source = sources.get(image[1].rpartition("/")[2])
        if "loading=" in image[0] or source is None or "width" in image[0]:
            return image[0]
        width, height = imagesize.get(source)
        return image[0].replace("<img ", f'<img loading="lazy" width="{width}" height="{height}" ', 1)

    if context.get("body"):
        context["body"] = re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', late, context["body"])


def correct_roles(app, page, template, context, doctree):
    """docutils writes a role that ARIA has given up, MyST-NB a label that hides what is to be read, the theme
    tables that a keyboard cannot scroll."""
    body = (context.get("body") or "").replace('role="doc-biblioentry"', 'role="listitem"')
    body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    container = '<div class="pst-scrollable-table-container"'
    context["body"] = body.replace(container, f'{container} tabindex="0"')


def name_toggles(app, page, template, context, doctree):
    """The theme opens a group of the contents by an arrow that has no name to read aloud."""
    contents = context["generate_toctree_html"]
    toggle = re.compile(r"(<a [^>]*>([^<]*)</a><details[^>]*><summary)>")
    name = r'\1 aria-label="Pages of: \2">'
    context["generate_toctree_html"] = lambda *args, **options: toggle.sub(
        name, str(contents(*args, **options))
    )


def setup(app):
    app.connect("config-inited", show_buttons_with_a_repository)
    for step in (describe, load_images_late, correct_roles):
        app.connect("html-page-context", step)
    for step in (fit_buttons, name_toggles):
        app.connect("html-page-context", step, priority=502)  # after the theme's own
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
