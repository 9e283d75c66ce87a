"""The settings of all runs: the paper's editions, tasks and methods, and profiles, which set the sizes of
networks and trainings. A `Run` holds every setting that its numbers depend on; their hash names its
folder."""

import ast
import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace

from companion.paths import ROOT
from flowlib import Blur, Denoising, Inpainting, LinearOperator, training


@dataclass(frozen=True)
class Edition:
    """A protocol: number of folds K and numbers of images. held_out: size of each of the validation and test
    pools that no training ever sees; larger than v1 needs, so that v1's test images are among v2's."""

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
    """A column of Table I. parameters: the operator's arguments; ood_parameters: the arguments that Table III
    of v2 changes, for measurements out of distribution; setting, ood_setting: both in the paper's words;
    editions: the editions with this task."""

    kind: str
    operator: type[LinearOperator]
    parameters: dict
    setting: str
    editions: tuple[str, ...] = ("v1", "v2")
    ood_parameters: dict = field(default_factory=dict)
    ood_setting: str | None = None

    def make_operator(self, image_size: int, **changes: float) -> LinearOperator:
        """The operator for square images of this size; changes: other parameters, such as ood_parameters."""
        extra = {"image_size": image_size} if self.operator is Inpainting else {}
        return self.operator(**self.parameters | changes, **extra)

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.setting}"


TASKS = {
    "denoising": Task(
        "denoising",
        Denoising,
        {"sigma": 0.2},
        "σₙ = 0.2",
        ood_parameters={"sigma": 0.25},
        ood_setting="σₙ = 0.25",
    ),
    "denoising-0.1": Task("denoising", Denoising, {"sigma": 0.1}, "σₙ = 0.1", editions=("v1",)),
    "inpainting": Task(
        "inpainting",
        Inpainting,
        {"mask_size": 19},
        "W = 19",
        ood_parameters={"mask_size": 16},
        ood_setting="W = 16",
    ),
    "deblurring": Task(
        "deblurring",
        Blur,
        {"sigma_b": 5.0},
        "σ_b = 5",
        ood_parameters={"sigma_b": 8.0},
        ood_setting="σ_b = 8",
    ),
}


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables. network: the prox's; start: the pre-trained weights of every fold, "flow",
    "flow-noisy" or "denoiser", or None for fresh weights; frozen: only the step sizes are trained; editions
    and tasks: where the paper reports it (glow-noisy and one fold: where we do); num_folds: None stands for
    the edition's; short: a label for narrow places."""

    label: str
    short: str
    network: str
    start: str | None = None
    frozen: bool = False
    editions: tuple[str, ...] = ("v1", "v2")
    tasks: tuple[str, ...] = tuple(TASKS)
    num_folds: int | None = None


_NOT_DENOISING = ("inpainting", "deblurring")
METHODS = {
    "resnet": Method("ResNet prox", "ResNet", "resnet"),
    "resnet-denoiser": Method(
        "ResNet prox (pre-trained denoiser)",
        "ResNet, denoiser",
        "resnet",
        "denoiser",
        False,
        ("v2",),
        _NOT_DENOISING,
    ),
    "unet": Method("U-Net prox", "U-Net", "unet"),
    "unet-denoiser": Method(
        "U-Net prox (pre-trained denoiser)",
        "U-Net, denoiser",
        "unet",
        "denoiser",
        False,
        ("v2",),
        _NOT_DENOISING,
    ),
    "glow": Method("GLOW prox", "GLOW", "glow", "flow"),
    # Our extension: the flow pre-trained on images with added noise (book/choices.md).
    "glow-noisy": Method("GLOW prox (noise-augmented pre-training)", "GLOW, noisy", "glow", "flow-noisy"),
    "glow-frozen": Method("GLOW prox (plug-and-play)", "GLOW, plugged in", "glow", "flow", True, ("v2",)),
    "glow-scratch": Method("GLOW prox (from scratch)", "GLOW, scratch", "glow", None, False, ("v1",)),
}
PAPER_METHODS = tuple(METHODS)
# The paper never shows one fold.
METHODS |= {
    "resnet-1": Method("ResNet prox, one fold", "ResNet, 1 fold", "resnet", num_folds=1),
    "unet-1": Method("U-Net prox, one fold", "U-Net, 1 fold", "unet", num_folds=1),
    "glow-1": Method("GLOW prox, one fold", "GLOW, 1 fold", "glow", "flow", num_folds=1),
}
# The images out of distribution that go with a data set.
OOD_IMAGES = {"celeba": "anime", "synthetic": "synthetic-ood"}


