"""Makes the built pages work without a network and without errors in the browser's console."""

from pathlib import Path

import mathjax  # from django-static-mathjax: a plain copy of MathJax's files

MATHJAX = Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg-full.js"


def serve_mathjax(app, config):
    """Serve MathJax from the book; the SVG build is one file, fonts included."""
    config.html_static_path.append(str(MATHJAX))
    config.mathjax_path = MATHJAX.name


def drop_thebe(app, config):
    """Jupyter Book always loads sphinx-thebe, which declares one constant twice on each page: a script error.

    The book has no live-code button, so nothing of it is needed.
    """
    for event, listeners in app.events.listeners.items():
        app.events.listeners[event] = [
            listener for listener in listeners if not listener.handler.__module__.startswith("sphinx_thebe")
        ]
    app.registry.css_files = [(name, kw) for name, kw in app.registry.css_files if "thebe" not in name]


def setup(app):
    app.connect("config-inited", serve_mathjax)
    app.connect("config-inited", drop_thebe)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
