"""Pictures named by a table: CSV and JSON of paths and labels; parquet files and hub data sets of pictures themselves.

Unusual: `datasets` is imported inside the functions that need it (it takes a second), and always with
Image(decode=False): one bad picture would end its iterator, and EXIF orientation is ours to obey. It keeps one Arrow
copy of a parquet file in its cache (HF_DATASETS_CACHE), memory-mapped, so that a set larger than memory can be fetched
from in any order.

Every reader returns its sources by split ("train", "validation", "test") and notes on what was left out. Asked for
pictures alone (labelled=False), it neither needs nor reads labels: each is -1, and there are no classes.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vitrail.core.errors import UserError
from vitrail.core.types import Sample, Source
from vitrail.data.sources import FileSource, Packed, Read, digest, listed, natural, place, size, split_named, subset

LISTINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
PATH_COLUMNS = ("image", "path", "file", "filename", "picture", "file_name", "filepath", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "labels", "category", "fine_label")


def read_listing(file: Path, labelled: bool = True) -> Read:
    """A CSV, TSV, JSON or JSON-lines file that names pictures, relative to itself, and their labels.

    Columns in any case: the picture's path among PATH_COLUMNS, its label among LABEL_COLUMNS, and optionally `split`.
    Classes are the distinct labels of the training rows in natural order. Raises UserError on anything missing.
    """
    rows = list(records(file))
    if not rows:
        raise UserError(f"{file} lists no pictures: give it a row of path and label for each picture.")
    columns = {str(name).strip().casefold(): name for name in rows[0][1]}
    path = pick(file, columns, PATH_COLUMNS, "paths")
    label = pick(file, columns, LABEL_COLUMNS, "labels") if labelled else ""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for where, row in rows:
        if not isinstance(row.get(path), str) or not row[path].strip():
            raise UserError(f"{where} has no path in its column {path!r}: give it one or take the row out.")
        if labelled and (not isinstance(row.get(label), (str, int, float)) or not str(row[label]).strip()):
            raise UserError(
                f"{where} has {row.get(label)!r} as its label: give one word or number, or take the row out."
            )
        split = "train"
        if "split" in columns:
            word = str(row.get(columns["split"]) or "")
            if (split := split_named(word) or "") == "":
                raise UserError(f"{where} has the split {word!r}: it must be train, val or test.")
        names, labels = found.setdefault(split, ([], []))
        names.append(row[path].strip())
        labels.append(str(row[label]).strip() if labelled else "")
    classes = known_classes(file, {split: labels for split, (_, labels) in found.items()}) if labelled else ()
    order = {word: place for place, word in enumerate(classes)}
    sources: dict[str, Source] = {
        split: FileSource(
            file.parent,
            Packed.of(os.fsencode(name) for name in names),
            np.array([size(file.parent / name) for name in names], np.int64),
            np.array([order[word] if labelled else -1 for word in labels], np.int64),
            classes,
        )
        for split, (names, labels) in found.items()
    }
    if all((source.sizes < 0).all() for source in sources.values() if isinstance(source, FileSource)):
        first = next(iter(found.values()))[0][0]
        raise UserError(
            f"{file} names {len(rows)} pictures of which none exists (first {first}): give paths from its folder."
        )
    return sources, ()


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a listing as dicts, each with words for where it stands. Raises UserError on a damaged file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".csv", ".tsv"):
            first = text.partition("\n")[0]
            delimiter = max("\t,;|", key=first.count)
            reader = csv.DictReader(text.splitlines(), delimiter=delimiter)
            yield from ((f"{file}, line {reader.line_num},", row) for row in reader)
        else:
            if file.suffix.lower() == ".json":
                rows = json.loads(text)
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise UserError(
                    f"{file} is not a list of objects: give one {{'path': ..., 'label': ...}} for each picture."
                )
            yield from ((f"{file}, entry {number},", row) for number, row in enumerate(rows, 1))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give yourself permission to it.") from error
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as {file.suffix[1:].upper()} ({error}): mend it or save it anew."
        ) from error


def pick(file: Path | str, columns: Mapping[str, str], wanted: Sequence[str], what: str) -> str:
    """The first of the `wanted` columns that is there, as the file spells it. Raises UserError naming those found."""
    for name in wanted:
        if name in columns:
            return columns[name]
    raise UserError(
        f"{file} has no column of {what}: it has {listed(columns)}; name one of them {' or '.join(wanted[:3])}."
    )


def known_classes(where: Path | str, labels: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Distinct labels of the training split. Raises UserError where another split has one that it lacks."""
    classes = tuple(sorted(set(labels.get("train", ())), key=natural))
    for split, words in labels.items():
        if unknown := sorted(set(words) - set(classes), key=natural):
            raise UserError(
                f"{where} has the class {unknown[0]!r} in {split}, which the training pictures lack: they have "
                f"{listed(classes) or 'none'}."
            )
    return classes


@dataclass(frozen=True)
class TableSource:
    """Rows of a `datasets.Dataset`, pictures undecoded. sizes: (len,) bytes of each picture, -1 where unknown."""

    origin: str
    table: Any
    image: str
    sizes: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.classes, self.labels, self.sizes)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def key(self, index: int) -> str:
        return f"row {place(index, len(self))}"

    def __getitem__(self, index: int) -> Sample:
        name = f"{self.origin}, {self.key(index)}"
        cell = self.table[int(index)][self.image]
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"] or "")
        # A row without a picture becomes an empty file: unreadable, and named as such.
        return Sample(name, b"" if cell is None else cell, int(self.labels[index]))


