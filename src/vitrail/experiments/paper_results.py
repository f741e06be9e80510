"""What the paper and its authors report: the tables of "An Image is Worth 16x16 Words" (arXiv 2010.11929), as data.

Accuracies are top-1 in per cent. A pre-training is a `Start`; a transfer of it is a start and a task. Where two tables
disagree on one number, both are given, and the first is what a run is expected to reach.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Start(NamedTuple):
    """A pre-training: the model as `vitrail models` names it; "jft", "i21k" or "imagenet"; epochs."""

    model: str
    corpus: str
    epochs: int


class Published(NamedTuple):
    """value: in per cent. what: was measured. source: where it stands."""

    value: float
    what: str
    source: str


TASKS = ("imagenet", "real", "cifar10", "cifar100", "pets", "flowers")
"""As Tables 5 and 6 have them, `real` being ImageNet with the ReaL labels."""

VTAB = {
    "natural": ("caltech101", "cifar100", "dtd", "flowers", "pets", "sun397", "svhn"),
    "specialized": ("camelyon", "eurosat", "resisc45", "retinopathy"),
    "structured": (
        *("clevr-count", "clevr-dist", "dmlab", "dspr-loc", "dspr-ori", "kitti-dist", "snorb-azim", "snorb-elev"),
    ),
}
"""The 19 tasks of VTAB-1k in Table 9's order."""
VTAB_TASKS = tuple(f"vtab/{task}" for group in VTAB.values() for task in group)

H14_JFT, L16_JFT, L16_I21K = Start("ViT-H/14", "jft", 14), Start("ViT-L/16", "jft", 14), Start("ViT-L/16", "i21k", 90)

# Table 2: ImageNet at 512 px (L/16) and 518 px (H/14) with Polyak averaging, the others as in Table 4.
TABLE_2 = {
    H14_JFT: (88.55, 90.72, 99.50, 94.55, 97.56, 99.68),
    L16_JFT: (87.76, 90.54, 99.42, 93.90, 97.32, 99.74),
    L16_I21K: (85.30, 88.62, 99.15, 93.25, 94.67, 99.61),
}
TABLE_2_VTAB = {H14_JFT: 77.63, L16_JFT: 76.28, L16_I21K: 72.72}
TPU_CORE_DAYS = {H14_JFT: 2500, L16_JFT: 680, L16_I21K: 230}
"""Table 2's cost of pre-training, in TPUv3-core-days; BiT-L 9,900 and Noisy Student 12,300 beside."""

# Table 5. Its JFT columns of L/16 and H/14 are the models of 14 epochs, those of ImageNet-21k of 90.
TABLE_5_MODELS = ("ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32", "ViT-H/14")
TABLE_5: dict[str, dict[str, tuple[float | None, ...]]] = {
    "imagenet": {
        "cifar10": (98.13, 97.77, 97.86, 97.94, None),
        "cifar100": (87.13, 86.31, 86.35, 87.07, None),
        "imagenet": (77.91, 73.38, 76.53, 71.16, None),
        "real": (83.57, 79.56, 82.19, 77.83, None),
        "flowers": (89.49, 85.43, 89.66, 86.36, None),
        "pets": (93.81, 92.04, 93.64, 91.35, None),
    },
    "i21k": {
        "cifar10": (98.95, 98.79, 99.16, 99.13, 99.27),
        "cifar100": (91.67, 91.97, 93.44, 93.04, 93.82),
        "imagenet": (83.97, 81.28, 85.15, 80.99, 85.13),
        "real": (88.35, 86.63, 88.40, 85.65, 88.70),
        "flowers": (99.38, 99.11, 99.61, 99.19, 99.51),
        "pets": (94.43, 93.02, 94.73, 93.09, 94.82),
    },
    "jft": {
        "cifar10": (99.00, 98.61, 99.38, 99.19, 99.50),
        "cifar100": (91.87, 90.49, 94.04, 92.52, 94.55),
        "imagenet": (84.15, 80.73, 87.12, 84.37, 88.04),
        "real": (88.85, 86.27, 89.99, 88.28, 90.33),
        "flowers": (99.56, 99.27, 99.56, 99.45, 99.68),
        "pets": (95.80, 93.40, 97.11, 95.83, 97.56),
    },
}
TABLE_5_EPOCHS = {"imagenet": (300,) * 5, "i21k": (90,) * 5, "jft": (7, 7, 14, 7, 14)}

