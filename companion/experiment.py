"""One profile, data set, edition and seed: its runs, its images, and where its files lie."""

import functools
import inspect
from dataclasses import replace
from pathlib import Path

import torch

import data
from companion.parameters import OVERRIDES, check, choose, packed
from companion.paths import RESULTS, build_folder
from companion.settings import EDITIONS, METHODS, OOD_IMAGES, PROFILES, TASKS, Method, Run, Training, retrain
from flowlib import Glow, ResNetProx, UNetProx
from flowlib.images import split_indices


class Experiment:
    """The runs and images of one profile, data set, edition and seed.

    overrides: num_folds, flow, unet, resnet (arguments of the networks), and num_steps, lr, batch_size of
    solvers' trainings; None stands for the profile's value. Raises ValueError for unknown names and values
    out of range."""

    def __init__(self, profile="demo", dataset="synthetic", edition="v2", seed=0, build="build", **overrides):
        for name in overrides:
            choose(dict.fromkeys(OVERRIDES), name, "override")
        check(dict(profile=profile, dataset=dataset, edition=edition, seed=seed) | overrides)
        data.check_name(dataset)
        self.names = dict(profile=profile, dataset=dataset, edition=edition, seed=int(seed))
        self.profile, self.edition = PROFILES[profile], EDITIONS[edition]
        self.overrides = {name: value for name, value in overrides.items() if value is not None}
        self.dataset, self.seed, self.build = dataset, int(seed), build_folder(build)
        self.key = f"{profile}-{dataset}-s{self.seed}"  # of folders of runs
        sizes = {k: getattr(self.edition, k) for k in ("train", "val", "test", "held_out")}
        self.split_sizes = sizes | self.profile.images
        self._check_overrides()

    def _check_overrides(self):
        """ValueError for values that would only fail after a training, or be misread."""
        size, images = self.overrides.get("batch_size", 1), self.split_sizes["train"]
        if size > images:
            raise ValueError(f"batch_size {size} is more than the {images} images of a training")
        for name, network in {"flow": Glow, "unet": UNetProx, "resnet": ResNetProx}.items():
            if name not in self.overrides:
                continue
            config = self.overrides[name]
            for key in config:
                choose(inspect.signature(network).parameters, key, f"setting of {name}")
            try:
                with torch.device("meta"):  # takes neither time nor memory
                    network(**config)
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{name}={config!r} describes no network: {error}") from error

    # Runs

    def _config(self, network: str) -> dict:
        return self.overrides.get(network, getattr(self.profile, network))

    def _training(self, method: str, network: str) -> Training:
        """A solver's settings: the profile's, with the overrides."""
        chosen = self.profile.unfolding.get(method) or self.profile.unfolding[network]
        return replace(
            chosen, **{k: v for k, v in self.overrides.items() if k in ("num_steps", "lr", "batch_size")}
        )

    def _run(self, **settings) -> Run:
        return Run(dataset=self.dataset, seed=self.seed, images=self.split_sizes, **settings)

    def flow(self, noisy: bool = False) -> Run:
        """The pre-training of the flow. Both editions share it, so the sizes of their splits do not count."""
        training = self.profile.noisy_pretraining if noisy else self.profile.pretraining
        settings = dict(
            kind="flow", network="flow", config=self._config("flow"), training=training, noisy=noisy
        )
        start, name = (self.flow(), "flow-noisy") if noisy else (None, "flow")
        images, seed = {"held_out": self.split_sizes["held_out"]}, 0 if self.profile.flow_of else self.seed
        return replace(self._run(name=name, start=start, **settings), images=images, seed=seed)

    def denoiser(self, network: str) -> Run:
        """The training of one network as a denoiser, the start of some rows of Table I."""
        return self._run(
            kind="denoiser",
            name=f"denoiser-{network}",
            network=network,
            config=self._config(network),
            training=self._training(network, network),
            task="denoising",
            operator=TASKS["denoising"].parameters,
            edition=self.names["edition"],
            num_folds=1,
        )

    def solver(self, task: str, method: str) -> Run:
        """The training of the unfolded solver for one task by one method."""
        chosen = choose(METHODS, method, "method")
        operator = choose(TASKS, task, "task").parameters
        starts = {"flow": self.flow, "flow-noisy": lambda: self.flow(True)}
        starts |= {"denoiser": lambda: self.denoiser(chosen.network), None: lambda: None}
        start = starts[chosen.start]
        if method in self.profile.starts:
            start = functools.partial(self.solver, task, self.profile.starts[method])
        return self._run(
            kind="solver",
            name=f"{task}-{method}",
            network=chosen.network,
            config=self._config("flow" if chosen.network == "glow" else chosen.network),
            training=self._training(method, chosen.network),
            start=start(),
            task=task,
            operator=operator,
            method=method,
            frozen=chosen.frozen,
            edition=self.names["edition"],
            num_folds=chosen.num_folds or self.overrides.get("num_folds", self.edition.num_folds),
        )

    def methods(self, task: str) -> list[str]:
        """The methods of a task that this profile trains, in the order of the tables. Without overrides and
        RETRAIN=1, only those with kept models, if there are any: then nothing must be trained."""
        found = [name for name in self.profile.methods.get(task, ()) if self._has(task, METHODS[name])]
        folder = RESULTS / "checkpoints" / self.key / self.names["edition"]
        kept = [name for name in found if (folder / f"{task}-{name}.safetensors").exists()]
        return found if self.overrides or retrain() else kept or found

    def runs(self) -> dict[str, Run]:
        """All runs of this edition, by name, even if the profile does not train them by default."""
        found = [self.flow(), self.flow(noisy=True)]
        if self.names["edition"] == "v2":
            found += [self.denoiser(network) for network in ("unet", "resnet")]
        for task in self.tasks():
            found += [self.solver(task, name) for name, m in METHODS.items() if self._has(task, m)]
        return {run.name: run for run in found}

    def _has(self, task: str, method: Method) -> bool:
        return self.names["edition"] in method.editions and task in method.tasks

    def tasks(self) -> list[str]:
        return [name for name, task in TASKS.items() if self.names["edition"] in task.editions]

    # Files

    def place(self, run: Run) -> str:
        """The run's path among others, e.g. "cpu-celeba-s0/v2/inpainting-glow". Flows lie above the editions,
        and a flow of another profile lies under that profile."""
        flow_of = run.kind == "flow" and self.profile.flow_of
        key = f"{flow_of}-{self.dataset}-s{run.seed}" if flow_of else self.key
        return "/".join([key, *([run.edition] if run.edition else []), run.name])

    def directory(self, run: Run) -> Path:
        return (self.build / "runs" / self.place(run)).with_name(run.folder_name)

    # Images

    def images(self, name: str | None = None) -> data.ImageSet:
        """The packed images of this data set, or of another; known sets are prepared first if missing."""
        return packed(self.build, name or self.dataset)

    def split(self, part: str, images: data.ImageSet | None = None):
        """uint8 images (N, H, W, 3) of one part: "pretrain", "train", "val" or "test"."""
        images = images or self.images()
        return images.images[split_indices(len(images), **self.split_sizes)[part]]

    def ood_images(self) -> data.ImageSet | None:
        """The images out of distribution for this data set, if there are any."""
        try:
            return self.images(OOD_IMAGES[self.dataset])
        except (KeyError, FileNotFoundError):  # own images have none; some users have CelebA only
            return None
