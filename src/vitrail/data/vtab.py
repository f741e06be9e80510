"""VTAB-1k: the 19 tasks of the Visual Task Adaptation Benchmark (arXiv 1910.04867), as a table, and their label rules.

Unusual: eight labels are no labels of their sets but are worked out of what a picture shows. Each rule is a function of an
example's features by TFDS's names, so that it is the same for TFDS's files and for the owners'.

Rules, splits and the versions of TFDS's sets are those of google-research/task_adaptation (data/*.py), which made VTAB.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Group = Literal["natural", "specialized", "structured"]
CLEVR_DEPTHS = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0], np.float32)
KITTI_DEPTHS = np.array([-100.0, 8.0, 20.0, 999.0], np.float32)
NO_VEHICLE = np.float32(1000.0)
VEHICLES = 3
"""KITTI's first types: car, van, truck."""

Features = Mapping[str, Any]


def label(x: Features) -> int:
    return int(x["label"][0])


def clevr_count(x: Features) -> int:
    """Pictures show 3 to 10 objects."""
    return len(x["objects/size"]) - 3


def clevr_distance(x: Features) -> int:
    """How far the nearest object is, in six steps."""
    return step(np.asarray(x["objects/pixel_coords"], np.float32).reshape(-1, 3)[:, 2].min(), CLEVR_DEPTHS)


def kitti_distance(x: Features) -> int:
    """How far the nearest car, van or truck is, in three steps; 3 where there is none."""
    kinds = np.asarray(x["objects/type"], np.int64).reshape(-1)
    depths = np.asarray(x["objects/location"], np.float32).reshape(-1, 3)[:, 2]
    return step(min([*depths[kinds < VEHICLES], NO_VEHICLE]), KITTI_DEPTHS)


def dsprites_location(x: Features) -> int:
    """The x position, of 32, in 16 steps."""
    return int(x["label_x_position"][0]) * 16 // 32


def dsprites_orientation(x: Features) -> int:
    """The orientation, of 40, in 16 steps of two or three."""
    return int(x["label_orientation"][0]) * 16 // 40


def norb_azimuth(x: Features) -> int:
    return int(x["label_azimuth"][0])


def norb_elevation(x: Features) -> int:
    return int(x["label_elevation"][0])


def step(value: Any, thresholds: np.ndarray) -> int:
    """The last threshold that lies below `value`; one that equals it does not."""
    return int(np.flatnonzero(thresholds < value).max())


@dataclass(frozen=True)
class Task:
    """One of the 19.

    title: as Table 9 of the ViT paper calls it. folder, config, major: TFDS's name of the set and its major version (also:
    later ones of the same order).
    counts: examples of each TFDS split. validation, test: the split they are taken from, and the per cent of it that lie
    before them, each rounded down. names: other names of its folder. flip: whether a mirrored picture has the same label.
    where, licence: of the owners' files.
    """

    name: str
    title: str
    group: Group
    classes: int
    folder: str
    major: int
    counts: Mapping[str, int]
    validation: tuple[str, tuple[int, ...]]
    test: tuple[str, tuple[int, ...]]
    where: str
    licence: str
    config: str = ""
    names: tuple[str, ...] = ()
    rule: Callable[[Features], int] = label
    features: tuple[str, ...] = ("label",)
    flip: bool = True
    also: tuple[int, ...] = ()

    @property
    def majors(self) -> tuple[int, ...]:
        return (self.major, *self.also)