@dataclass(frozen=True)
class Training(training.Training):
    """flowlib's settings of a training, and the book's own. scalar_lr: the rate of μ and λ; shrinkage: the
    start of λ; val_images: how many images validate; mirror: a random half of each batch is mirrored."""

    scalar_lr: float = 1e-2
    shrinkage: float = 0.1
    val_images: int = 200
    mirror: bool = False

    LEAST = training.Training.LEAST | dict(shrinkage=-1, val_images=1)


@dataclass(frozen=True)
class Profile:
    """Sizes of the networks and of the trainings. unfolding: settings of a solver's training by its method
    or, failing that, its network; methods: the methods that `make book` trains, by task; images: overrides of
    the edition's numbers of images; flow_of: the profile whose flow, of seed 0, all seeds of this one share;
    starts: {method: another method whose solver it extends by folds that change nothing at first};
    supersedes: a profile that comparisons leave out once this one has all of its runs."""

    flow: dict
    unet: dict
    resnet: dict
    pretraining: Training
    noisy_pretraining: Training
    unfolding: dict[str, Training]
    images: dict = field(default_factory=dict)
    methods: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(TASKS, PAPER_METHODS))
    flow_of: str | None = None
    starts: dict[str, str] = field(default_factory=dict)
    supersedes: str | None = None


