"""Each cell of the paper's Tables 3 and 4 as a named recipe, composed of what its row, its column and its caption say.

A name says what is composed: `vit-b16-i21k` is a cell of Table 3, `finetune-vit-b16-i21k-cifar10` one of Table 4,
started from the former. Where the paper has two lengths, the plain name is the longer one and the shorter ends in
`-7ep` or `-30ep`; where a start is left out (`finetune-vit-b16-cifar10`), it is ImageNet-21k, whose weights are public;
`-512` and `-518` at the end are Table 2's settings for ImageNet. What the paper leaves open or contradicts is said in a
recipe's notes.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from vitrail.core.errors import UserError
from vitrail.data import vtab
from vitrail.data.augment import Augmentation
from vitrail.experiments.paper_results import REPLICATED, TABLE_6, Published, Start
from vitrail.experiments.recipe import DataSettings, LengthSettings, LossSettings, ModelSettings, Recipe
from vitrail.training.optim import Optimiser, Schedule
from vitrail.weights import zoo


@dataclass(frozen=True)
class Corpus:
    """What Table 3 and its caption say of one data set, for all models. title: for people. pictures, classes: it has.
    held_out: share that we keep back to measure on; the paper does not say what it kept."""

    title: str
    pictures: int
    classes: int
    schedule: Schedule
    weight_decay: float
    dropout: float
    clip: float
    head_bias: float
    held_out: float


_WARM_UP = 10_000
_LAST_RATE = 1e-5
CORPORA = {
    "jft": Corpus("JFT-300M", 303_000_000, 18_291, Schedule(_WARM_UP, "linear"), 0.1, 0.0, 0.0, -10.0, 0.001),
    "i21k": Corpus("ImageNet-21k", 12_400_000, 21_843, Schedule(_WARM_UP, "linear"), 0.03, 0.1, 0.0, -10.0, 0.004),
    "imagenet": Corpus("ImageNet", 1_281_167, 1_000, Schedule(_WARM_UP, "cosine"), 0.3, 0.1, 1.0, -6.9, 0.01),
}

# Table 3: data set, models, lengths in epochs, base learning rate.
TABLE_3 = (
    ("jft", ("ViT-B/16", "ViT-B/32"), (7,), 8e-4),
    ("jft", ("ViT-L/32",), (7,), 6e-4),
    ("jft", ("ViT-L/16",), (7, 14), 4e-4),
    ("jft", ("ViT-H/14",), (14,), 3e-4),
    ("jft", ("BiT-R50x1", "BiT-R50x2"), (7,), 1e-3),
    ("jft", ("BiT-R101x1",), (7,), 8e-4),
    ("jft", ("BiT-R152x1", "BiT-R152x2"), (7,), 6e-4),
    ("jft", ("R50+ViT-B/16", "R50+ViT-B/32"), (7,), 8e-4),
    ("jft", ("R50+ViT-L/32",), (7,), 2e-4),
    ("jft", ("R50+ViT-L/16",), (7, 14), 4e-4),
    ("i21k", ("ViT-B/16", "ViT-B/32"), (90,), 1e-3),
    ("i21k", ("ViT-L/16", "ViT-L/32"), (30, 90), 1e-3),
    ("imagenet", ("ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32"), (300,), 3e-3),
)
RATES = {
    Start(model, corpus, epochs): rate
    for corpus, models, lengths, rate in TABLE_3
    for model in models
    for epochs in lengths
}
STARTS = tuple(dict.fromkeys((*RATES, *TABLE_6, *REPLICATED, Start("ViT-H/14", "i21k", 90))))
"""The pre-trainings of Table 3, and those that are only transferred: the paper gives results of theirs, no settings."""

PUBLIC = {
    Start(model, "i21k", 90): f"official:imagenet21k/{file}"
    for model, file in (
        ("ViT-B/16", "ViT-B_16"),
        ("ViT-B/32", "ViT-B_32"),
        ("ViT-L/16", "ViT-L_16"),
        ("ViT-L/32", "ViT-L_32"),
        ("ViT-H/14", "ViT-H_14"),
        ("R50+ViT-B/16", "R50+ViT-B_16"),
    )
}
"""Weights that Google released, which `vitrail models --remote` lists too."""


@dataclass(frozen=True)
class Task:
    """A row of Table 4. rates: to choose from, on `held_out` of the training pictures (B.1.1). rate: taken without a
    sweep. warmup: the official code's (500), big_vision's for the short tasks (100)."""

    title: str
    pictures: int
    classes: int
    steps: int
    rates: tuple[float, ...]
    rate: float
    held_out: float
    warmup: int = 500


_RATES = (0.001, 0.003, 0.01, 0.03)
TABLE_4 = {
    "imagenet": Task("ImageNet", 1_281_167, 1_000, 20_000, (0.003, 0.01, 0.03, 0.06), 0.03, 0.01),
    "cifar100": Task("CIFAR-100", 50_000, 100, 10_000, _RATES, 0.01, 0.02),
    "cifar10": Task("CIFAR-10", 50_000, 10, 10_000, _RATES, 0.01, 0.02),
    "pets": Task("Oxford-IIIT Pets", 3_680, 37, 500, _RATES, 0.003, 0.1, 100),
    "flowers": Task("Oxford Flowers-102", 1_020, 102, 500, _RATES, 0.003, 0.1, 100),
}
TABLE_4 |= {
    f"vtab/{name}": Task(f"VTAB-1k {name}", 1_000, task.classes, 2_500, (0.01,), 0.01, 0.0)
    for name, task in vtab.TASKS.items()
}

UNCROPPED = tuple(f"vtab/{name}" for name, task in vtab.TASKS.items() if task.group == "structured")
UNFLIPPED = tuple(f"vtab/{name}" for name, task in vtab.TASKS.items() if not task.flip)
"""Tasks that count, place, turn or read things: a crop or a flip would make their labels wrong. BiT, whose pre-processing
the paper takes for VTAB, leaves them out "when appropriate" (arXiv 1912.11370, section 3.3); for which is our reading."""

SIDE = 384
"""Pixels of the pictures that Table 4 fine-tunes on."""
LARGE = {"ViT-L/16": 512, "ViT-H/14": 518}
"""Table 2's resolution for ImageNet, with Polyak averaging by 0.9999."""