OFFICIAL, TENTH, FIFTH = ("validation", ()), ("train", (90,)), ("train", (80,))
TEST = ("test", ())
UNSTATED = "none stated by its owners"
CLEVR = ("clevr", 3, {"train": 70_000, "validation": 15_000, "test": 15_000}, TENTH, ("validation", ()))
CLEVR_FROM = ("https://cs.stanford.edu/people/jcjohns/clevr/", "CC BY 4.0")
SPRITES = ("dsprites", 2, {"train": 737_280}, FIFTH, ("train", (80, 10)))
SPRITES_FROM = ("https://github.com/google-deepmind/dsprites-dataset", "Apache-2.0")
NORB = ("smallnorb", 2, {"train": 24_300, "test": 24_300}, ("test", ()), ("test", (50,)))
NORB_FROM = ("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/", "for research; no redistribution")
# fmt: off
TASKS: dict[str, Task] = {task.name: task for task in (
    Task("caltech101", "Caltech101", "natural", 102, "caltech101", 3, {"train": 3060, "test": 6084}, TENTH, TEST,
          "https://data.caltech.edu/records/mzrjq-6wc02", "CC BY 4.0"),
    Task("cifar100", "CIFAR-100", "natural", 100, "cifar100", 3, {"train": 50_000, "test": 10_000}, TENTH, TEST,
          "https://www.cs.toronto.edu/~kriz/cifar.html", UNSTATED, names=("cifar",)),
    Task("dtd", "DTD", "natural", 47, "dtd", 3, {"train": 1880, "validation": 1880, "test": 1880}, OFFICIAL, TEST,
          "https://www.robots.ox.ac.uk/~vgg/data/dtd/", "for research"),
    Task("flowers", "Flowers102", "natural", 102, "oxford_flowers102", 2,
          {"train": 1020, "validation": 1020, "test": 6149}, OFFICIAL, TEST,
          "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", UNSTATED),
    Task("pets", "Pets", "natural", 37, "oxford_iiit_pet", 3, {"train": 3680, "test": 3669}, FIFTH, TEST,
          "https://www.robots.ox.ac.uk/~vgg/data/pets/", "CC BY-SA 4.0", also=(4,)),
    Task("sun397", "Sun397", "natural", 397, "sun397", 4, {"train": 76_128, "validation": 10_875, "test": 21_750},
          OFFICIAL, TEST, "https://vision.princeton.edu/projects/2010/SUN/", "for research", config="tfds"),
    Task("svhn", "SVHN", "natural", 10, "svhn_cropped", 3, {"train": 73_257, "test": 26_032}, TENTH, TEST,
          "http://ufldl.stanford.edu/housenumbers/", "for non-commercial use", names=("svhn",), flip=False),
    Task("camelyon", "Camelyon", "specialized", 2, "patch_camelyon", 2,
          {"train": 262_144, "validation": 32_768, "test": 32_768}, OFFICIAL, TEST,
          "https://github.com/basveeling/pcam", "CC0"),
    Task("eurosat", "EuroSAT", "specialized", 10, "eurosat", 2, {"train": 27_000}, ("train", (60,)),
          ("train", (60, 20)), "https://github.com/phelber/eurosat", "MIT", config="rgb"),
    Task("resisc45", "Resisc45", "specialized", 45, "resisc45", 3, {"train": 31_500}, ("train", (60,)),
          ("train", (60, 20)), "https://gcheng-nwpu.github.io/#Datasets", "for research"),
    Task("retinopathy", "Retinopathy", "specialized", 5, "diabetic_retinopathy_detection", 3,
          {"train": 35_126, "validation": 10_906, "test": 42_670}, OFFICIAL, TEST,
          "https://www.kaggle.com/c/diabetic-retinopathy-detection", "the competition's rules", config="btgraham-300",
          names=("diabetic_retinopathy",)),
    Task("clevr-count", "Clevr-Count", "structured", 8, *CLEVR, *CLEVR_FROM, names=("clevr_count",),
          rule=clevr_count, features=("objects/size",)),
    Task("clevr-dist", "Clevr-Dist", "structured", 6, *CLEVR, *CLEVR_FROM, names=("clevr_dist",),
          rule=clevr_distance, features=("objects/pixel_coords",)),
    Task("dmlab", "DMLab", "structured", 6, "dmlab", 2, {"train": 65_550, "validation": 22_628, "test": 22_735},
          OFFICIAL, TEST, "https://github.com/google-research/task_adaptation", "Apache-2.0"),
    Task("dspr-loc", "dSpr-Loc", "structured", 16, *SPRITES, *SPRITES_FROM, names=("dsprites_loc",),
          rule=dsprites_location, features=("label_x_position",), flip=False),
    Task("dspr-ori", "dSpr-Ori", "structured", 16, *SPRITES, *SPRITES_FROM, names=("dsprites_ori",),
          rule=dsprites_orientation, features=("label_orientation",), flip=False),
    Task("kitti-dist", "KITTI-Dist", "structured", 4, "kitti", 3, {"train": 6347, "validation": 423, "test": 711},
          OFFICIAL, TEST, "https://www.cvlibs.net/datasets/kitti/eval_object.php", "CC BY-NC-SA 3.0",
          rule=kitti_distance, features=("objects/type", "objects/location")),
    Task("snorb-azim", "sNORB-Azim", "structured", 18, *NORB, *NORB_FROM, names=("smallnorb_azi",),
          rule=norb_azimuth, features=("label_azimuth",), flip=False),
    Task("snorb-elev", "sNORB-Elev", "structured", 9, *NORB, *NORB_FROM, names=("smallnorb_ele",),
          rule=norb_elevation, features=("label_elevation",)),
)}
# fmt: on
"""In the order of the ViT paper's Table 9."""
