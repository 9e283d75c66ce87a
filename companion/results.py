"""All results as two tidy tables: `runs` has one row a record, `measurements` one row an image of an
evaluation. It decides, once for all pages and files, which runs are compared and how each of the paper's
claims came out."""

import functools
from collections import namedtuple
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import pandas as pd

from companion import records
from companion.links import record_of
from companion.paths import RESULTS
from companion.settings import METHODS, PROFILES, TASKS
from companion.statistics import holm, interval, over_images_and_seeds, spread_of_seeds
from flowlib import Blur

SETTING = ["profile", "dataset", "edition", "name"]  # of one setting there may be several seeds
CPU = "a CPU core"
PAPER = pd.read_csv(RESULTS / "paper.csv")
CLAIMS = pd.read_csv(RESULTS / "claims.csv", keep_default_na=False)
PAPER_TABLES = [(e, table) for e in ("v2", "v1") for table in sorted(set(CLAIMS.table[CLAIMS.edition == e]))]


def paper_table(table: str, edition: str) -> dict:
    """{(task, method): PSNR in dB} of one of the paper's tables."""
    rows = PAPER[(PAPER.table == table) & (PAPER.edition == edition)]
    return {(r.task, r.method): r.psnr_db for r in rows.itertuples()}


def tasks_of(table: str, edition: str) -> list[str]:
    return list(dict.fromkeys(task for task, _ in paper_table(table, edition)))


def claims_of(table: str, edition: str) -> pd.DataFrame:
    """The orders of two methods that the paper draws conclusions from in one of its tables."""
    return CLAIMS[(CLAIMS.table == table) & (CLAIMS.edition == edition)]


def evaluation_of(table: str, edition: str, task: str) -> str:
    """The evaluation that one of the paper's tables is about. Inpainting of measurements out of distribution
    is as the paper words it: only the last fold knows of the other hole (book/choices.md)."""
    evaluation = claims_of(table, edition).evaluation.iloc[0]
    return evaluation + "_last_fold" * ((evaluation, task) == ("ood_measurements", "inpainting"))


def repeats(task: str, evaluation: str) -> bool:
    """Whether a setting out of distribution is within 1 % of the training setting, as blurs of 3 taps with
    σ_b 5 and 8 are."""
    if evaluation != "ood_measurements" or TASKS[task].operator is not Blur:
        return False
    usual, other = (TASKS[task].make_operator(64, **c).kernel for c in ({}, TASKS[task].ood_parameters))
    return bool((other - usual).abs().max() < 0.01 * usual.max())


def page_of(table: str, edition: str, task: str) -> str:
    """The page of the experiment behind one of the paper's tables, for a task."""
    return f"../notebooks/{claims_of(table, edition).page.iloc[0]}-{TASKS[task].kind}"


def machine(record: dict, what: str = "trained") -> str:
    """The machine on which a run was "trained" or "evaluated", in short."""
    hardware = record[what]["hardware"]
    return CPU if "thread" in hardware else hardware.removeprefix("NVIDIA ").split(" 80GB")[0]


def minutes(record: dict, row: dict | None = None) -> float:
    """Minutes of a training, or until a row of its history: processor time if counted, as other work on the
    machine does not lengthen it; clock time on a GPU."""
    row = record["training"] if row is None else row
    return (machine(record) == CPU and row.get("cpu_seconds") or row["seconds"]) / 60


class Restart(NamedTuple):
    """A training that went back to its best weights. needless: its training loss was as before, so only
    BatchNorm's averages had exploded in validation (book/choices.md)."""

    step: int
    needless: bool


def _restarts(training):
    losses = {row["step"]: row["loss"] for row in training.get("history", ())}
    for restart in training.get("restarts") or ():
        before = [loss for step, loss in losses.items() if step < restart["step"] and loss]
        now = losses.get(restart["step"])
        yield Restart(restart["step"], bool(before and now and now < 1.5 * before[-1]))


def _history(record):
    """A row a validation: step, images_seen, loss, val_loss, minutes, and, of a solver, its quality in dB."""
    history = record["training"].get("history", ())
    history = pd.DataFrame([h | {"minutes": minutes(record, h)} for h in history])
    if len(history):
        history["dB"] = -10 * np.log10(history.val_loss.astype(float))
    return history


