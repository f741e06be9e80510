"""A training run as a value: every setting of `train`, `finetune` and `run`, grouped, frozen, written into the run folder.

Each field is also a flag of the same name (the groups leave no trace in it), a line of a TOML file, and a keyword of
`vitrail.fit`. Settings that say "planned" are filled in by experiments/plan.py once the data are known.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from torch import nn

from vitrail.core.errors import UserError
from vitrail.core.types import Objective, Preprocess
from vitrail.core.values import from_json, to_json
from vitrail.data.augment import Augmentation
from vitrail.data.sources import printable
from vitrail.data.splits import Splits
from vitrail.models.masked import Targets
from vitrail.objectives.supervised import CrossEntropy
from vitrail.training.optim import Optimiser, Schedule
from vitrail.training.pace import Evaluate

T = TypeVar("T")


@dataclass(frozen=True)
class DataSettings:
    """What to learn from."""

    data: str = ""
    """A folder with one folder a class, a CSV or JSON of paths and labels, parquet, hub:OWNER/NAME or sample:NAME."""
    validation: float = 0.1
    """Share of the training pictures held out to choose the best weights, where the data have no such split."""
    size: tuple[int, ...] = ()
    """Pixels that the model sees: one number, or height and width; none: planned from the pictures."""
    crop: Literal["planned", "none", "inception"] = "planned"
    """Training crops: random areas and aspects (inception), or the evaluation's own view (none)."""
    batch: int = 0
    """Pictures a step, over all processes; 0: planned."""
    workers: int = -1
    """Processes that decode pictures beside the training; -1: planned from the machine."""
    limit: int = 0
    """Train on this many pictures only, the same share of each class; 0: all."""
    balance: bool = False
    """Draw every class equally often."""
    strict: bool = False
    """End at the first picture that cannot be read, rather than leave it out."""


@dataclass(frozen=True)
class ModelSettings:
    """What learns."""

    model: str = ""
    """As ViT-B/16; `vitrail models` lists them; none: planned from the pictures."""
    weights: Path | None = None
    """What to start from: a run folder, a checkpoint of any known library, or an id (hf:OWNER/NAME, official:NAME,
    timm:NAME); none: random weights."""
    head: Literal["reset", "keep"] = "reset"
    """The head of --weights: a new one of zeros, or its own where its classes are those of the data."""
    heads: int = 0
    """Attention heads of --weights, for files that cannot say; 0: what the file says."""
    grid: tuple[int, ...] = ()
    """Rows and columns of the position table of --weights, for files that cannot say."""
    preprocess: str = ""
    """Preprocessing of --weights, where the file does not state it: as imagenet,bicubic,resize=256,size=224."""
    pool: Literal["planned", "class", "mean", "attention"] = "planned"
    """What the head reads: the class token, the mean of the patches, or a learned attention over them."""
    positions: Literal["planned", "none", "learned", "sincos2d"] = "planned"
    """How the model knows where a patch lies."""
    dropout: float = 0.0
    """Chance of each number after a dense layer (appendix B.1)."""
    drop_path: float = 0.0
    """Chance of the last block's branches to be skipped (stochastic depth); earlier blocks less."""
    representation: int = 0
    """Width of the hidden tanh layer of the pre-training head (3.1); 0: a plain linear head."""
    head_bias: float = 0.0
    """The logits that training starts from."""
    checkpointing: bool = False
    """Compute blocks again in the backward pass, to save memory."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is learned: labels, or what the pictures themselves hide."""

    objective: Literal["supervised", "masked-patch"] = "supervised"
    """Classes, or the paper's masked patch prediction (B.1.2), which reads no labels."""
    targets: Targets = "mean-colour"
    """What is predicted of a corrupted patch: its mean colour in 3 bits a channel, 4 x 4 such colours, or its pixels."""
    corrupt: float = 0.5
    """Share of the patches that are corrupted."""


@dataclass(frozen=True)
class LossSettings:
    """What is asked of it."""

    loss: CrossEntropy = "softmax"
    """Cross-entropy over the classes, or of each class by itself (the official pre-training's)."""
    smoothing: float = 0.0
    """Share of each label that is spread over all classes."""


