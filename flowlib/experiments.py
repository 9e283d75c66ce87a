"""What is run: tasks, editions of the paper, profiles (how much of it), and where a run's files lie."""

from dataclasses import dataclass, field
from pathlib import Path

from flowlib import data
from flowlib.operators import Blur, Denoising, Inpainting


@dataclass(frozen=True)
class Edition:
    """A protocol: number of folds K and numbers of images. held_out: size of each of the validation and test pools that
    no training ever sees; larger than v1 needs, so that v1's test images are among v2's."""

    num_folds: int
    train: int
    val: int
    test: int
    held_out: int


EDITIONS = {
    "v1": Edition(num_folds=5, train=992, val=200, test=200, held_out=500),
    # The paper's 23,000/1,500/1,500 scaled to the first 10,000 images of CelebA.
    "v2": Edition(num_folds=4, train=9000, val=500, test=500, held_out=500),
}


@dataclass(frozen=True)
class Task:
    """A column of Table I: the operator, what the paper calls its setting, the editions that have it, and the setting out of
    distribution with which Table III of v2 tests."""

    name: str
    setting: str
    operator: type
    parameters: dict
    editions: tuple[str, ...] = ("v1", "v2")
    shifted_setting: str | None = None
    shifted: dict = field(default_factory=dict)

    def make_operator(self, image_size, shifted=False):
        extra = {"image_size": image_size} if self.operator is Inpainting else {}
        return self.operator(**self.parameters | (self.shifted if shifted else {}), **extra)


TASKS = {
    "denoising": Task(
        "denoising", "sigma_n=0.2", Denoising, dict(sigma=0.2), ("v1", "v2"), "sigma_n=0.25", dict(sigma=0.25)
    ),
    "denoising-0.1": Task("denoising", "sigma_n=0.1", Denoising, dict(sigma=0.1), ("v1",)),
    "inpainting": Task("inpainting", "W=19", Inpainting, dict(mask_size=19), ("v1", "v2"), "W=16", dict(mask_size=16)),
    "deblurring": Task(
        "deblurring", "sigma_b=5", Blur, dict(sigma_b=5.0), ("v1", "v2"), "sigma_b=8", dict(sigma_b=8.0)
    ),
}


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables. network: of the prox; start: what every fold starts from, a pre-trained "flow",
    "flow-noisy" or "denoiser", or None, fresh weights; frozen: only the step sizes are trained; editions and tasks: where the
    paper (or, for flow-noisy, we) have it."""

    label: str
    network: str
    start: str | None = None
    frozen: bool = False
    editions: tuple[str, ...] = ("v1", "v2")
    tasks: tuple[str, ...] = tuple(TASKS)


_NOT_DENOISING = ("inpainting", "deblurring")
METHODS = {
    "resnet": Method("ResNet prox", "resnet"),
    "resnet-denoiser": Method(
        "ResNet prox (pre-trained denoiser)", "resnet", "denoiser", False, ("v2",), _NOT_DENOISING
    ),
    "unet": Method("U-Net prox", "unet"),
    "unet-denoiser": Method("U-Net prox (pre-trained denoiser)", "unet", "denoiser", False, ("v2",), _NOT_DENOISING),
    "glow": Method("GLOW prox", "glow", "flow"),
    # Our extension: the flow pre-trained on images with added noise (book/choices.md).
    "glow-noisy": Method("GLOW prox (noise-augmented pre-training)", "glow", "flow-noisy"),
    "glow-frozen": Method("GLOW prox (plug-and-play)", "glow", "flow", True, ("v2",)),
    "glow-scratch": Method("GLOW prox (from scratch)", "glow", None, False, ("v1",)),
}
# The images out of distribution that go with a data set.
FOREIGN_IMAGES = {"celeba": "anime", "synthetic": "synthetic-ood"}


@dataclass(frozen=True)
class Training:
    """Settings of one training. lr: of the networks; scalar_lr: of μ and λ; the rate rises over warmup_steps and, with
    cosine, falls to zero at num_steps; patience: validations without improvement before it stops;
    max_restarts: how often a run that fell apart goes on from its best weights at half the rate. shrinkage: where λ starts.
    mirror: half of the training images, at random, are mirrored left to right (both editions are silent on it)."""

    num_steps: int
    batch_size: int
    lr: float
    scalar_lr: float = 1e-2
    warmup_steps: int = 50
    cosine: bool = True
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    shrinkage: float = 0.1
    validate_every: int = 100
    val_images: int = 200
    mirror: bool = False
    patience: int = 10
    max_restarts: int = 3
    bf16: bool = True
    checkpoint_minutes: float = 5


@dataclass(frozen=True)
class Profile:
    """How much is done: sizes of the networks and of the trainings. unfolding is keyed by method or, for all methods that have
    it, network; methods: those that `make book` trains, by task; images: overrides of the edition's."""

    name: str
    flow: dict
    unet: dict
    resnet: dict
    pretraining: Training
    noisy_pretraining: Training
    unfolding: dict[str, Training]
    images: dict = field(default_factory=dict)
    methods: dict[str, tuple[str, ...]] | None = None

    def unfolding_of(self, prox):
        return self.unfolding.get(prox) or self.unfolding[METHODS[prox].network]


