"""A folder of pictures, one sub-folder a class, with or without train, val and test folders above them.

Unusual: a picture is told by its suffix alone, so that a folder of a million files is read without opening one. What is
left alone is counted and said, never silently dropped.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.data.sources import FileSource, Packed, Read, listed, natural, printable, size, split_named

# Every kind of picture that Pillow and pillow-heif decode and that people keep in folders.
PICTURE_SUFFIXES = tuple(
    f".{kind}"
    for kinds in (
        "jpg jpeg jpe jfif png bmp dib gif tif tiff webp",
        "heic heif hif avif jp2 j2k tga ppm pgm pbm pnm pcx",
    )
    for kind in kinds.split()
)


def read_folders(root: Path) -> Read:
    """A folder of class folders, or of train, val and test folders (any usual name of them, in any case) of those."""
    inside = sub_folders(root)
    named = {split: folder for folder in inside if (split := split_named(folder.name))}
    # A folder called "train" may be a class of vehicles: it is a split only where it holds class folders itself, and
    # has another split or no other class beside it.
    beside = [folder for folder in inside if folder not in named.values() and walk(folder, root).names]
    if "train" not in named or not sub_folders(named["train"]) or (len(named) == 1 and beside):
        if inside and "train" not in named and len(named) == len(inside):
            raise UserError(
                f"{root} has {listed(f.name for f in inside)} but no train folder: add one, or give one of these."
            )
        source, notes = read_folder(root)
        first = root / Path(os.fsdecode(source.names[0])).parts[0]
        if len(source.classes) == 1 and len(sub_folders(first)) > 1:
            raise UserError(f"{root} has only one class ({first.name}): if that holds the class folders, give {first}.")
        return {"train": source}, notes
    train, notes = read_folder(named["train"])
    found: dict[str, Source] = {"train": train}
    for split in ("validation", "test"):
        if split not in named:
            continue
        folder = named[split]
        if not sub_folders(folder) and any(is_picture(file) for file in folder.iterdir()):
            notes = (*notes, f"{folder} was left out: its pictures lie in no class folders.")
        elif sub_folders(folder):
            found[split], more = read_folder(folder, train.classes)
            notes = (*notes, *more)
    if others := [printable(folder.name) for folder in inside if folder not in named.values()]:
        notes = (*notes, f"{root}: left alone, for they are no train, val or test folder: {listed(others)}.")
    return found, notes


@dataclass
class Found:
    """Picture files met under one folder, and what was left alone."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def walk(folder: Path, root: Path) -> Found:
    """All picture files below `folder`, their names relative to `root`, in natural order.

    Told by suffix alone; hidden files and folders are passed over, links are followed once. A link that leads nowhere
    is kept, so that it is named as unreadable instead of vanishing. Raises UserError on a folder that may not be read.
    """
    found, seen, waiting = Found(), set(), [folder]

    def visit(at: Path) -> Iterator[tuple[str, int]]:
        try:
            status = at.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(at) as entries:
                # One by one: an entry keeps all that the system said of it, ten times its name.
                for entry in entries:
                    suffix = Path(entry.name).suffix.lower()
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    if _leads_to_folder(entry):
                        waiting.append(Path(entry.path))
                    elif suffix not in PICTURE_SUFFIXES:
                        found.others[printable(suffix or entry.name)] += 1
                    elif entry.is_symlink() or entry.is_file():
                        yield Path(entry.path).relative_to(root).as_posix(), size(entry)
        except OSError as error:
            raise UserError(f"{at} cannot be read ({error.strerror}): give yourself permission to it.") from error

    pairs: list[tuple[str, int]] = []
    while waiting:
        pairs += visit(waiting.pop())
    pairs.sort(key=lambda pair: natural(pair[0]))
    found.names, found.sizes = [name for name, _ in pairs], [count for _, count in pairs]
    return found


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link round in a circle, or to where one may not look


def read_folder(root: Path, classes: Sequence[str] | None = None) -> tuple[FileSource, tuple[str, ...]]:
    """A folder with one sub-folder a class, and notes on what was left out.

    classes: the names to label by; None takes the sub-folders that hold pictures. Raises UserError where there are no
    pictures, no class folders, or a class that `classes` lacks.
    """
    walked = [(printable(folder.name), walk(folder, root)) for folder in sub_folders(root)]
    found = [(name, inside) for name, inside in walked if inside.names]
    named = [name for name, _ in found]
    loose = [entry for entry in root.iterdir() if is_picture(entry)]
    if not named:
        if loose:
            raise UserError(
                f"{root} holds pictures ({loose[0].name}, ...) but no class folders: put the pictures of each class "
                "into a sub-folder named after it, or give a CSV of paths and labels."
            )
        raise UserError(f"{root} holds no pictures: give a folder with one sub-folder of pictures for each class.")
    if classes is not None and (unknown := [name for name in named if name not in classes]):
        raise UserError(
            f"{root} has the class {unknown[0]!r}, which the training pictures lack: they have {listed(classes)}."
        )
    order = {name: label for label, name in enumerate(dict.fromkeys(named) if classes is None else classes)}
    notes = []
    if empty := [name for name, inside in walked if not inside.names]:
        notes.append(f"{root}: left out, for they hold no pictures: {listed(empty)}.")
    if loose:
        notes.append(f"{root}: {len(loose)} pictures outside the class folders were left out.")
    if others := sum((inside.others for _, inside in found), Counter()):
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        notes.append(f"{root}: {sum(others.values())} files that are no pictures were left alone ({kinds}).")
    source = FileSource(
        root,
        Packed.of(os.fsencode(name) for _, inside in found for name in inside.names),
        np.array([count for _, inside in found for count in inside.sizes], np.int64),
        np.repeat([order[name] for name in named], [len(inside.names) for _, inside in found]).astype(np.int64),
        tuple(order),
    )
    return source, tuple(notes)


def sub_folders(root: Path) -> list[Path]:
    """Visible folders in `root`, in natural order. Raises UserError where it may not be read."""
    try:
        inside = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise UserError(f"{root} cannot be read ({error.strerror}): give yourself permission to it.") from error
    return sorted(inside, key=lambda entry: natural(entry.name))


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".") and file.is_file()