def read_parquet(path: Path, labelled: bool = True) -> Read:
    """A parquet file, or all below a folder: those whose name or folder says val or test belong to that split."""
    import pyarrow.parquet as pq
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    by_split: dict[str, list[str]] = {}
    for file in [path] if path.is_file() else parquet_files(path):
        try:
            pq.read_schema(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read as parquet ({first_line(error)}): fetch or write it anew."
            ) from error
        # One file is all there is, whatever it is called; the last word that names a split is the nearest to the file.
        words = re.split(r"[^A-Za-z]+", str(file.relative_to(path).with_suffix("")) if path.is_dir() else "")
        split = next((split for word in reversed(words) if (split := split_named(word))), "train")
        by_split.setdefault(split, []).append(str(file))
    try:
        return from_tables(path.name, load_dataset("parquet", data_files=by_split), labelled)
    except (DatasetsError, OSError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{path} cannot be read as parquet ({reason}): fetch or write it anew.") from error


def holds_parquet(folder: Path) -> bool:
    """Whether there is a parquet file in it or one folder further down, where every layout has them."""
    return any(True for pattern in ("*.parquet", "*/*.parquet") for _ in folder.glob(pattern))


def parquet_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.parquet") if not file.name.startswith("."))


def read_hub(spec: str, labelled: bool = True) -> Read:
    """A data set of the Hugging Face hub: owner/name, then optionally @revision, then optionally :configuration."""
    import datasets

    name, _, configuration = spec.partition(":")
    name, _, revision = name.partition("@")
    try:
        tables = datasets.load_dataset(name, configuration or None, revision=revision or None)
    except (
        Exception
    ) as error:  # the hub's client raises its own, httpx's, and plain ones: all mean that there is no data
        raise UserError(
            f"hub:{spec} cannot be fetched ({first_line(error)}): check the name, the network, and the form "
            "hub:owner/name@revision:configuration."
        ) from error
    return from_tables(f"hub:{spec}", tables, labelled)


def from_tables(origin: str, tables: Mapping[str, Any], labelled: bool = True) -> Read:
    """Sources from `datasets` tables by their split's name."""
    splits, notes = {}, []
    for name, table in tables.items():
        if (split := split_named(name)) is not None:
            splits[split] = table
        else:
            notes.append(f"{origin}: the split {name!r} was left alone.")
    if "train" not in splits:
        raise UserError(f"{origin} has no train split: it has {listed(tables)}.")
    image = picture_column(origin, splits["train"])
    if not labelled:
        return {split: _without_labels(origin, split, table, image) for split, table in splits.items()}, tuple(notes)
    label = label_column(origin, splits["train"])
    named = getattr(splits["train"].features[label], "names", None)
    raw = {split: table.data.column(label).to_pylist() for split, table in splits.items()}
    if named is None:
        words = {split: ["" if cell is None else str(cell) for cell in cells] for split, cells in raw.items()}
        classes = known_classes(origin, {split: [w for w in cells if w] for split, cells in words.items()})
        order = {word: place for place, word in enumerate(classes)}
        raw = {split: [order.get(word, -1) for word in cells] for split, cells in words.items()}
    else:
        classes = tuple(named)
    sources: dict[str, Source] = {}
    for split, table in splits.items():
        labels = np.array([-1 if cell is None else cell for cell in raw[split]], np.int64)
        rows = undecoded(table, image)
        source: Source = TableSource(f"{origin} {split}", rows, image, byte_counts(rows, image), labels, classes)
        if without := int((labels < 0).sum()):
            notes.append(f"{origin}: {without} pictures of {split} have no label and were left out.")
            source = subset(source, np.flatnonzero(labels >= 0))
        if len(source):
            sources[split] = source
    return sources, tuple(notes)


def _without_labels(origin: str, split: str, table: Any, image: str) -> Source:
    rows = undecoded(table, image)
    return TableSource(f"{origin} {split}", rows, image, byte_counts(rows, image), np.full(len(table), -1), ())


def picture_column(origin: str, table: Any) -> str:
    """The name of the picture column of a `datasets.Dataset`, by type and then by name."""
    import datasets

    kinds: dict[str, list[str]] = {name: [] for name in ("image", "struct", "binary")}
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            kinds["image"].append(name)
        elif isinstance(feature, dict) and "bytes" in feature:
            kinds["struct"].append(name)
        elif isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"):
            kinds["binary"].append(name)
    pictures = kinds["image"] or kinds["struct"] or kinds["binary"]
    if not pictures:
        raise UserError(f"{origin} has no column of pictures: it has {listed(table.features)}.")
    return next((name for name in pictures if name.casefold() in PATH_COLUMNS), pictures[0])


def label_column(origin: str, table: Any) -> str:
    """The name of the label column, by type and then by name."""
    import datasets

    columns = {name.casefold(): name for name in table.features}
    kinds = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    for name in LABEL_COLUMNS:
        if columns.get(name) in (kinds or [columns.get(name, "")]):
            return columns[name]
    return kinds[0] if kinds else pick(origin, columns, LABEL_COLUMNS, "labels")


def undecoded(table: Any, image: str) -> Any:
    import datasets

    rows = table.select_columns([image])
    return rows.cast_column(image, datasets.Image(decode=False)) if hasattr(rows.features[image], "decode") else rows


def byte_counts(table: Any, image: str) -> Int[np.ndarray, "n"]:
    """Bytes of each picture, from Arrow's offsets alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.data.column(image)
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return pc.fill_null(pc.binary_length(column), -1).to_numpy().astype(np.int64)


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of a sentence."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(". ")[:200] if text else type(error).__name__
