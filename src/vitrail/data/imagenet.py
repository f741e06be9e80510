"""ImageNet and the sets that are measured with its classes: V2, A, R, Sketch and ObjectNet, as their owners publish them.

Unusual: the classes of these sources are WordNet ids ("n01440764"), since that is what the owners' folders are called; V2's
are the numbers of the classes in the order of every public head, 0 to 999, and ObjectNet's its own folders. What a class is
called, and which of a model's classes it is, is evaluation/suites.py's to say.
"""

import csv
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data.decode import decode
from vitrail.data.folders import read_folder, sub_folders
from vitrail.data.published import files, matlab
from vitrail.data.sources import FileSource, Read, digest, listed, subset

WORDNET = re.compile(r"n\d{8}")
FLAT = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
BORDER = 2
"""Red pixels around every ObjectNet picture, which its authors ask to be cut off."""


def validation_number(name: str) -> int | None:
    """Of a validation picture of ImageNet, its place among the 50,000, from 0; None for any other name."""
    found = FLAT.search(name)
    return int(found[1]) - 1 if found else None


def imagenet(path: Path) -> Read:
    """ImageNet 2012. train/WNID/*.JPEG gives "train"; the validation pictures, in WNID folders or flat, give "test".

    path: the folder that holds train and val (or Kaggle's ILSVRC), or the validation pictures themselves. Flat pictures are
    labelled by the devkit's ground truth or Kaggle's LOC_val_solution.csv where one lies beside them, else by -1, which is
    enough for ReaL.
    """
    root = next((folder for folder in (path / "ILSVRC/Data/CLS-LOC", path) if folder.is_dir()), path)
    train, val = root / "train", next((root / name for name in ("val", "validation") if (root / name).is_dir()), root)
    found: dict[str, Source] = {}
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    if train.is_dir():
        found["train"], notes = read_folder(train)
        classes = found["train"].classes
        refuse_unless(train, classes, WORDNET, "WordNet ids")
    if val != root or not found:
        if ids := [folder.name for folder in sub_folders(val) if WORDNET.fullmatch(folder.name)]:
            found["test"], more = read_folder(val, classes or tuple(ids))
        else:
            found["test"], more = _flat(val, (path, path.parent, root, val, val.parent), classes)
        notes = (*notes, *more)
    return found, notes


def _flat(folder: Path, places: tuple[Path, ...], classes: tuple[str, ...] | None) -> tuple[Source, tuple[str, ...]]:
    names = sorted(entry.name for entry in folder.iterdir() if FLAT.fullmatch(entry.name))
    if not names:
        raise UserError(
            f"{folder} holds neither folders of WordNet ids nor ILSVRC2012_val_00000001.JPEG and on: give --data "
            "imagenet: and the folder with ImageNet's train and val."
        )
    truth, origin = _ground_truth(places)
    if truth is None:
        note = (
            f"{folder}: no labels were found (devkit or LOC_val_solution.csv); only ReaL's can be counted, by --labels "
            "real."
        )
        return files(folder, names, [-1] * len(names), classes or ()), (note,)
    known = classes or tuple(sorted(set(truth.values())))
    order = {name: label for label, name in enumerate(known)}
    numbers = [validation_number(name) for name in names]
    labels = [order.get(truth.get(number, ""), -1) for number in numbers if number is not None]
    return files(folder, names, labels, known), (f"{folder}: labels from {origin}.",)


def _ground_truth(places: tuple[Path, ...]) -> tuple[dict[int, str] | None, str]:
    """The WordNet id of each validation picture by its number from 0, and the file that says so."""
    for place in places:
        if (file := place / "LOC_val_solution.csv").is_file():
            with file.open(encoding="utf-8", newline="") as opened:
                rows = [(row["ImageId"], row["PredictionString"]) for row in csv.DictReader(opened)]
            return {int(name[-8:]) - 1: words.split()[0] for name, words in rows}, str(file)
        for devkit in (place, place / "data", place / "ILSVRC2012_devkit_t12/data"):
            file, meta = devkit / "ILSVRC2012_validation_ground_truth.txt", devkit / "meta.mat"
            if file.is_file() and meta.is_file():
                synsets = matlab(meta, "synsets").ravel()
                ids = {int(entry["ILSVRC2012_ID"].item()): str(entry["WNID"].item()) for entry in synsets}
                numbers = [int(line) for line in file.read_text(encoding="utf-8").split()]
                return {place: ids[number] for place, number in enumerate(numbers)}, str(file)
    return None, ""