_FEW = {task: ("glow", "unet", "resnet") for task in _NOT_DENOISING} | {
    "denoising": ("glow", "unet", "resnet", "glow-noisy", "glow-frozen")
}
PROFILES = {
    "smoke": Profile(
        name="smoke",
        flow=dict(num_levels=2, num_steps=1, hidden_channels=8),
        unet=dict(width=2),
        resnet=dict(width=4, num_blocks=1),
        pretraining=Training(num_steps=4, batch_size=8, lr=1e-3, validate_every=2, bf16=False),
        noisy_pretraining=Training(num_steps=2, batch_size=8, lr=1e-3, validate_every=2, bf16=False),
        unfolding={
            prox: Training(num_steps=4, batch_size=4, lr=1e-3, validate_every=2, bf16=False)
            for prox in ("glow", "unet", "resnet")
        },
        images=dict(train=16, val=8, test=8, held_out=8),
        methods=_FEW,
    ),
    "demo": Profile(
        name="demo",
        flow=dict(num_levels=3, num_steps=4, hidden_channels=64, last_level_steps=4),
        unet=dict(width=8),
        resnet=dict(width=32),
        pretraining=Training(num_steps=500, batch_size=16, lr=1e-3),
        noisy_pretraining=Training(num_steps=150, batch_size=16, lr=1e-3),
        unfolding={
            "glow": Training(num_steps=80, batch_size=8, lr=1e-4, clip_norm=0.1, validate_every=40, warmup_steps=20),
            "glow-frozen": Training(num_steps=20, batch_size=8, lr=0.0, warmup_steps=5, validate_every=10),
            "unet": Training(num_steps=120, batch_size=8, lr=2e-3, validate_every=40, warmup_steps=20),
            "resnet": Training(num_steps=100, batch_size=8, lr=2e-3, validate_every=50, warmup_steps=20),
        },
        images=dict(train=1024, val=64, test=64, held_out=64),
        methods=_FEW,
    ),
    "cpu": Profile(
        name="cpu",
        flow=dict(num_levels=4, num_steps=8, hidden_channels=(64, 96, 128, 128), last_level_steps=8),
        unet=dict(width=24),
        resnet=dict(width=64),
        pretraining=Training(num_steps=8000, batch_size=32, lr=1e-3, validate_every=400, mirror=True),
        noisy_pretraining=Training(num_steps=2500, batch_size=32, lr=5e-4, validate_every=250, mirror=True),
        unfolding={
            "glow": Training(
                num_steps=2500, batch_size=8, lr=1e-4, clip_norm=0.1, validate_every=125, mirror=True
            ),
            "glow-frozen": Training(num_steps=100, batch_size=8, lr=0.0, warmup_steps=10, validate_every=20, mirror=True),
            "unet": Training(num_steps=6000, batch_size=8, lr=1e-3, validate_every=300, mirror=True),
            "resnet": Training(num_steps=6000, batch_size=8, lr=1e-3, validate_every=300, mirror=True),
        },
    ),
    "paper": Profile(
        name="paper",
        flow=dict(num_levels=4, num_steps=18, hidden_channels=512),
        unet=dict(width=64),
        resnet=dict(width=128),
        pretraining=Training(num_steps=200_000, batch_size=32, lr=1e-4, cosine=False, validate_every=1000),
        noisy_pretraining=Training(num_steps=50_000, batch_size=32, lr=1e-4, cosine=False, validate_every=1000),
        unfolding={
            prox: Training(
                num_steps=100_000, batch_size=8, lr=1e-5, shrinkage=0.01, cosine=False, validate_every=500, bf16=False
            )
            for prox in ("glow", "unet", "resnet")
        },
    ),
}


def choose(table, key, what):
    """table[key], or a ValueError that names the choices."""
    if key not in table:
        raise ValueError(f"unknown {what} {key!r}; choose one of: {', '.join(table)}")
    return table[key]


class Experiment:
    """One profile, data set, edition and seed: its settings, its images and where its files lie under build/."""

    def __init__(self, profile="demo", dataset="synthetic", edition="v2", seed=0, build="build"):
        self.profile = choose(PROFILES, profile, "profile")
        self.edition = choose(EDITIONS, edition, "edition")
        self.names = dict(profile=profile, dataset=dataset, edition=edition, seed=seed)
        self.dataset, self.seed, self.build = dataset, seed, Path(build)
        self.runs = self.build / "runs" / f"{profile}-{dataset}-s{seed}"
        sizes = {k: getattr(self.edition, k) for k in ("train", "val", "test", "held_out")}
        self.split_sizes = sizes | self.profile.images

    def images(self):
        """The prepared ImageSet of this data set."""
        return data.load(self.build / "data" / self.dataset)

    def split(self, part, images=None):
        """uint8 images (N, H, W, 3) of one part: "pretrain", "train", "val" or "test"."""
        images = images or self.images()
        return images.images[data.split_indices(len(images), **self.split_sizes)[part]]

    def trainings(self):
        """The (task, prox) that this profile trains for this edition."""
        edition, chosen = self.names["edition"], self.profile.methods
        return [
            (task, prox)
            for task in TASKS
            if edition in TASKS[task].editions and (chosen is None or task in chosen)
            for prox, method in METHODS.items()
            if (edition in method.editions and task in method.tasks if chosen is None else prox in chosen[task])
        ]

    def foreign_images(self):
        """The prepared ImageSet out of distribution that goes with this data set, or None."""
        folder = self.build / "data" / FOREIGN_IMAGES.get(self.dataset, "")
        return data.load(folder) if (folder / "manifest.json").exists() else None

    def flow_directory(self, noisy=False):
        """Both editions start from the same pre-trained flow."""
        return self.runs / ("flow-noisy" if noisy else "flow")

    def denoiser_directory(self, network):
        return self.runs / self.names["edition"] / f"denoiser-{network}"

    def directory(self, task, prox):
        choose(TASKS, task, "task")
        choose(METHODS, prox, "prox")
        return self.runs / self.names["edition"] / f"{task}-{prox}"
