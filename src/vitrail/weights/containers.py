"""The three containers that weights come in, read without trust and without holding a tensor twice.

Each is opened by its table of contents alone. A tensor is then read straight from the file into memory of its own. Nothing
is ever unpickled beyond tensors, plain values, argparse.Namespace and NumPy scalars.
"""

import argparse
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.weights.memory import allocate

ContainerKind = Literal["npz", "safetensors", "torch"]

AGAIN = "copy it again, or use another checkpoint"


class Entry(NamedTuple):
    """dtype: as torch calls it."""

    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class Container(Protocol):
    kind: ContainerKind
    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    values: dict[str, Any]

    def read(self, name: str) -> Tensor: ...


def open_container(file: Path) -> Container:
    """Told by its first bytes. Raises UserError for what is no checkpoint, naming what it seems to be."""
    try:
        with file.open("rb") as opened:
            start = opened.read(512)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    if not start:
        raise UserError(f"{file} is empty: {AGAIN}")
    if start.startswith(b"PK"):
        return _open_zip(file)
    if start[8:9] == b"{":
        return Safetensors(file)
    if re.match(rb"\x80[\x02-\x05]", start):
        return Torch(file, mapped=False)
    for pattern, what in FOREIGN.items():
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            raise UserError(f"{file} is {what}")
    raise UserError(f"{file} is no .npz, .safetensors or torch file: give a checkpoint")


FOREIGN = {
    rb"version https://git-lfs": "a Git LFS pointer, not the weights: fetch them with git lfs pull",
    rb"\s*<(!doctype|html|\?xml)": "a web page, not the weights: download the file itself",
    rb"\x89HDF": "an HDF5 (Keras) file, which is not read: give a .npz, .safetensors or torch file",
    rb"GGUF": "a GGUF file, which is not read: give a .npz, .safetensors or torch file",
    rb".{0,4}\x08.\x12.{0,4}(pytorch|onnx)": "an ONNX graph, which is not read: give the weights it was made from",
    rb"\x93NUMPY": "a single NumPy array: give the .npz that holds all of them",
    rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc": "a compressed archive: unpack it first",
}


@contextmanager
def _reading(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except MemoryError as error:
        raise UserError(f"{file} needs more memory for {what} than there is: use a larger machine") from error
    except Exception as error:  # a damaged file makes the libraries raise more kinds than they say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is damaged at {what} ({reason}): {AGAIN}") from error


def _allocate(entry: Entry) -> tuple[Tensor, memoryview]:
    """Memory for a tensor, and the same as bytes to fill."""
    tensor = allocate(entry.shape, getattr(torch, entry.dtype))
    return tensor, tensor.view(-1).view(torch.uint8).numpy().data


def _open_zip(file: Path) -> Container:
    """NumPy's and torch's files are both zip archives; other ones are foreign."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{file} is cut short, at {file.stat().st_size} bytes, or damaged ({error}): {AGAIN}"
        ) from error
    names = [member.filename for member in members]
    if any(name.endswith(("/constants.pkl", ".torchscript")) or "/code/" in name for name in names):
        raise UserError(
            f"{file} is a TorchScript program, which would have to be run to be read: save its state_dict() instead"
        )
    if any(name.endswith("data.pkl") for name in names):
        _check_torch_archive(file, members)
        return Torch(file, mapped=True)
    if names and all(name.endswith(".npy") for name in names):
        return Npz(file, members)
    raise UserError(f"{file} is a zip archive of other things: give a .npz, .safetensors or torch file")


class Npz:
    """NumPy's archive. bfloat16 is there as two nameless bytes, void16: https://github.com/google-research/big_vision."""

    kind: ContainerKind = "npz"

    def __init__(self, file: Path, members: list[zipfile.ZipInfo]) -> None:
        self.file = file
        self.metadata: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self._members: dict[str, tuple[zipfile.ZipInfo, int, bool]] = {}
        total, size = sum(member.file_size for member in members), file.stat().st_size
        # Trained weights hardly compress; a head of zeros does, a thousandfold, but it is one among many.
        if total > 100 * size + (64 << 20):
            raise UserError(
                f"{file} of {size:,} bytes claims to unpack to {total:,}: that is a zip bomb, no checkpoint; do not open it"
            )
        with zipfile.ZipFile(file) as archive:
            for member in members:
                self._describe(archive, member)

    def _describe(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        name = member.filename.removesuffix(".npy")
        if name in self.entries:
            raise UserError(f"{self.file} holds {name} twice: {AGAIN}")
        with _reading(self.file, name), archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version[0]}.{version[1]} of its header")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(stream)
            start = stream.tell()
        if dtype.hasobject:
            raise UserError(
                f"{self.file} holds {name} as pickled Python objects, and unpickling can run any code: save it as numbers"
            )
        kind = "bfloat16" if dtype.str[1:] == "V2" else dtype.name
        if dtype.kind not in "fiubV" or dtype.str.startswith(">") or not hasattr(torch, kind):
            raise UserError(f"{self.file} holds {name} of type {dtype.str}, which no weights have: {AGAIN}")
        if math.prod(shape) * dtype.itemsize != member.file_size - start:
            raise UserError(
                f"{self.file} holds {name} of shape {shape} in {member.file_size - start} bytes, which do not fit: {AGAIN}"
            )
        self.entries[name] = Entry(tuple(map(int, shape)), kind)
        self._members[name] = member, start, by_columns

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        member, start, by_columns = self._members[name]
        tensor, room = _allocate(entry._replace(shape=entry.shape[::-1]) if by_columns else entry)
        with _reading(self.file, name):
            if member.compress_type == zipfile.ZIP_STORED:
                self._read_stored(member, start, room)
            else:
                with zipfile.ZipFile(self.file) as archive, archive.open(member) as stream:
                    stream.read(start)
                    place = 0
                    while piece := stream.read(1 << 20):  # the last, empty one makes zipfile compare the checksum
                        room[place : place + len(piece)] = piece
                        place += len(piece)
        return tensor.permute(*reversed(range(tensor.ndim))).contiguous() if by_columns else tensor

    def _read_stored(self, member: zipfile.ZipInfo, start: int, room: memoryview) -> None:
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(member.header_offset)
            local = opened.read(30)
            opened.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), 1)
            checksum, place = zlib.crc32(opened.read(start)), 0
            # In pieces that stay in the processor's cache between the two passes.
            while place < len(room):
                read = opened.readinto(room[place : place + (1 << 18)])
                if not read:
                    raise EOFError("the file ends there")
                checksum = zlib.crc32(room[place : place + read], checksum)
                place += read
        if checksum != member.CRC:
            raise ValueError("its checksum is wrong")


TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Safetensors:
    """JSON, then bytes: https://github.com/huggingface/safetensors#format. Damage to the bytes does not show."""

    kind: ContainerKind = "safetensors"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            start = opened.read(min(length, 100_000_000))
        if len(start) < length:
            raise UserError(f"{file} is cut short, at {size} bytes: {AGAIN}")
        try:
            header: dict[str, Any] = json.loads(start)
            self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
            self.entries = {
                name: Entry(tuple(map(int, entry["shape"])), TYPES[entry["dtype"]]) for name, entry in header.items()
            }
            self._places = {name: tuple(map(int, entry["data_offsets"])) for name, entry in header.items()}
            until = 0
            for begin, end in sorted(self._places.values()):
                if begin != until:
                    raise ValueError("there are holes between its tensors")
                until = end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} has a damaged header: {AGAIN}") from error
        self._start = 8 + length
        if beyond := size - self._start - until:
            what = f"is cut short, at {size} bytes" if beyond < 0 else f"has {beyond} bytes more than it says"
            raise UserError(f"{file} {what}: {AGAIN}")
        for name, entry in self.entries.items():
            begin, end = self._places[name]
            size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
            if min(entry.shape, default=0) < 0 or end - begin != size:
                found = f"of shape {entry.shape} in {end - begin} bytes"
                raise UserError(f"{file} holds {name} {found}, which do not fit: {AGAIN}")

    def read(self, name: str) -> Tensor:
        tensor, room = _allocate(self.entries[name])
        with _reading(self.file, name), self.file.open("rb", buffering=0) as opened:
            opened.seek(self._start + self._places[name][0])
            place = 0
            while place < len(room):
                read = opened.readinto(room[place:])
                if not read:
                    raise EOFError("the file ends there")
                place += read
        return tensor


ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    # How a NumPy scalar is pickled, by its name before and since NumPy 2.
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]
"""What a torch file may hold beyond tensors and plain values: a training script's arguments, and numbers of NumPy."""


class Torch:
    """What torch.save wrote: nested dicts, flattened. In the newer, zipped form tensors stay on the disk until read."""

    kind: ContainerKind = "torch"

    def __init__(self, file: Path, mapped: bool) -> None:
        self.file = file
        self.metadata: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        try:
            with _reading(file, "its table of contents"), torch.serialization.safe_globals(ALLOWED):
                data = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except UserError as error:
            found = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)|Unsupported (?:class|operand)", str(error.__cause__))
            if found is None:
                raise
            name = found.group(1) or found.group(2) or "an object"
            raise UserError(
                f"{file} holds a pickled {name}, and unpickling that can run any code: save the model's state_dict() alone"
            ) from error
        self._flatten(data, "", 0)
        self.entries = {
            name: Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def _flatten(self, value: Any, name: str, depth: int) -> None:
        if depth > 20 or len(self._tensors) + len(self.values) > 500_000:
            raise UserError(f"{self.file} nests its contents without end: {AGAIN}")
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict) or (isinstance(value, (list, tuple)) and depth < 20):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                self._flatten(item, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(value, Tensor):
            if name in self._tensors:
                raise UserError(f"{self.file} holds {name} twice: {AGAIN}")
            self._tensors[name] = value.detach()
        else:
            self.values[name] = value

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        with _reading(self.file, name):
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError("it is sparse or quantised")
            # A view may repeat its storage's numbers without end.
            if tensor.numel() * tensor.itemsize > max(self.file.stat().st_size, 64 << 20):
                raise ValueError(f"its shape {tuple(tensor.shape)} is larger than the file")
            return tensor.clone(memory_format=torch.contiguous_format)


def _check_torch_archive(file: Path, members: list[zipfile.ZipInfo]) -> None:
    """Torch compares no checksums, so a flipped byte would be a wrong weight: they are compared here, once."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"{file} is a compressed zip archive, which torch never writes: {AGAIN}")
    wrong = []
    with _reading(file, "its records"), zipfile.ZipFile(file) as archive:
        for member in members:
            try:
                with archive.open(member) as stream:
                    while stream.read(1 << 20):
                        pass
            except zipfile.BadZipFile as error:
                if "CRC" not in str(error):
                    raise
                wrong.append(member)
    # torch.serialization.set_crc32_options(False) writes a number of another kind in every record.
    if wrong and len(wrong) < len([member for member in members if member.file_size]):
        raise UserError(f"{file} is damaged at {wrong[0].filename} (its checksum is wrong): {AGAIN}")