def variant(path: Path, name: str) -> Read:
    """V2, A, R or Sketch: one folder a class, in `path` or in the single folder it holds."""
    pattern, what = (
        (re.compile(r"\d{1,3}"), "numbers from 0 to 999") if name == "imagenet-v2" else (WORDNET, "WordNet ids")
    )
    folders = sub_folders(path)
    if len(folders) == 1 and not pattern.fullmatch(folders[0].name):
        return variant(folders[0], name)
    source, notes = read_folder(path)  # folders in natural order: 2 before 10
    refuse_unless(path, source.classes, pattern, what)
    return {"test": source}, notes


def refuse_unless(path: Path, classes: tuple[str, ...], pattern: re.Pattern[str], what: str) -> None:
    """Raises UserError on class folders that are not named as the set's owners name them."""
    if odd := [name for name in classes if not pattern.fullmatch(name)]:
        raise UserError(f"{path} has folders that are not called by {what} ({listed(odd)}): give the owners' folder.")


@dataclass(frozen=True)
class Cropped:
    """Another source's pictures without their border."""

    source: Source
    border: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        return self.source.labels

    @property
    def fingerprint(self) -> str:
        return digest((self.source.fingerprint, f"without a border of {self.border}"))

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return str(getattr(self.source, "key")(index))  # noqa: B009, a protocol does not know of keys

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        pixels = np.asarray(decode(sample.picture, 3, None, sample.name))
        edge = self.border
        return replace(sample, picture=np.ascontiguousarray(pixels[edge:-edge, edge:-edge]))


def objectnet(path: Path) -> Read:
    """ObjectNet: images/FOLDER/*.png and mappings/. Only the objects that ImageNet has are kept, borders cut off."""
    root = objectnet_root(path)
    answers = objectnet_answers(root)
    source, notes = read_folder(root / "images")
    kept = [label for label, name in enumerate(source.classes) if name in answers]
    if not kept:
        raise UserError(f"{root / 'images'} holds none of the folders that {root / 'mappings'} speaks of.")
    inside = np.flatnonzero(np.isin(source.labels, kept))
    chosen = subset(source, inside)
    renumbered = FileSource(
        source.root,
        type(source.names).of(source.names[int(place)] for place in inside),
        source.sizes[inside],
        np.searchsorted(kept, chosen.labels).astype(np.int64),
        tuple(source.classes[label] for label in kept),
    )
    note = (
        f"{root}: {len(kept)} of its {len(source.classes)} objects are ImageNet's, with {len(renumbered):,} of "
        f"{len(source):,} pictures; the others do not count."
    )
    return {"test": Cropped(renumbered, BORDER)}, (*notes, note)


def objectnet_root(path: Path) -> Path:
    for root in (path, path / "objectnet-1.0"):
        if (root / "images").is_dir() and (root / "mappings").is_dir():
            return root
    raise UserError(f"{path} has no images and mappings folders: unpack ObjectNet as it comes, and give that folder.")


def objectnet_answers(root: Path) -> dict[str, tuple[int, ...]]:
    """By folder, the classes (0 to 999, in the order of every public head) that count as that object.

    From ObjectNet's own mapping files: folder -> object -> names of ImageNet classes, "; " between them -> their lines in
    imagenet_to_label_2012_v2, from 0 -> numbers in the heads. Raises UserError where one is missing or does not fit.
    """
    mappings = root / "mappings"
    try:
        read = {
            name: json.loads((mappings / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k", "pytorch_to_imagenet_2012_id")
        }
        lines = (mappings / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
        line = {words.strip(): number for number, words in enumerate(lines)}
        head = {int(number): int(place) for place, number in read["pytorch_to_imagenet_2012_id"].items()}
        imagenet_names = read["objectnet_to_imagenet_1k"]
        return {
            folder: tuple(head[line[words.strip()]] for words in imagenet_names[label].split("; "))
            for folder, label in read["folder_to_objectnet_label"].items()
            if label in imagenet_names
        }
    except OSError as error:
        raise UserError(f"{error.filename} is missing; ObjectNet comes with it in its mappings folder.") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{mappings} does not fit together ({error!r}); fetch ObjectNet's mappings anew.") from error
