"""How quickly the explorers answer: the live one in a kernel, and the page in a headless Chromium, from its
load to the first answer of the solver and from a slider's event to the next.

Run after make book: python benchmarks/explorer.py --profile demo"""

import argparse
import shutil
import statistics
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import torch
from playwright.sync_api import sync_playwright

from companion.experiment import Experiment
from companion.explorer.live import Explorer
from companion.files import write_json
from companion.paths import RESULTS
from companion.provenance import provenance
from companion.settings import EDITIONS, PROFILES

# Moves the factor of μ, and says how long the answer took in milliseconds.
MOVE = """async (value) => {
  const explorer = document.querySelector(".flow-explorer").explorer, slider = explorer.common.mu.input;
  const start = performance.now();
  slider.value = value;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  while (explorer.result?.generation !== explorer.generation) await new Promise((resolve) =>
  setTimeout(resolve, 1)); return performance.now() - start;
}"""
READY = "() => document.querySelector('.flow-explorer')?.explorer?.result && performance.now()"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def summary(values):
    return {
        "median": statistics.median(values),
        "largest": max(values),
        "values": [round(v, 1) for v in values],
    }


def in_kernel(experiment, repeats):
    """Milliseconds of an update for every trained solver: the reconstruction, all panels and the plot."""
    explorer, times = Explorer(experiment), {}
    for task, label in [(task, label) for task, labels in explorer.solvers.items() for label in labels]:
        explorer.task.value = task
        explorer.method.label = label
        values = []
        for i in range(repeats):
            start = time.perf_counter()
            explorer.scale.value = 0.8 + 0.01 * i
            values.append(1000 * (time.perf_counter() - start))
        times[f"{task}: {label}"] = summary(values)
    return times


def in_browser(html, repeats):
    """Milliseconds from the page's load to the first answer of the live solver, in a browser that has seen
    nothing yet, and of the answers that follow."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ready, updates = [], {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        for _ in range(5):
            page = browser.new_context().new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/notebooks/explorer.html")
            ready.append(page.wait_for_function(READY, polling=20, timeout=60_000).json_value())
        for task in page.locator(".tasks input").all():
            task.check(force=True)
            page.wait_for_selector(".flow-explorer.is-live")
            page.evaluate(MOVE, 0.9)  # the first run of a graph compiles it
            values = [page.evaluate(MOVE, 0.8 + 0.01 * i) for i in range(repeats)]
            updates[task.get_attribute("value")] = summary(values)
        browser.close()
    server.shutdown()
    return {"ready": summary(ready), "update": updates}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="demo", choices=PROFILES)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--edition", default="v2", choices=EDITIONS)
    parser.add_argument("--build", default="build")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    experiment = Experiment(args.profile, args.dataset, args.edition, build=args.build)
    record = {
        "experiment": experiment.names,
        "threads": torch.get_num_threads(),
        "kernel_ms": in_kernel(experiment, args.repeats),
        "browser_ms": in_browser(experiment.build / "html", args.repeats),
        **provenance(),
    }
    for where in ("kernel_ms", "browser_ms"):
        print(where, record[where])
    write_json(RESULTS / "benchmarks" / f"explorer-{args.profile}.json", record)


if __name__ == "__main__":
    main()