class Score(NamedTuple):
    """One evaluation, over the images whose PSNR is finite: its mean, half the width of its 95 % interval
    (Student's t), the worst PSNR, the mean SSIM, and the numbers of finite PSNRs and of all images."""

    mean: float
    half_width: float
    worst: float
    ssim: float
    finite: int
    images: int


def _scores(measurements, by):
    """{values of the columns `by`: {evaluation: Score}}."""
    columns = dict(mean=("psnr", "mean"), std=("psnr", "std"), worst=("psnr", "min"), ssim=("ssim", "mean"))
    columns |= dict(finite=("psnr", "count"), images=("psnr", "size"))
    found = {}
    for (*key, evaluation), row in measurements.groupby([*by, "evaluation"]).agg(**columns).iterrows():
        score = Score(
            row["mean"],
            interval(row["std"], row.finite),
            row.worst,
            row.ssim,
            int(row.finite),
            int(row.images),
        )
        found.setdefault(tuple(key), {})[evaluation] = score
    return found


def load(found: Iterable[dict] | None = None, of_build: bool = False) -> "Results":
    """The results in these records, by default those that are kept with the code; of_build: they are this
    build's own, and links lead to them."""
    found = records.recorded() if found is None else list(found)
    parts = [part for record in found for part in _measurements(record)]
    measurements = pd.concat(parts) if parts else pd.DataFrame(columns=[*SETTING, "seed", *COLUMNS])
    scores = _scores(measurements, [*SETTING, "seed"])
    return Results(frame(_run(r, of_build, scores) for r in found), measurements)


COLUMNS = ["task", "method", "evaluation", "image", "psnr", "ssim"]


def _key(record):
    return {name: record["experiment"].get(name, record["name"]) for name in SETTING}


def _measurements(record):
    """Tables of what was measured of each image: the estimate, the measurement itself, and estimates out of
    distribution."""
    parts = {"test": record, "measurement": {"psnr": record.get("psnr_measurement")}}
    parts |= {key: part for key, part in record.items() if key.startswith("ood_") and part}
    about = _key(record) | {name: record.get(name) for name in ("task", "method")}
    about["seed"] = record["experiment"]["seed"]
    for evaluation, part in parts.items():
        if part.get("psnr"):
            quantities = [key for key in ("psnr", "ssim") if part.get(key)]
            values = {key: np.array(part[key]["values"], dtype=float) for key in quantities}
            image = range(len(values["psnr"]))
            yield pd.DataFrame(about | {"evaluation": evaluation, "image": image, "ssim": np.nan} | values)


# The columns of `runs` that are copied from a record, and from where.
IN_RECORD = dict(kind="kind", task="task", method="method", seed="experiment.seed", start="settings.start")
IN_RECORD |= dict(settings_hash="settings_hash", lr="settings.training.lr", pixels="data.pixels_sha256")
IN_RECORD |= dict(train_images="data.split.train", images_seen="training.images_seen", steps="training.steps")
IN_RECORD |= dict(best_step="training.best_step", best_val_loss="training.best_val_loss", folds="folds")
IN_RECORD |= dict(parameters="num_parameters", gflop="gflop_per_image", parameter="parameter")
IN_RECORD |= dict(milliseconds="milliseconds_per_image")
DERIVED = ["minutes", "machine", "evaluated_on", "made", "restarts", "history", "record", "scores", "seeds"]


class Run(namedtuple("Run", [*SETTING, *IN_RECORD, *DERIVED])):
    """A row of `runs`; missing values are None. start: the settings_hash of the run that it started
    from; parameter: of a classical method; made: commit, hardware and date; history: a frame; restarts: of
    Restart; scores: {evaluation: Score}; seeds: the rows of all seeds, only in `settings`."""

    @property
    def psnr(self) -> float:
        """On test images; NaN if it was not evaluated."""
        return self.scores["test"].mean if "test" in self.scores else np.nan

    @property
    def overfitting(self) -> float:
        """The ratio of the best validation error to the error on its last training batches."""
        return self.best_val_loss / self.history.loss[-3:].mean()

    @property
    def not_finite(self) -> bool:
        """Whether a number of one of its folds is not finite."""
        return any(value is None for fold in self.folds for value in fold.values())

    def folds_where(self, less: str, more: str | None = None) -> list[int]:
        """Numbers of the folds in which one quantity is below another, or below zero."""
        folds = enumerate(self.folds, start=1)
        return [k for k, fold in folds if fold[less] < (fold[more] if more else 0)]

    def rises(self, quantity: str, sign: int = 1) -> bool:
        """Whether a quantity of the folds rises, or with sign -1 falls, from fold to fold."""
        path = [fold[quantity] for fold in self.folds]
        return None not in path and all(sign * after > sign * before for before, after in zip(path, path[1:]))

    @property
    def frozen(self) -> bool:
        return METHODS[self.method].frozen