# google-research/big_vision, configs/vit_i21k.py: mixup's p, RandAugment's operations and magnitude.
AUGREG = {
    "none": (0.0, None),
    "light1": (0.0, (2, 0.0)),
    "light2": (0.2, (2, 10.0)),
    "medium1": (0.2, (2, 15.0)),
    "medium2": (0.5, (2, 15.0)),
    "strong1": (0.5, (2, 20.0)),
    "strong2": (0.8, (2, 20.0)),
}


def augreg(recipe: Recipe, level: str) -> Recipe:
    """The recipe with one of AugReg's levels of mixup and RandAugment. Raises UserError on a level that is none."""
    if level not in AUGREG:
        raise UserError(f"--augreg {level!r} is no level of AugReg; give one of {', '.join(AUGREG)}.")
    mixup, randaugment = AUGREG[level]
    changed = dataclasses.replace(recipe.augmentation, mixup=mixup, randaugment=randaugment)
    return dataclasses.replace(recipe, augmentation=changed)


@dataclass(frozen=True)
class Cell:
    """A named recipe. task: None in Table 3. published: what is reported of it, what a run should reach first.
    weights: public ones to start from, "" where there are none."""

    name: str
    start: Start
    task: str | None
    recipe: Recipe
    published: tuple[Published, ...]
    notes: tuple[str, ...]
    weights: str = ""

    @property
    def table(self) -> str:
        return f"Table {3 if self.task is None else 4}"

    @property
    def data(self) -> str:
        """What --data calls its pictures."""
        return self.task or self.start.corpus

    @property
    def source(self) -> Corpus | Task:
        return CORPORA[self.start.corpus] if self.task is None else TABLE_4[self.task]

    @property
    def pictures(self) -> int:
        """That it trains on in all, repeats counted."""
        if self.task is None:
            return CORPORA[self.start.corpus].pictures * self.start.epochs
        return TABLE_4[self.task].steps * self.recipe.data.batch

    @property
    def exaflops(self) -> float:
        size = self.recipe.data.size[0]
        return exaflops(self.start.model, self.pictures, size)

    @property
    def evaluators(self) -> tuple[str, ...]:
        """What measures it, as commands after the run where it is not the run itself."""
        if self.task == "imagenet":
            return ("top-1, by the run", "vitrail evaluate RUN --data imagenet:PATH --labels real")
        if self.task is not None:
            return ("top-1, by the run",)
        transfer = f"vitrail run finetune-{self.name}-TASK --weights RUN"
        return ("top-1 on the held-out pictures, by the run", "vitrail probe RUN (few-shot, section 4.1)", transfer)


def exaflops(model: str, pictures: int, size: int = 224) -> float:
    """The paper's measure of a training: two operations a multiply-accumulate, thrice a forward pass. Table 6's column
    within 2.5 % for ViTs and hybrids, and 3 to 4 % above it for ResNets, whose operations it must count otherwise."""
    return 6 * zoo.config(model, (size, size)).macs() * pictures / 1e18


def pretraining(start: Start) -> Recipe:
    """A cell of Table 3."""
    corpus, rate = CORPORA[start.corpus], RATES[start]
    resnet = start.model.startswith("BiT")
    end = _LAST_RATE / rate if corpus.schedule.schedule == "linear" else 0.0
    return Recipe(
        data=DataSettings(size=(224,), crop="inception", batch=4096, validation=corpus.held_out),
        model=ModelSettings(
            model=start.model,
            pool="mean" if resnet else "class",
            positions="planned" if resnet else "learned",
            dropout=corpus.dropout,
            representation=0 if resnet else zoo.config(start.model).width,
            head_bias=corpus.head_bias,
        ),
        augmentation=Augmentation(flip=True),
        loss=LossSettings(loss="sigmoid"),
        optimiser=Optimiser("adam", rate, weight_decay=corpus.weight_decay, decay="adamw", clip=corpus.clip),
        schedule=dataclasses.replace(corpus.schedule, end=end),
        length=LengthSettings(epochs=float(start.epochs)),
    )


def side(stride: tuple[int, int]) -> int:
    """`SIDE`, or the next smaller size that patches of `stride` pixels (height, width) fill: 378 for those of 14, which is
    what the official code's patches cover of 384. A patch that is larger yet is a picture of its own."""
    step = math.lcm(*stride)
    return max(SIDE // step, 1) * step


def finetuning(start: Start, task: str, size: int = 0) -> Recipe:
    """A cell of Table 4; with a `size`, of Table 2 at that resolution."""
    row = TABLE_4[task]
    weights = PUBLIC.get(start)
    pixels = size or side(zoo.config(start.model).stride)
    return Recipe(
        data=DataSettings(
            size=(pixels,), crop="none" if task in UNCROPPED else "inception", batch=512, validation=row.held_out
        ),
        model=ModelSettings(weights=Path(weights) if weights else None),
        augmentation=Augmentation(flip=task not in UNFLIPPED),
        optimiser=Optimiser("sgd", row.rate, weight_decay=0.0, decay="l2", polyak=0.9999 if size else 0.0),
        schedule=Schedule(row.warmup, "cosine"),
        length=LengthSettings(steps=row.steps),
    )
