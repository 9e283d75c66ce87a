import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from companion.locks import locked

ROOT = Path(__file__).resolve().parents[1]
SMOKE_BUILD = "build/smoke-book"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


OF_THE_BOOK = {f"tests/test_{name}.py" for name in ("book", "browser", "explorer_page")}


def pytest_xdist_make_scheduler(config, log):
    """Two processes share the files of tests. Those that would wait for the book go to the one that makes it;
    test_web.py comes late, and finds it made."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "book" if file in OF_THE_BOOK else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def smoke_book():
    """The folder of the whole book, built from nothing at the smoke profile as `make book` does it; once for
    all processes of these tests."""
    made, run = ROOT / "build/smoke-book-of", os.environ.get("PYTEST_XDIST_TESTRUNUID", "")
    with locked(ROOT / "build/smoke-book.lock", "the other process makes the book"):
        if not run or not made.exists() or made.read_text() != run:
            build_smoke_book(SMOKE_BUILD, "AVX2")  # as on processors without AVX-512
            made.write_text(run)
    return ROOT / SMOKE_BUILD


def build_smoke_book(build, isa):
    """Its folder, made by a processor whose instructions end with these."""
    shutil.rmtree(ROOT / build, ignore_errors=True)
    command = [sys.executable, "-m", "companion", "book", "--profile", "smoke", "--build", build]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, **options)
    assert done.returncode == 0, done.stdout[-8000:]
    return ROOT / build


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def site(smoke_book):
    """Address of the book on a local server."""
    handler = partial(QuietHandler, directory=smoke_book / "html")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")  # no longer: while it lives, its event loop runs in this thread
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
