"""TFRecord files and the tf.train.Examples in them, read without TensorFlow.

Unusual: nothing is copied or unpacked that is not asked for. Opening reads the 12 bytes before each record; a record is
read and checked when its picture is wanted. Both checksums of the format are CRC-32C, "masked" by a rotation and a sum so
that checksums of data that hold checksums stay apart.

A file is records: length (8 bytes, little endian), its CRC, the bytes, their CRC. An Example is a protocol buffer: a map
from names to lists of byte strings (1), of floats (2) or of integers (3).
"""

import functools
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vitrail.core.checksums import crc32c, crc32c_of_rows
from vitrail.core.errors import UserError
from vitrail.data.decode import UnreadablePicture

HEAD = 12

Feature = list[bytes] | np.ndarray
"""Byte strings, or a flat array of float32 or int64."""


@dataclass(frozen=True)
class Records:
    """The records of several files, in the order of the files.

    file, start, length: (n,) which file, and where in it the record's own bytes lie.
    """

    files: tuple[Path, ...]
    file: Int[np.ndarray, "n"]
    start: Int[np.ndarray, "n"]
    length: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return self.start.shape[0]

    def name(self, index: int) -> str:
        return f"{self.files[int(self.file[index])]}, record {self.within(index)}"

    def within(self, index: int) -> int:
        """Its number in its own file."""
        return index - int(np.searchsorted(self.file, self.file[index]))

    def peek(self, index: int) -> memoryview:
        """One record as it lies in the file, unchecked; of its pictures nothing is read until it is looked at."""
        start = int(self.start[index])
        return memoryview(_mapped(self.files[int(self.file[index])]))[start : start + int(self.length[index])]

    def read(self, index: int) -> bytes:
        """One record. Raises UnreadablePicture where its checksum does not fit."""
        with self.files[int(self.file[index])].open("rb") as opened:
            opened.seek(int(self.start[index]))
            length = int(self.length[index])
            data, said = opened.read(length), opened.read(4)
        if len(data) < length or len(said) < 4 or int.from_bytes(said, "little") != masked(crc32c(data)):
            raise UnreadablePicture(f"{self.name(index)} is damaged (its checksum does not fit): fetch the file anew.")
        return data


@functools.lru_cache(maxsize=32)
def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def open_records(files: Sequence[Path]) -> Records:
    """Finds the records. Raises UserError where a file is cut short or is no TFRecord file."""
    columns: list[tuple[int, int, int]] = []
    for number, path in enumerate(files):
        starts, lengths, heads = [], [], []
        size, place = path.stat().st_size, 0
        with path.open("rb") as file:
            while place < size:
                file.seek(place)
                head = file.read(HEAD)
                length = int.from_bytes(head[:8], "little")
                if len(head) < HEAD or place + HEAD + length + 4 > size:
                    raise UserError(
                        f"{path} ends inside a record, or is no TFRecord file: fetch it anew, or prepare it again."
                    )
                heads.append(head)
                starts.append(place + HEAD)
                lengths.append(length)
                place += HEAD + length + 4
        raw = np.frombuffer(b"".join(heads), np.uint8).reshape(-1, HEAD)
        said = np.ascontiguousarray(raw[:, 8:]).view("<u4")[:, 0]
        if (said != masked(crc32c_of_rows(raw[:, :8]))).any():
            raise UserError(
                f"{path} is damaged, or no TFRecord file (a length's checksum does not fit): fetch it anew."
            )
        columns += zip([number] * len(starts), starts, lengths, strict=True)
    table = np.array(columns, np.int64).reshape(-1, 3)
    return Records(tuple(files), table[:, 0], table[:, 1], table[:, 2])


def read_example(record: bytes | memoryview, names: Sequence[str]) -> dict[str, Feature]:
    """The features of these names, where the Example has them. Raises ValueError on what is no Example."""
    wanted = set(names)
    found: dict[str, Feature] = {}
    for features in _messages(memoryview(record), 1):
        for entry in _messages(features, 1):
            name = b"".join(_messages(entry, 1)).decode(errors="replace")
            if name in wanted:
                found[name] = _feature(next(_messages(entry, 2), memoryview(b"")))
    return found


def write_example(features: dict[str, Feature]) -> bytes:
    """The inverse of `read_example`, for tests and for making small sets: lists of bytes, float32 and int64 arrays."""

    def delimited(number: int, data: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(data)) + data

    entries = b""
    for name, values in features.items():
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            kind, body = 2, delimited(1, values.astype("<f4").tobytes())
        elif isinstance(values, np.ndarray):
            kind, body = 3, delimited(1, b"".join(_varint(int(value) % (1 << 64)) for value in values))
        else:
            kind, body = 1, b"".join(delimited(1, value) for value in values)
        entries += delimited(1, delimited(1, name.encode()) + delimited(2, delimited(kind, body)))
    return delimited(1, entries)


def write_records(file: Path, records: Sequence[bytes]) -> None:
    """The inverse of `open_records` and `Records.read`."""
    with file.open("wb") as opened:
        for record in records:
            length = len(record).to_bytes(8, "little")
            opened.write(length + masked(crc32c(length)).to_bytes(4, "little"))
            opened.write(record + masked(crc32c(record)).to_bytes(4, "little"))


def masked(crc: Any) -> Any:
    """As TFRecord stores it; of one number or of an int64 array of them."""
    return ((crc >> 15 | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def _feature(data: memoryview) -> Feature:
    for listed in _messages(data, 1):
        return [bytes(value) for value in _messages(listed, 1)]
    for listed in _messages(data, 2):
        return np.frombuffer(b"".join(_messages(listed, 1)), "<f4")
    integers: list[int] = []
    for listed in _messages(data, 3):
        for _, value in _fields(listed):
            integers += [value] if isinstance(value, int) else _unpacked(value)
    return np.array(integers, np.uint64).astype(np.int64)


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The bytes of each field of one number."""
    for number, value in _fields(data):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a message: the number, and the value of a varint or the bytes of anything else."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _read_varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _read_varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("no tf.train.Example")
        if place + length > len(data):
            raise ValueError("a tf.train.Example that ends too early")
        yield number, data[place : place + length]
        place += length


def _unpacked(data: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(data):
        value, place = _read_varint(data, place)
        values.append(value)
    return values


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number, seven bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("no tf.train.Example")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
