"""Sets the formulas when the book is built, where there is node: pages then need no MathJax, which is 2.3 MB.
Elsewhere MathJax, served with the book, does it in the reader's browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import mathjax  # from django-static-mathjax: a plain copy of MathJax's files
from sphinx.util import logging

MATHJAX = Path(mathjax.__file__).parent / "static/mathjax/es5"
IN_BROWSER = "tex-svg-full.js"  # one file, fonts included
# What Sphinx writes inside elements of the class math.
FORMULA = re.compile(
    r'(<(?:span|div) class="[^"]*\bmath notranslate[^>]*>\s*(?:<span class="eqno">.*?</a></span>)?)'
    r"(?:\\\((?P<inline>.+?)\\\)|\\\[(?P<display>.+?)\\\]|(?P<raw>\\begin\{(\w+\*?)\}.+?\\end\{\5\}))",
    re.DOTALL,
)
SCRIPTS = re.compile(
    rf"<script>window\.MathJax = .*?</script>\s*|<script [^>]*{re.escape(IN_BROWSER)}[^>]*></script>\s*"
)


def serve_mathjax(app, config):
    config.html_static_path.append(str(MATHJAX / IN_BROWSER))
    config.mathjax_path = IN_BROWSER


def formula(found):
    return unescape(found["inline"] or found["display"] or found["raw"]), not found["inline"]


def typeset(app, exception):
    if exception or app.builder.format != "html" or not shutil.which("node"):
        return
    root = Path(app.outdir)
    pages = {path: path.read_text("utf-8") for path in root.rglob("*.html") if "_static" not in path.parts}
    formulas = sorted({formula(found) for text in pages.values() for found in FORMULA.finditer(text)})
    command = ["node", str(Path(__file__).with_name("typeset.cjs")), str(MATHJAX)]
    done = subprocess.run(command, input=json.dumps(formulas), capture_output=True, encoding="utf-8")
    if done.returncode or "<mjx-merror" in done.stdout:
        logging.getLogger(__name__).info("formulas are left to the browser: %s", done.stderr[-500:])
        return
    answer = json.loads(done.stdout)
    html = dict(zip(formulas, answer["html"]))
    folder = root / "_static/mathematics"
    folder.mkdir(exist_ok=True)
    (folder / "mathematics.css").write_text(answer["css"], "utf-8")
    for name in set(re.findall(r"MathJax_[\w-]+\.woff", answer["css"])):
        shutil.copy(MATHJAX / "output/chtml/fonts/woff-v2" / name, folder)
    for path, text in pages.items():
        if not SCRIPTS.search(text):
            continue
        up = "../" * (len(path.relative_to(root).parts) - 1)
        sheet = f'<link rel="stylesheet" href="{up}_static/mathematics/mathematics.css" />\n'
        sheet *= bool(FORMULA.search(text))
        text = FORMULA.sub(lambda found: found[1] + html[formula(found)], text)
        path.write_text(SCRIPTS.sub("", text).replace("</head>", sheet + "</head>", 1), "utf-8")


def setup(app):
    app.connect("config-inited", serve_mathjax)
    app.connect("build-finished", typeset)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