# Table 6: all pre-trained on JFT-300M. Epochs; the accuracies in the order of TASKS; exaFLOPs of the pre-training.
TABLE_6 = {
    Start("ViT-B/32", "jft", 7): ((80.73, 86.27, 98.61, 90.49, 93.40, 99.27), 55),
    Start("ViT-B/16", "jft", 7): ((84.15, 88.85, 99.00, 91.87, 95.80, 99.56), 224),
    Start("ViT-L/32", "jft", 7): ((84.37, 88.28, 99.19, 92.52, 95.83, 99.45), 196),
    Start("ViT-L/16", "jft", 7): ((86.30, 89.43, 99.38, 93.46, 96.81, 99.66), 783),
    Start("ViT-L/16", "jft", 14): ((87.12, 89.99, 99.38, 94.04, 97.11, 99.56), 1567),
    Start("ViT-H/14", "jft", 14): ((88.08, 90.36, 99.50, 94.71, 97.11, 99.71), 4262),
    Start("BiT-R50x1", "jft", 7): ((77.54, 84.56, 97.67, 86.07, 91.11, 94.26), 50),
    Start("BiT-R50x2", "jft", 7): ((82.12, 87.94, 98.29, 89.20, 93.43, 97.02), 199),
    Start("BiT-R101x1", "jft", 7): ((80.67, 87.07, 98.48, 89.17, 94.08, 95.95), 96),
    Start("BiT-R152x1", "jft", 7): ((81.88, 87.96, 98.82, 90.22, 94.17, 96.94), 141),
    Start("BiT-R152x2", "jft", 7): ((84.97, 89.69, 99.06, 92.05, 95.37, 98.62), 563),
    Start("BiT-R152x2", "jft", 14): ((85.56, 89.89, 99.24, 91.92, 95.75, 98.75), 1126),
    Start("BiT-R200x3", "jft", 14): ((87.22, 90.15, 99.34, 93.53, 96.32, 99.04), 3306),
    Start("R50+ViT-B/32", "jft", 7): ((84.90, 89.15, 99.01, 92.24, 95.75, 99.46), 106),
    Start("R50+ViT-B/16", "jft", 7): ((85.58, 89.65, 99.14, 92.63, 96.65, 99.40), 274),
    Start("R50+ViT-L/32", "jft", 7): ((85.68, 89.04, 99.24, 92.93, 96.97, 99.43), 246),
    Start("R50+ViT-L/16", "jft", 7): ((86.60, 89.72, 99.18, 93.64, 97.03, 99.40), 859),
    Start("R50+ViT-L/16", "jft", 14): ((87.12, 89.76, 99.31, 93.89, 97.36, 99.11), 1668),
}

# Table 9: VTAB-1k, a number a task in the order of VTAB.
TABLE_9 = {
    H14_JFT: (
        *(95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9),
        *(83.3, 96.7, 91.4, 76.6),
        *(91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2),
    ),
    L16_JFT: (
        *(95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4),
        *(83.6, 96.5, 89.7, 77.1),
        *(86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1),
    ),
    L16_I21K: (
        *(90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9),
        *(82.5, 95.6, 85.2, 75.3),
        *(70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7),
    ),
}

# Not fine-tuned: google-research/vision_transformer, issue 62, an author's comment.
BEFORE_TRANSFER = {
    Start("ViT-B/16", "i21k", 90): 47.88,
    Start("ViT-B/32", "i21k", 90): 44.04,
    Start("ViT-L/16", "i21k", 90): 49.90,
    Start("ViT-L/32", "i21k", 90): 45.42,
    Start("ViT-H/14", "i21k", 90): 49.06,
    Start("ViT-B/32", "imagenet", 300): 69.19,
    Start("ViT-B/16", "imagenet", 300): 74.79,
    Start("ViT-L/32", "imagenet", 300): 66.90,
    Start("ViT-L/16", "imagenet", 300): 72.59,
}

# The README of google-research/vision_transformer: its public code fine-tuning its public weights, dropout 0 and 0.1.
REPLICATED = {
    Start("R50+ViT-B/16", "i21k", 90): {
        "cifar10": (98.72, 98.94),
        "cifar100": (90.88, 92.30),
        "imagenet": (83.72, 85.08),
    },
    Start("ViT-B/16", "i21k", 90): {"cifar10": (99.02, 98.76), "cifar100": (92.06, 91.92), "imagenet": (84.53, 84.12)},
    Start("ViT-B/32", "i21k", 90): {"cifar10": (98.88, 98.75), "cifar100": (92.31, 92.05), "imagenet": (81.66, 81.31)},
    Start("ViT-L/16", "i21k", 90): {"cifar10": (99.13, 99.14), "cifar100": (92.91, 93.22), "imagenet": (84.47, 85.05)},
    Start("ViT-L/32", "i21k", 90): {"cifar10": (99.06, 99.09), "cifar100": (93.29, 93.34), "imagenet": (81.89, 81.13)},
}


def before_transfer(start: Start) -> Iterator[Published]:
    """Of the pre-training's own classes, on pictures it has not seen."""
    if start in BEFORE_TRANSFER:
        what = "top-1 on the validation pictures of " + ("ImageNet" if start.corpus == "imagenet" else "ImageNet-21k")
        source = "google-research/vision_transformer, issue 62"
        yield Published(BEFORE_TRANSFER[start], what, source)


def transferred(start: Start, task: str, large: bool = False) -> Iterator[Published]:
    """After fine-tuning on `task`. large: on ImageNet by Table 2's settings, rather than Table 4's."""
    if task in VTAB_TASKS:
        if start in TABLE_9:
            yield Published(TABLE_9[start][VTAB_TASKS.index(task)], "top-1 on the test pictures", "Table 9")
        return
    names = {task: "top-1 on the test pictures"}
    if task == "imagenet":
        names = {task: "top-1 on the validation pictures", "real": "top-1 with the ReaL labels"}
    for name, what in names.items():
        if not large:
            for value, source in _tables_5_and_6(start, name):
                yield Published(value, what, source)
        if start in TABLE_2 and large == (task == "imagenet"):
            yield Published(TABLE_2[start][TASKS.index(name)], what, "Table 2")
        for dropout, value in enumerate(() if large else REPLICATED.get(start, {}).get(name, ())):
            yield Published(value, what, f"the official README's replication, dropout {dropout / 10:g}")


def _tables_5_and_6(start: Start, task: str) -> Iterator[tuple[float, str]]:
    if start.model in TABLE_5_MODELS:
        column = TABLE_5_MODELS.index(start.model)
        value = TABLE_5[start.corpus][task][column]
        if value is not None and start.epochs == TABLE_5_EPOCHS[start.corpus][column]:
            yield value, "Table 5"
    if start in TABLE_6:
        yield TABLE_6[start][0][TASKS.index(task)], "Table 6"
