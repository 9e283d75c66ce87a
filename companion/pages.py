"""The book's notebook pages: which notebook, with which parameters, and the runs that it makes."""

from dataclasses import dataclass, field

from companion.experiment import Experiment
from companion.settings import METHODS, Run

PLAIN = (
    "data",
    "flow",
    "solver",
    "figures",
    "engine",
    "stability",
    "folds",
    "recipe",
    "map",
    "scale",
    "speed",
    "classical",
    "crops",
    "blur",
    "explorer",
    "tables",
    "paper_tables",
    "fairness",
)
SHOWN_TASKS = (
    "denoising",
    "inpainting",
    "deblurring",
)  # the contents, _toc.yml, are the same for both editions


@dataclass(frozen=True)
class Page:
    """notebook: its name; parameters: its own; runs: those that it trains if missing; about: an addition to
    its heading, where one notebook makes several pages."""

    notebook: str
    parameters: dict = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    about: str = ""


def pages(experiment: Experiment) -> dict[str, Page]:
    """All pages of a book, by name. Those without runs show other pages' runs."""
    found = {name: Page(name) for name in PLAIN}
    found["pretrain_flow"] = Page("pretrain_flow", {}, (experiment.flow(),), "clean images")
    noisy = (experiment.flow(noisy=True),)
    found["pretrain_flow-noisy"] = Page("pretrain_flow", {"noisy": True}, noisy, "noisy images")
    for task in SHOWN_TASKS:
        methods = experiment.methods(task)

        def runs(*names, task=task, methods=methods):
            return tuple(experiment.solver(task, name) for name in names if name in methods)

        def page(notebook, runs=(), task=task):
            return Page(notebook, {"task": task}, runs, task)

        compared = [m for m in methods if not METHODS[m].frozen and m != "glow-scratch"]
        found[f"in_distribution-{task}"] = page("in_distribution", runs(*compared))
        found[f"plug_and_play-{task}"] = page("plug_and_play", runs("glow", "glow-frozen"))
        ablated = ()
        if experiment.names["edition"] in METHODS["glow-scratch"].editions:
            ablated = tuple(experiment.solver(task, name) for name in ("glow", "glow-scratch"))
        found[f"pretraining_ablation-{task}"] = page("pretraining_ablation", ablated)
        for name in ("ood_measurements", "ood_images"):
            found[f"{name}-{task}"] = page(name)
    return found