@dataclass(frozen=True)
class LengthSettings:
    """How long. The first that is given counts; with none, as many epochs as the planned minutes hold."""

    steps: int = 0
    """Optimiser steps in all."""
    epochs: float = 0.0
    """Times that each picture is seen."""
    minutes: float = 0.0
    """Minutes of training, from the measured time of a step."""


@dataclass(frozen=True)
class RunSettings:
    """Where and how."""

    out: Path | None = None
    """The run folder; none: a new one under runs/."""
    resume: bool = False
    """Go on with the run in --out (or, without it, in the newest of these data and this model)."""
    dry_run: bool = False
    """Look at the data, say what would be done, and stop."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    precision: Literal["planned", "fp32", "bf16"] = "planned"
    """Of matrix products; weights, norms and losses stay fp32."""
    accumulate: int = 1
    """Parts that each batch is cut into, to save memory; the numbers stay the same, but for what is drawn at random."""
    compile: bool = False
    """Compile the model with torch.compile."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on the held-out pictures."""
    log_every: int = 50
    """Steps between lines of metrics."""
    save_minutes: float = 5.0
    """The most minutes of work that a kill can lose."""
    baselines: bool = False
    """Say at the end what the pixels alone give on the same pictures (ridge, nearest neighbours)."""
    wandb: bool = False
    """Send metrics to Weights & Biases too."""


@dataclass(frozen=True)
class Own:
    """What a Python recipe brings of its own; whatever is None is Vitrail's.

    splits: the pictures. network: from the class names to a model (pixels b c h w -> logits b k) that normalises uint8
    pixels itself. preprocess: how pictures become its input. objective: around that model; then `evaluate` is needed too,
    or nothing is evaluated and the last weights are the best. surveyed: the splits were looked at before, and what cannot
    be read is left out of them.
    """

    splits: Splits | None = None
    network: Callable[[tuple[str, ...]], nn.Module] | None = None
    preprocess: Preprocess | None = None
    objective: Callable[[nn.Module], Objective] | None = None
    evaluate: Evaluate | None = None
    surveyed: bool = False


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; the same recipe on the same machine gives the same weights, bit for bit."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(flip=True))
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    length: LengthSettings = field(default_factory=LengthSettings)
    run: RunSettings = field(default_factory=RunSettings)
    own: Annotated[Own, tyro.conf.Suppress] = field(default_factory=Own)
    given: Annotated[frozenset[str], tyro.conf.Suppress] = field(default=frozenset(), compare=False)
    """Names of the settings that somebody asked for, by flag, TOML or keyword, be it for the default."""

    @property
    def masked(self) -> bool:
        """Whether it is masked patch prediction."""
        return self.objective.objective == "masked-patch" and self.own.objective is None


FINETUNE = Recipe(
    optimiser=Optimiser(optimiser="sgd", weight_decay=0.0, decay="l2"),
)
"""The paper's fine-tuning (Table 4): SGD with momentum 0.9, no weight decay, clipped at global norm 1."""

PRETRAIN = Recipe(objective=ObjectiveSettings(objective="masked-patch"))
"""Learning from pictures alone. The paper's has Adam at 2e-4, a warm-up of 10,000 steps and cosine decay over a million
steps of 4,096 pictures; it names no weight decay."""

LABELLED = {
    *("balance", "head", "representation", "head_bias", "mixup", "cutmix", "loss", "smoothing", "baselines"),
}
"""Settings that mean something with labels alone."""

FREE_ON_RESUME = {
    *("out", "resume", "dry_run", "device", "workers", "log_every", "save_minutes"),
    *("wandb", "checkpointing", "strict", "baselines"),
}
"""Settings that may change when a run is continued, because no number depends on them."""


RANGES = {
    **dict.fromkeys(
        ("dropout", "drop_path", "smoothing", "momentum", "layer_decay", "polyak", "end", "erasing"), (0, 1)
    ),
    **dict.fromkeys(
        ("batch", "limit", "heads", "representation", "shift", "mixup", "cutmix", "rate", "weight_decay"), (0, None)
    ),
    **dict.fromkeys(("clip", "steps", "epochs", "minutes", "save_minutes", "seed"), (0, None)),
    **dict.fromkeys(("size", "accumulate", "log_every"), (1, None)),
    **dict.fromkeys(("workers", "warmup"), (-1, None)),
    **{"betas": (0, 0.999999), "evaluate_every": (0.001, None), "corrupt": (0.01, 0.99)},
}
"""The least and the most that a setting can be; None: any number."""


