"""What the paper's tables cost on a card: images a second of recorded trainings, and the runs of a table."""

from companion.experiment import Experiment
from companion.settings import METHODS, PROFILES, Run

# The trainings that a table of the paper needs; other tables test solvers that are trained already.
TABLES = {
    ("v2", "I"): ("resnet", "resnet-denoiser", "unet", "unet-denoiser", "glow"),
    ("v2", "II"): ("glow-frozen",),
    ("v1", "I"): ("resnet", "unet", "glow"),
    ("v1", "III"): ("glow-scratch",),
}


def throughput(records: list[dict]) -> dict[str, dict]:
    """For each network of the paper's size the recorded training on a GPU that was fastest, with "rate":
    images a second and fold; of a flow's pre-training, under "flow", images a second."""
    paper, found = PROFILES["paper"], {}
    for record in records:
        training, settings = record.get("training"), record.get("settings", {})
        if not training or "thread" in record["trained"]["hardware"]:
            continue
        network = settings["network"]
        if settings["config"] != getattr(paper, "flow" if network == "glow" else network):
            continue
        rate = training["images_seen"] * (settings.get("num_folds") or 1) / training["seconds"]
        if rate > found.get(network, {"rate": 0})["rate"]:
            found[network] = record | {"rate": rate}
    return found


def images(run: Run) -> int:
    return run.training.num_steps * run.training.batch_size


def hours(run: Run, rates: dict[str, dict]) -> float:
    """Hours of one card for one training, without evaluations. KeyError if its network was never trained at
    the paper's size on a card."""
    return images(run) * (run.num_folds or 1) / rates[run.network]["rate"] / 3600


def trainings(edition: str, table: str, dataset: str = "celeba") -> list[Run]:
    """The solvers of one table in the profile `paper`."""
    experiment = Experiment("paper", dataset, edition)
    of_table = TABLES[edition, table]
    runs = experiment.runs().values()
    return [run for run in runs if run.method in of_table and METHODS[run.method].num_folds is None]


def starts(runs: list[Run]) -> list[Run]:
    """The runs that these start from, each once: a flow serves all solvers."""
    found = {}
    for run in runs:
        start = run.start
        while start:
            found[start.settings_hash] = start
            start = start.start
    return list(found.values())


def finished_after(hours_of_runs: list[float], num_cards: int) -> float:
    """Hours until the last of these is done, if a free card takes the longest run left."""
    cards = [0.0] * num_cards
    for duration in sorted(hours_of_runs, reverse=True):
        cards[cards.index(min(cards))] += duration
    return max(cards)
