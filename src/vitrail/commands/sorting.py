"""New photos copied into folders by class, and what the model is not sure enough of into a folder of its own.

Nothing is ever moved, overwritten or lost: files are created or not at all, a picture that is there already (equal byte
for byte) is left as it is, and another one of the same name gets a number.
"""

import filecmp
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.evaluation.chance import Threshold, threshold
from vitrail.experiments.photos_folder import read_confidences

UNSURE = "unsure"


@dataclass(frozen=True)
class Sorter:
    """into: the folder. folders: of each class, in the model's order. unsure: the folder of what is not trusted."""

    into: Path
    folders: dict[str, str]
    unsure: str
    promise: float
    trusted: Threshold

    def place(self, picture: Path, label: str, probability: float) -> tuple[str, bool]:
        """The name of the folder that a picture belongs in, and whether it was copied (or was there before)."""
        folder = self.folders[label] if probability >= self.trusted.confidence else self.unsure
        return folder, copy(picture, self.into / folder)

    def said(self, placed: "Counter[tuple[str, bool]]") -> list[str]:
        """What was done, for people. placed: how often `place` gave what."""
        counts: Counter[str] = Counter()
        for (folder, _), count in placed.items():
            counts[folder] += count
        there, trusted = sum(count for (_, fresh), count in placed.items() if not fresh), self.trusted
        promise = f"{100 * self.promise:g} %"
        first = (
            f"sure from a confidence of {trusted.confidence:.3f} on: {100 * trusted.accuracy:.1f} % of the "
            f"{trusted.trusted:,} held-out pictures above it are right, at least {100 * trusted.low:.1f} % with 95 % "
            f"confidence ({promise} promised); {trusted.of - trusted.trusted:,} of {trusted.of:,} would be left unsure."
            if trusted.trusted
            else f"the {trusted.of:,} held-out pictures cannot prove {promise} for any answer, so all are left unsure; "
            "promise less, or fit with more pictures."
        )
        names = [*self.folders.values(), self.unsure]
        lines = [f"  {name}: {counts[name]:,}" for name in names if counts[name]]
        again = f" ({there:,} were there already)" if there else ""
        return [first, *lines, f"copied {placed.total() - there:,} pictures into {self.into}{again}."]


def sorter(
    into: Path, weights: Path, inputs: Sequence[str], labels: Sequence[str], promise: float, checkpoint: Checkpoint
) -> Sorter:
    """Raises UserError where it cannot be done, before any picture is looked at."""
    if not 0 < promise < 1:
        raise UserError(f"--promise is {promise:g}; give a share of right answers above 0 and below 1, as 0.95.")
    changes = {
        f"--merge {checkpoint.merge}": bool(checkpoint.merging),
        "--precision int8": checkpoint.precision == "int8",
        f"--preprocess {checkpoint.preprocess}": checkpoint.preprocess,
    }
    for flag in (flag for flag, there in changes.items() if there):
        raise UserError(
            f"--sort-into keeps a promise that was measured on the model as it is, and {flag} changes its answers; leave one"
            " of them out."
        )
    target = into.resolve()
    if into.exists() and not into.is_dir():
        raise UserError(f"--sort-into {into} is a file; give a folder.")
    for name in inputs:
        if name == "-":
            raise UserError("--sort-into copies files, and standard input is none; name files or folders.")
        given = Path(name).resolve()
        if given.is_dir() and (target == given or given in target.parents):
            raise UserError(
                f"--sort-into {into} lies in {name}, whose pictures are to be sorted; give a folder outside of it."
            )
    confidence, right = read_confidences(weights if weights.is_dir() else weights.parent)
    folders: dict[str, str] = {}
    for label in labels:
        plain = label.replace(os.sep, "_").replace("\0", "_")
        plain = plain if plain.strip(". ") else f"_{plain}"
        while plain.casefold() in map(str.casefold, folders.values()):
            plain += "_"
        folders[label] = plain
    unsure = UNSURE
    while unsure in map(str.casefold, folders.values()):
        unsure = f"_{unsure}"
    return Sorter(into, folders, unsure, promise, threshold(confidence, right, promise))


def copy(picture: Path, folder: Path) -> bool:
    """Whether it was copied; False where it is there already. Raises UserError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            place = folder / (picture.name if number == 1 else f"{picture.stem}-{number}{picture.suffix}")
            try:
                with place.open("xb") as new:
                    try:
                        with picture.open("rb") as old:
                            shutil.copyfileobj(old, new)
                    except BaseException:
                        place.unlink()  # half a picture is none
                        raise
                shutil.copystat(picture, place)
                return True
            except FileExistsError:
                if place.is_file() and filecmp.cmp(picture, place, shallow=False):
                    return False
                number += 1
    except OSError as error:
        raise UserError(
            f"{picture} could not be copied into {folder} ({error.strerror}); make room, or give another --sort-into."
        ) from error
