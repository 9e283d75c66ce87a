"""The icons that the theme uses, as small fonts. As it comes, the theme loads all of Font Awesome: a script
of 1.5 MB and fonts of 0.3 MB."""

import re
from pathlib import Path

import pydata_sphinx_theme
import sphinx_book_theme
from fontTools import subset

THEMES = [Path(theme.__file__).parent for theme in (pydata_sphinx_theme, sphinx_book_theme)]
AWESOME = next(THEMES[0].rglob("fontawesome/*/css/all.min.css")).parents[1]
FONTS = ("fa-solid-900", "fa-regular-400", "fa-brands-400")


def used():
    """Names of the icons in the themes' templates and code, and code points in their style sheets."""
    files = [path for theme in THEMES for path in theme.rglob("*") if "fontawesome" not in path.parts]
    code = "".join(path.read_text("utf-8") for path in files if path.suffix in (".html", ".py"))
    css = "".join(path.read_text("utf-8") for path in files if path.suffix == ".css")
    names = {*re.findall(r"\bfa-([a-z-]+)", code), "github", "gitlab", "bitbucket"}
    return names, set(re.findall(r"\\(f[0-9a-f]{3})\b", css))


def write_icons(app):
    """icons.css and its fonts, beside the book's other static files."""
    names, points = used()
    folder = Path(app.outdir) / "_static/icons"
    folder.mkdir(parents=True, exist_ok=True)
    css = (AWESOME / "css/all.min.css").read_text("utf-8")
    rules = []
    for selectors, body in re.findall(r"([^{}]+)(\{[^{}]*\})", css):
        point = re.fullmatch(r'\{content:"\\([0-9a-f]+)"\}', body)
        if point and not names & set(re.findall(r"\.fa-([a-z0-9-]+):", selectors)):
            continue
        points |= {point[1]} if point else set()
        if "@font-face" not in selectors:
            rules.append(selectors + body)
        elif "Awesome\\ " in body:  # by the names of versions 5 and 6, which the themes use
            body = re.sub(r"url\(\.\./webfonts/([\w-]+)\.woff2\).*(?=\})", r"url(\1.woff)", body)
            rules.append(selectors + body)
    (folder / "icons.css").write_text("".join(rules), "utf-8")
    for name in FONTS:
        options = subset.Options(flavor="woff", notdef_outline=True)
        font = subset.load_font(str(AWESOME / f"webfonts/{name}.ttf"), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=[int(point, 16) for point in points])
        subsetter.subset(font)
        subset.save_font(font, str(folder / f"{name}.woff"), options)


def write_at_end(app, exception):
    if exception is None and app.builder.format == "html":
        write_icons(app)


def setup(app):
    app.add_css_file("icons/icons.css")
    app.connect("build-finished", write_at_end)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
