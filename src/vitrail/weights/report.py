"""What was done to a foreign file to make it a model: nothing is renamed, folded, resampled or left out in silence."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.core.types import Numerics, Preprocess
from vitrail.core.values import to_json
from vitrail.weights.conversion import Head
from vitrail.weights.source import sha256


@dataclass(frozen=True)
class LoadReport:
    """A loaded model's `report`.

    format: the file's dialect, "official". architecture: one line. loaded: tensors of the file that are in use.
    preprocess_source: "stated in FILE" or "assumed: WHY". numerics: None where the family has none of its own.
    renamed: pairs (theirs, ours). resampled, folded: sentences on what was computed. left_out: pairs (key, why).
    dtypes: each type in the file, with an arrow where it was changed. notes: what a person should know.
    files, modified: what was read, and each one's time of change (st_mtime_ns) then.
    """

    path: str
    format: str
    architecture: str
    preprocess: Preprocess
    preprocess_source: str
    numerics: Numerics | None
    loaded: int
    renamed: tuple[tuple[str, str], ...]
    resampled: tuple[str, ...]
    folded: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    head: Head
    classes: int | None
    labels: int
    dtypes: tuple[str, ...]
    files: tuple[Path, ...]
    modified: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of what was read, computed when it is first asked for: it takes as long as loading."""
        return sha256(self.files, self.modified)

    def as_json(self) -> dict[str, Any]:
        """With the digest."""
        return {**to_json(self), "sha256": self.sha256}

    def lines(self) -> Iterator[tuple[str, str]]:
        """(what, words), in the order a person asks; `str` puts them on one page."""
        yield "file", self.path
        yield "sha256", self.sha256
        yield "format", self.format
        yield "architecture", self.architecture
        if self.numerics is not None:
            yield "numerics", described_numerics(self.numerics)
        yield "preprocessing", described_preprocess(self.preprocess)
        yield "", self.preprocess_source
        count = f", {self.classes:,} outputs" if self.classes is not None else ""
        yield "head", self.head + count + (", with names" if self.labels else "")
        changed = sum(theirs != ours for theirs, ours in self.renamed)
        yield "tensors", f"{self.loaded} loaded ({', '.join(self.dtypes)}), {changed} under another name"
        for what, sentences in (("resampled", self.resampled), ("folded", self.folded)):
            for sentence in sentences:
                yield what, sentence
        for key, why in self.left_out:
            yield "left out", f"{key}: {why}"
        for note in self.notes:
            yield "note", note

    def __str__(self) -> str:
        return page(self.lines())


def page(lines: Iterable[tuple[str, str]], width: int | None = None) -> str:
    """(what, words) on one page; in a terminal that is `width` wide, the words stay in their own column."""

    def set_out(what: str, words: str) -> str:
        line = f"{what:<14}{words}".rstrip()
        if width is None or len(line) <= width:
            return line
        narrow = textwrap.wrap(words, max(width - 14, 20), break_long_words=False, break_on_hyphens=False)
        return f"{what:<14}" + f"\n{'':<14}".join(narrow)

    return "\n".join(set_out(what, words) for what, words in lines)


def terminal_width() -> int | None:
    """None where nobody reads the output but a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def described_numerics(numerics: Numerics) -> str:
    return (
        f"GELU {numerics.gelu}, norm epsilon {numerics.norm_epsilon:g}, position grid resampled by {numerics.resample}"
    )


def described_preprocess(preprocess: Preprocess) -> str:
    height, width = preprocess.size
    if preprocess.resize is None:
        how = f"resized to {height} x {width}"
    elif isinstance(preprocess.resize, int):
        how = f"shorter side to {preprocess.resize}, central crop {height} x {width}"
    else:
        how = f"resized to {preprocess.resize[0]} x {preprocess.resize[1]}, central crop {height} x {width}"
    numbers = [" ".join(f"{value:g}" for value in values) for values in (preprocess.mean, preprocess.deviation)]
    return f"{how}, {preprocess.interpolation}; mean {numbers[0]}, deviation {numbers[1]}"