def check(recipe: Recipe) -> None:
    """Raises UserError on the first setting that cannot be carried out."""
    settings = flat(recipe)
    for name, (low, high) in RANGES.items():
        given = settings[name]
        for value in given if isinstance(given, list) else [given]:
            if not (math.isfinite(value) and value >= low and (high is None or value <= high)):
                most = " up" if high is None else f" to {high:g}"
                raise UserError(f"--{name.replace('_', '-')} is {value:g}; give a number from {low:g}{most}.")
    for name, value in settings.items():
        if isinstance(value, str) and (said := printable(value)) != value:
            raise UserError(
                f"--{name} {said} is not UTF-8, as a run's record has to be; rename it, or give a link to it."
            )
    if len(settings["size"]) > 2:
        raise UserError(f"--size has {len(settings['size'])} numbers; give one, or height and width.")
    if recipe.model.weights is not None:
        # Only where it was asked for: a recipe of the paper names the model that its own weights would have.
        for name in sorted(recipe.given & {"model", "positions"}):
            if settings[name] not in ("", "planned"):
                raise UserError(
                    f"--{name} {settings[name]} is for random weights, and --weights {recipe.model.weights} has a model of "
                    f"its own; leave --{name} out, or train from random weights with vitrail train, without --weights."
                )
    if recipe.masked:
        _check_masked(settings, recipe.own)
    elif recipe.objective != dataclasses.replace(ObjectiveSettings(), objective=recipe.objective.objective):
        raise UserError("--targets and --corrupt are of --objective masked-patch (vitrail pretrain); leave them out.")
    if recipe.model.weights is None:
        default = flat(Recipe())
        for name in ("head", "heads", "grid", "preprocess"):
            if name in recipe.given and settings[name] != default[name]:
                raise UserError(f"--{name} is about --weights, and none were given; leave it out, or give --weights.")
    elif recipe.model.head == "keep":
        for name in sorted(recipe.given & {"pool", "representation", "head_bias"}):
            if settings[name] not in ("planned", 0):
                raise UserError(
                    f"--{name.replace('_', '-')} is of a new head, and --head keep takes the one of --weights as it is; "
                    "leave one of them out."
                )


def _check_masked(settings: Mapping[str, Any], own: Own) -> None:
    default = flat(Recipe())
    for name in sorted(LABELLED):
        if settings[name] != default[name]:
            raise UserError(
                f"--{name.replace('_', '-')} is about labels, and masked patch prediction reads none; leave it out."
            )
    if settings["erasing"]:
        raise UserError("--erasing would have its noise predicted; leave it out, patches are hidden anyway.")
    if settings["pool"] == "attention":
        raise UserError(
            "--pool attention has weights that masked patch prediction does not train; give class (the model then has a "
            "class token) or mean, and let fine-tuning add it."
        )
    if own.network is not None:
        raise UserError(
            "the recipe brings a network, and masked patch prediction needs a ViT of ours, whose patches it can corrupt; "
            "name one with --model."
        )


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its flag's name, as plain JSON values."""
    return {name: value for group in _groups(recipe).values() for name, value in _settings(group).items()}


def with_settings(recipe: Recipe, settings: Mapping[str, Any], origin: str) -> Recipe:
    """The recipe with some settings changed by name. Raises UserError that names `origin` and the nearest name."""
    known = flat(recipe)
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"{origin} has no setting named {name!r}; the nearest is {near[0]!r}.")
    for group, old in _groups(recipe).items():
        given = {name: settings[name] for name in _settings(old) if name in settings}
        if given:
            try:
                new = from_json(
                    type(old), {**_settings(old), **{name: to_json(value) for name, value in given.items()}}
                )
            except ValueError as error:
                raise UserError(f"{origin}: {error}.") from error
            recipe = dataclasses.replace(recipe, **{group: new})
    return dataclasses.replace(recipe, given=frozenset({*recipe.given, *settings}))


def _groups(recipe: Recipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name not in ("own", "given")}


def _settings(group: Any) -> dict[str, Any]:
    return {f.name: to_json(getattr(group, f.name)) for f in dataclasses.fields(group)}