_FEW = dict.fromkeys(_NOT_DENOISING, ("resnet", "unet", "glow", "glow-frozen"))
_FEW |= dict.fromkeys(("denoising", "denoising-0.1"), ("resnet", "unet", "glow", "glow-noisy", "glow-frozen"))
PROFILES = {
    "smoke": Profile(
        flow=dict(num_levels=2, num_steps=1, hidden_channels=8),
        unet=dict(width=2),
        resnet=dict(width=4, num_blocks=1),
        pretraining=Training(num_steps=4, batch_size=8, lr=1e-3, validate_every=2),
        noisy_pretraining=Training(num_steps=2, batch_size=8, lr=1e-3, validate_every=2),
        unfolding={
            network: Training(num_steps=4, batch_size=4, lr=1e-3, validate_every=2)
            for network in ("glow", "unet", "resnet")
        },
        images=dict(train=16, val=8, test=8, held_out=8),
        methods=_FEW,
    ),
    "demo": Profile(
        flow=dict(num_levels=3, num_steps=4, hidden_channels=64, last_level_steps=4),
        unet=dict(width=8),
        resnet=dict(width=32),
        pretraining=Training(num_steps=160, batch_size=16, lr=1e-3),
        noisy_pretraining=Training(num_steps=60, batch_size=16, lr=1e-3),
        unfolding={
            "glow": Training(
                num_steps=20, batch_size=8, lr=1e-4, clip_norm=0.1, validate_every=10, warmup_steps=10
            ),
            "glow-frozen": Training(num_steps=6, batch_size=8, lr=0.0, warmup_steps=2, validate_every=3),
            "unet": Training(num_steps=40, batch_size=8, lr=2e-3, validate_every=20, warmup_steps=10),
            "resnet": Training(num_steps=30, batch_size=8, lr=2e-3, validate_every=15, warmup_steps=10),
        },
        images=dict(train=1024, val=32, test=32, held_out=64),
        methods=_FEW,
    ),
    # Minutes on one core: the first recorded runs.
    "short": Profile(
        flow=dict(num_levels=3, num_steps=8, hidden_channels=64, last_level_steps=4),
        unet=dict(width=8),
        resnet=dict(width=64),
        pretraining=Training(num_steps=5000, batch_size=32, lr=1e-3, validate_every=250),
        noisy_pretraining=Training(num_steps=1200, batch_size=32, lr=5e-4, validate_every=200),
        unfolding={
            "glow": Training(
                num_steps=250,
                batch_size=8,
                lr=2e-4,
                clip_norm=0.1,
                warmup_steps=20,
                validate_every=50,
                val_images=100,
            ),
            "glow-frozen": Training(
                num_steps=60, batch_size=8, lr=0.0, warmup_steps=10, validate_every=20, val_images=100
            ),
            "unet": Training(num_steps=1500, batch_size=8, lr=1e-3, validate_every=300),
            "resnet": Training(num_steps=800, batch_size=8, lr=1e-3, validate_every=160),
        },
    ),
    # Most of an hour a run on one core.
    "cpu": Profile(
        flow=dict(num_levels=4, num_steps=8, hidden_channels=(64, 96, 128, 128), last_level_steps=8),
        unet=dict(width=24),
        resnet=dict(width=64),
        pretraining=Training(num_steps=8000, batch_size=32, lr=1e-3, validate_every=400, mirror=True),
        noisy_pretraining=Training(num_steps=2500, batch_size=32, lr=5e-4, validate_every=250, mirror=True),
        unfolding={
            "glow": Training(
                num_steps=2500, batch_size=8, lr=1e-4, clip_norm=0.1, validate_every=125, mirror=True
            ),
            "glow-frozen": Training(
                num_steps=100, batch_size=8, lr=0.0, warmup_steps=10, validate_every=20, mirror=True
            ),
            "unet": Training(num_steps=6000, batch_size=8, lr=1e-3, validate_every=300, mirror=True),
            "resnet": Training(num_steps=6000, batch_size=8, lr=5e-4, validate_every=300, mirror=True),
        },
    ),
    # The paper's networks, minutes a run on a large GPU.
    "gpu": Profile(
        flow=dict(num_levels=4, num_steps=18, hidden_channels=512),
        unet=dict(width=64),
        resnet=dict(width=128),
        pretraining=Training(
            num_steps=2600, batch_size=64, lr=8e-4, warmup_steps=100, validate_every=130, mirror=True
        ),
        noisy_pretraining=Training(num_steps=1000, batch_size=64, lr=4e-4, validate_every=100, mirror=True),
        unfolding={
            "glow": Training(
                num_steps=450, batch_size=16, lr=4e-5, clip_norm=0.1, validate_every=100, mirror=True
            ),
            "unet": Training(num_steps=4000, batch_size=16, lr=5e-4, validate_every=200, mirror=True),
            "resnet": Training(num_steps=6000, batch_size=16, lr=5e-4, validate_every=300, mirror=True),
        },
    ),
    "paper": Profile(
        flow=dict(num_levels=4, num_steps=18, hidden_channels=512),
        unet=dict(width=64),
        resnet=dict(width=128),
        pretraining=Training(num_steps=200_000, batch_size=32, lr=1e-4, cosine=False, validate_every=1000),
        noisy_pretraining=Training(
            num_steps=50_000, batch_size=32, lr=1e-4, cosine=False, validate_every=1000
        ),
        unfolding={
            network: Training(
                num_steps=100_000,
                batch_size=8,
                lr=1e-5,
                shrinkage=0.01,
                cosine=False,
                validate_every=500,
                bf16=False,
            )
            for network in ("glow", "unet", "resnet")
        },
    ),
}
# Solvers trained for twice as long; the flow is trained as before.
PROFILES["gpu-longer"] = replace(
    PROFILES["gpu"],
    unfolding={
        method: replace(
            training, num_steps=2 * training.num_steps, validate_every=2 * training.validate_every
        )
        for method, training in PROFILES["gpu"].unfolding.items()
    },
)
# The networks of `cpu` by the recipe of the page "recipe".
_MUON = dict(optimizer="muon", validate_every=100, mirror=True)
PROFILES["muon"] = replace(
    PROFILES["cpu"],
    unfolding={
        "glow-1": Training(
            num_steps=2400, batch_size=4, lr=5e-4, clip_norm=0.1, shrinkage=0.6, scalar_lr=1e-3, **_MUON
        ),
        "glow": Training(
            num_steps=300, batch_size=4, lr=5e-4, clip_norm=0.1, **_MUON | dict(validate_every=50)
        ),
        "unet": Training(num_steps=1200, batch_size=8, lr=1e-3, fixed_norms=0.1, **_MUON),
        "unet-1": Training(num_steps=4800, batch_size=8, lr=1e-3, fixed_norms=0.1, **_MUON),
        "resnet": Training(num_steps=1000, batch_size=8, lr=1e-3, fixed_norms=0.1, **_MUON),
        "resnet-1": Training(num_steps=4000, batch_size=8, lr=1e-3, fixed_norms=0.1, **_MUON),
    },
    methods=dict.fromkeys(TASKS, ("resnet", "resnet-1", "unet", "unet-1", "glow", "glow-1")),
    flow_of="cpu",
    starts={"glow": "glow-1"},
    supersedes="cpu",
)
# Profiles and data sets in a few words, for pages.
PROFILE_WORDS = {
    "smoke": "a few steps, to test the code",
    "demo": "small networks, trained for less than a minute each",
    "short": "a small flow, some minutes a training on one core",
    "cpu": "a middling flow, up to about an hour a training on one core",
    "muon": "the networks of `cpu`, trained by Muon, one fold first, for up to 40 minutes on one core",
    "gpu": "the paper's networks, minutes a training on a large GPU",
    "gpu-longer": "as `gpu`, with the same flow; every solver is trained for twice as long",
    "paper": "the paper's networks and trainings",
}
EDITION_WORDS = {"v1": "first edition (v1)", "v2": "final edition (v2)"}
DATASET_WORDS = {
    "celeba": "photographs of faces (CelebA)",
    "anime": "anime faces",
    "synthetic": "faces that the project draws",
    "synthetic-ood": "faces that the project draws, with other eyes and colours",
}