def _run(record, of_build, scores):
    about, training = _key(record), record.get("training") or {}
    for column, path in IN_RECORD.items():
        about[column] = functools.reduce(lambda of, key: (of or {}).get(key), path.split("."), record)
    timed = "seconds" in training and "trained" in record
    return Run(
        **about,
        minutes=minutes(record) if timed else None,
        machine=machine(record) if timed else None,
        evaluated_on=machine(record, "evaluated") if "evaluated" in record else None,
        made=record.get("trained") or record.get("evaluated"),
        restarts=tuple(_restarts(training)),
        history=_history(record) if timed else None,
        record=record_of(record, of_build),
        scores=scores.get((*_key(record).values(), about["seed"]), {}),
        seeds=(),
    )


def rows(runs: pd.DataFrame) -> list[Run]:
    return [Run(*row) for row in runs.itertuples(index=False)]


def frame(runs: Iterable[Run]) -> pd.DataFrame:
    return pd.DataFrame(list(runs), columns=Run._fields, dtype=object)


class Verdict(StrEnum):
    """The sign is decided if the interval excludes zero. With the paper's sign it is also checked whether the
    interval holds the paper's difference."""

    SIZE = "size replicated"
    SAME_SIGN = "same sign"
    UNDECIDED = "not distinguishable"
    OPPOSITE = "the opposite"
    NO_CLAIM = "no claim"
    NOT_RUN = "not run"

    @property
    def mark(self) -> str:
        marks = {"size replicated": "✓✓", "same sign": "✓", "the opposite": "✗", "not distinguishable": "≈"}
        return marks.get(self, "?")


