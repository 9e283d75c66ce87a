"""Makes the built pages work without a network and without errors in the browser's console."""


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
    app.connect("config-inited", drop_thebe)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