def in_words(names: dict) -> str:
    """The images and the profile of a record's experiment, e.g. "on photographs of faces (CelebA) with the
    profile `cpu` (a middling flow, up to about an hour a training on one core)"."""
    return f"{in_few_words(names)} ({PROFILE_WORDS[names['profile']]})"


def in_few_words(names: dict) -> str:
    """The same without the words for the profile."""
    images = DATASET_WORDS.get(names["dataset"], f"the data set `{names['dataset']}`")
    return f"on {images} with the profile `{names['profile']}`"


@dataclass(frozen=True)
class Run:
    """All settings that the numbers of one training depend on, without the images' pixels and the code. kind:
    "flow", "denoiser" or "solver"; name: its folder's name; network, config: its network's name and
    arguments; start: the Run that gives its first weights; blind_sigma: the largest noise level, if each
    training image draws its own, uniform from 0."""

    kind: str
    name: str
    dataset: str
    seed: int
    images: dict
    network: str
    config: dict
    training: Training
    start: "Run | None" = None
    noisy: bool = False
    task: str | None = None
    operator: dict | None = None
    method: str | None = None
    frozen: bool = False
    edition: str | None = None
    num_folds: int | None = None
    blind_sigma: float | None = None

    def as_dict(self) -> dict:
        """The settings in a record; the start is given by its hash. A setting that is not in FIRST_SETTINGS
        counts only where it differs from its default, so that a new setting changes no recorded run."""
        content = asdict(replace(self, start=None)) | {"start": self.start and self.start.settings_hash}
        content = _without_new_defaults(content, type(self), FIRST_SETTINGS)
        of_training = content["training"], type(self.training)
        content["training"] = _without_new_defaults(*of_training, FIRST_TRAINING_SETTINGS)
        return json.loads(json.dumps(content))

    @functools.cached_property
    def settings_hash(self) -> str:
        """Ten hexadecimal digits of the settings, without checkpoint_minutes, which changes no number."""
        content = self.as_dict()
        del content["training"]["checkpoint_minutes"]
        return _digest(content)

    @property
    def folder_name(self) -> str:
        """Name and hash of settings and code: a change of either makes another run, in another folder."""
        return f"{self.name}-{_digest([self.settings_hash, training_code()])}"


# The settings in the hashes of the first recorded runs.
FIRST_SETTINGS = (
    "kind name dataset seed images network config training start noisy task operator method frozen edition "
    "num_folds"
).split()
FIRST_TRAINING_SETTINGS = (
    "num_steps batch_size lr scalar_lr warmup_steps cosine clip_norm weight_decay shrinkage validate_every "
    "val_images mirror patience max_restarts bf16 checkpoint_minutes"
).split()


def _without_new_defaults(content: dict, of: type, first: list[str]) -> dict:
    new = {f.name: f.default for f in fields(of) if f.name not in first}
    return {name: value for name, value in content.items() if name not in new or value != new[name]}


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


@functools.cache
def training_code() -> str:
    """Hash of the code that trained weights depend on."""
    flow = "layers fused products precision reversible glow".split()
    method = flow + "images operators prox solver muon training".split()
    return _code_hash([*(f"flowlib/{name}.py" for name in method), "companion/training.py"])


@functools.cache
def evaluation_code() -> str:
    """Hash of the code that the numbers of a trained model depend on."""
    files = ["flowlib/folds.py", "flowlib/metrics.py", "companion/records.py"]
    return _digest([training_code(), _code_hash(files)])


def _code_hash(files) -> str:
    """Comments, docstrings, layout and the version of Python, whose ast.dump differs, do not count."""
    return _digest([_plain(ast.parse((ROOT / name).read_text(encoding="utf-8"))) for name in files])


def _plain(node):
    """A syntax tree as lists; fields that are empty, such as those that a newer Python adds, are left out."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    children = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return [type(node).__name__, *([name, _plain(value)] for name, value in children)]


def _is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def retrain() -> bool:
    """Whether RETRAIN=1 is set: then every model is trained, even if results/ has it. ValueError for a value
    other than 0 and 1."""
    value = os.environ.get("RETRAIN", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"RETRAIN={value!r}: give 1, to train everything anew, or 0")
    return value == "1"