def decide(difference: float, half_width: float, paper: float, doubt: str = "") -> Verdict:
    if doubt:
        return Verdict.NO_CLAIM
    if abs(difference) <= half_width:
        return Verdict.UNDECIDED
    if difference * paper < 0:
        return Verdict.OPPOSITE
    return Verdict.SIZE if abs(difference - paper) <= half_width else Verdict.SAME_SIGN


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two methods of one task in one of the paper's tables: the paper's difference in dB (None where it has
    none), how ours came out and, if no claim is made, the reason; the mean of our paired differences over
    images, half the width of its 95 % interval and the p-value of no difference, alone and by Holm's
    correction for all claims; the two runs, and the source of the interval's spread of seeds for each: "own",
    "pooled" over the methods of the task, either of them "of v2 cpu" and the like, or "" where it is only
    about images."""

    table: str
    edition: str
    task: str
    first: str
    second: str
    paper: float | None
    verdict: Verdict = Verdict.NOT_RUN
    reason: str = ""
    difference: float | None = None
    half_width: float | None = None
    p: float | None = None
    p_holm: float | None = None
    pair: tuple[Run, ...] = ()
    elsewhere: bool = False  # in another profile than the one compared
    spread: tuple[str, str] = ("", "")
    sentence: str = ""

    @property
    def words(self) -> str:
        return f"{METHODS[self.first].short} over {METHODS[self.second].short}"

    @property
    def outcome(self) -> str:
        """The verdict, with the reason if no claim is made."""
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict.value

    @property
    def evaluation(self) -> str:
        return evaluation_of(self.table, self.edition, self.task)

    @property
    def repeated(self) -> bool:
        return repeats(self.task, self.evaluation)

    @property
    def page(self) -> str:
        return page_of(self.table, self.edition, self.task)

    @property
    def run(self) -> bool:
        return bool(self.pair)

    @property
    def profile(self) -> str | None:
        return self.pair[0].profile if self.pair else None

    @property
    def num_seeds(self) -> tuple[int, ...]:
        return tuple(len(r.seeds) for r in self.pair)

    @property
    def mark(self) -> str:
        """¹ where the interval is only about images, ² where the spread of seeds is that of other runs."""
        return "²" if " of " in self.spread[0] else "" if any(self.spread) else "¹"

    @property
    def all_told(self) -> float | None:
        """The difference in the other reading of a smaller hole, in which all folds know of it."""
        if not self.pair or not self.evaluation.endswith("_last_fold"):
            return None
        first, second = (r.scores["ood_measurements"].mean for r in self.pair)
        return first - second


@dataclass(frozen=True, eq=False)
class Results:
    """runs: a row as in Run for each record; measurements: profile, dataset, edition, name, seed, task,
    method, evaluation, image, psnr, ssim."""

    runs: pd.DataFrame
    measurements: pd.DataFrame

    @functools.cached_property
    def _by_image(self):
        """{(profile, dataset, edition, name, evaluation): PSNR and SSIM of each image}, means over seeds,
        which are not finite where one seed's is not."""
        found = self.measurements.groupby([*SETTING, "evaluation", "image"])[["psnr", "ssim"]].mean(
            skipna=False
        )
        found = found.reset_index()
        return dict(list(found.groupby([*SETTING, "evaluation"]))), _scores(found, SETTING)

    @functools.cached_property
    def _merged(self):
        merged = []
        for key, group in self.runs.groupby(SETTING, sort=False):
            seeds = rows(group.sort_values("seed"))
            first = next((r for r in seeds if r.kind == "solver"), seeds[0])
            merged.append(first._replace(scores=self._by_image[1].get(key, {}), seeds=seeds))
        return merged

    @property
    def settings(self) -> pd.DataFrame:
        """Rows as in runs, seeds merged: the row of the lowest seed that did not diverge, with the scores of
        means over seeds, and all its seeds."""
        return frame(self._merged)

    @functools.cached_property
    def _groups(self):
        trained = [r for r in self._merged if r.kind in ("solver", "failed")]
        of_task = {}
        for r in trained:
            of_task.setdefault((r.edition, r.task), {}).setdefault((r.profile, r.dataset), []).append(r)
        return {key: list(_compared_first(groups)) for key, groups in of_task.items()}

    def groups(self, edition: str, task: str) -> list[list[Run]]:
        """The settings of one task, by profile and data set, which must not be mixed. First is the group to
        compare: among those that no other supersedes, the one whose least trained main method was trained
        longest."""
        return self._groups.get((edition, task), [])

    def compared(self, edition: str, *tasks: str) -> pd.DataFrame:
        """The settings of one edition that are compared, of these tasks or of all."""
        tasks = tasks or [task for of, task in self._groups if of == edition]
        return frame(r for task in tasks for group in self.groups(edition, task)[:1] for r in group)

    def classical(self, edition: str, task: str) -> list[Run]:
        """The classical methods of a task, best first. They need no training, so they come from any profile,
        on the images of the runs compared."""
        pixels = {r.pixels for group in self.groups(edition, task)[:1] for r in group}
        found = [r for r in self._merged if (r.kind, r.edition, r.task) == ("classical", edition, task)]
        return sorted(
            (r for r in found if r.pixels in pixels or not pixels), key=lambda r: -r.scores["test"].mean
        )

    def best_classical(self, edition: str, task: str) -> Run | None:
        """The best classical method, the measurement itself excluded."""
        return next((r for r in self.classical(edition, task) if not r.name.endswith("-measurement")), None)

    def best_learned(self, edition: str, task: str) -> Run | None:
        """The best learned solver of all profiles."""
        found = [r for group in self.groups(edition, task) for r in group if r.kind == "solver"]
        return max(found, key=lambda r: r.scores["test"].mean, default=None)

    def values(self, run: Run, evaluation: str) -> np.ndarray:
        """The PSNR of each image, means over seeds."""
        return self._by_image[0][*run[: len(SETTING)], evaluation].psnr.to_numpy()

    def find(self, edition: str, task: str, method: str, evaluation: str = "test") -> tuple[Run | None, bool]:
        """The setting of a method that has an evaluation, or diverged, and whether it is among those that are
        compared; else one of another profile."""
        for k, group in enumerate(self.groups(edition, task)):
            for r in group:
                if r.method == method and (evaluation in r.scores or (r.kind == "failed" and k == 0)):
                    return r, k == 0
        return None, False

    def doubt(self, run: Run) -> str:
        """Why no claim is made against a solver; "" where nothing is known against its training.

        A flow that is only plugged in is expected to be bad, and a classical method above all of the paper's
        solvers, too (deblurring without noise), says nothing about a training."""
        if any(r.kind == "failed" for r in run.seeds):
            return "diverged"
        if run.frozen:
            return ""
        for r in run.seeds:
            if r.restarts and r.best_step < r.restarts[-1].step:
                return "no better since it broke down"
            if any(restart.needless for restart in r.restarts):
                return "set back without need"
        if not run.psnr >= run.scores["measurement"].mean:
            return "below its measurement"
        classical = self.best_classical(run.edition, run.task)
        printed = max(v for (task, _), v in paper_table("I", run.edition).items() if task == run.task)
        return "below a classical method" if classical and run.psnr < classical.psnr < printed else ""

    def compare(
        self,
        table: str,
        edition: str,
        task: str,
        first: str = "glow",
        second: str = "unet",
        among: list[Run] | None = None,
    ) -> Comparison:
        """How far method `first` is above `second`: among these settings, by default those compared or, where
        they lack one of the two, those of the first profile that has both. With several seeds an
        image's PSNR is its mean over them, and their spread widens the interval; if no method of the task has
        several, the spread of v2's runs of the same kind of task does."""
        paper, evaluation = paper_table(table, edition), evaluation_of(table, edition, task)
        printed = {(task, first), (task, second)} <= set(paper)
        in_paper = paper[task, first] - paper[task, second] if printed else None
        found = Comparison(table, edition, task, first, second, in_paper)
        groups = self.groups(edition, task) if among is None else [among]
        measured = [
            {r.method: r for r in group if r.kind == "solver" and _whole(r, evaluation)} for group in groups
        ]
        chosen = next((k for k, of in enumerate(measured) if {first, second} <= set(of)), None)
        if chosen is None:
            return found
        pair, group = (measured[chosen][first], measured[chosen][second]), groups[chosen]
        counts = {r.method: len(r.seeds) for r in pair}
        terms, spread = spread_of_seeds(group, evaluation, counts)
        if not terms and among is None:
            others = [r for group in self.groups("v2", TASKS[task].kind)[:1] for r in group]
            terms, spread = spread_of_seeds(others, evaluation, counts, " of v2")
        doubts = [f"{METHODS[r.method].short} {doubt}" for r in pair if (doubt := self.doubt(r))]
        values = (self.values(r, evaluation) for r in pair)
        difference, half_width, p = over_images_and_seeds(*values, terms)
        decided = decide(difference, half_width, in_paper, doubts) if printed else Verdict.NO_CLAIM
        numbers = dict(difference=difference, half_width=half_width, p=p)
        numbers |= dict(pair=pair, elsewhere=chosen > 0, spread=spread)
        return replace(found, verdict=decided, reason=next(iter(doubts), ""), **numbers)

    @functools.cached_property
    def claims(self) -> list[Comparison]:
        """Every order of two methods that the paper draws conclusions from, run or not, of both editions."""
        found = []
        for edition, table in PAPER_TABLES:
            for task in tasks_of(table, edition):
                for claim in claims_of(table, edition).itertuples():
                    pair = self.compare(table, edition, task, claim.first, claim.second)
                    found += [replace(pair, sentence=claim.sentence)] * (pair.paper is not None)
        tested = [k for k, c in enumerate(found) if c.run and c.verdict is not Verdict.NO_CLAIM]
        for k, p in zip(tested, holm([found[k].p for k in tested])):
            found[k] = replace(found[k], p_holm=p)
        return found

    def claims_in(self, table: str, edition: str, task: str | None = None) -> list[Comparison]:
        return [c for c in self.claims if (c.table, c.edition, task or c.task) == (table, edition, c.task)]


def _compared_first(groups):
    """Groups of settings, {(profile, dataset): [Run]}, the one to compare first."""

    def rank(key):
        seen = {r.method: r.images_seen for r in groups[key]}
        flow = max((seen[method] for method in ("glow", "glow-noisy") if method in seen), default=0)
        return min(seen.get("unet", 0), seen.get("resnet", 0), flow), max(seen.values())

    def superseded(key):
        """Whether a profile of better trained runs has all compared methods."""
        better = [groups.get((name, key[1]), ()) for name, p in PROFILES.items() if p.supersedes == key[0]]
        return any({"glow", "unet", "resnet"} <= {r.method for r in group} for group in better)

    first = max((key for key in groups if not superseded(key)), key=rank)
    return groups[first], *(group for key, group in groups.items() if key != first)


def _whole(run, evaluation):
    return evaluation in run.scores and run.scores[evaluation].finite == run.scores[evaluation].images
