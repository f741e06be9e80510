"""Any checkpoint file or folder, opened without trust: names, shapes and types first, a tensor when it is asked for.

The container is told by its bytes, never by its name. What lies beside a checkpoint (config.json) is read only where
the checkpoint has a hub's standard name, so that a file in a crowded folder is not taken for its neighbour's.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.weights.containers import Container, ContainerKind, open_container

STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What hubs call the weights of a folder, the best first."""

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")


class Checkpoint:
    """A checkpoint that is open, with nothing read but its table of contents.

    path: as it was given, file or folder. files: what is read, several where the weights are sharded.
    names: of the tensors; in a torch file, the keys of nested dicts joined by dots, wrappers ("model", "state_dict",
        "module.") included.
    config, preprocessor: config.json and preprocessor_config.json beside it, or None.
    metadata: the safetensors header's. values: of a torch file, what is no tensor (numbers, words), named likewise.
    """

    def __init__(self, path: Path, parts: list[Container], beside: Path | None = None) -> None:
        """beside: the folder where config.json may lie."""
        self.path = path
        self.files = tuple(part.file for part in parts)
        self.modified = tuple(file.stat().st_mtime_ns for file in self.files)
        self.container: ContainerKind = parts[0].kind
        self._beside = beside
        self.metadata = {key: value for part in parts for key, value in part.metadata.items()}
        self.values = {key: value for part in parts for key, value in part.values.items()}
        self._places = {name: part for part in parts for name in part.entries}
        self.names = tuple(self._places)

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        return _json(self._beside / "config.json") if self._beside else None

    @functools.cached_property
    def preprocessor(self) -> dict[str, Any] | None:
        return _json(self._beside / "preprocessor_config.json") if self._beside else None

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].entries[name].shape

    def dtype(self, name: str) -> str:
        """As torch calls it: "float32", "bfloat16", "int64"."""
        return self._places[name].entries[name].dtype

    def read(self, name: str) -> Tensor:
        """A tensor of its own memory. Raises UserError where the file is damaged there, or holds NaN or infinity."""
        part = self._places[name]
        tensor = part.read(name)
        bad = _not_finite(tensor) if tensor.is_floating_point() else 0
        if bad:
            raise UserError(
                f"{part.file} holds {name} with {bad} of {tensor.numel()} numbers NaN or infinite: its training failed or "
                "the file is damaged; use another checkpoint"
            )
        return tensor

    def sha256(self) -> str:
        """Of the file; of several, of their bytes one after the other."""
        return sha256(self.files, self.modified)


@functools.lru_cache(maxsize=64)
def sha256(files: tuple[Path, ...], modified: tuple[int, ...]) -> str:
    """Of files as they were at those times (st_mtime_ns); of files that are others by now, words that say so."""
    digest = hashlib.sha256()
    for file, then in zip(files, modified, strict=True):
        if not file.exists() or file.stat().st_mtime_ns != then:
            return f"unknown: {file} was changed after it was read"
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A .npz, .safetensors or torch file; or a folder that holds one (and config.json), sharded or not.

    Raises UserError where there is none, it is damaged, foreign, compressed beyond belief, or would run code.
    """
    path = Path(path)
    try:
        file = _in_folder(path) if path.is_dir() else path
        if not file.exists():
            why = "it is a link to what is not there" if file.is_symlink() else "check the path"
            raise UserError(f"there is no checkpoint {path}: {why}")
        if not file.is_file():
            raise UserError(f"{path} is neither a file nor a folder: check the path")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name and permissions") from error
    beside = file.parent if file.name in STANDARD or file.name.startswith(("model-0", "pytorch_model-0")) else None
    parts = [open_container(shard) for shard in (_shards(file) if file.suffix == ".json" else [file])]
    if not any(part.entries for part in parts):
        raise UserError(f"{file} holds no tensors: use another checkpoint")
    return Checkpoint(path, parts, beside)


def _not_finite(tensor: Tensor) -> int:
    """How many numbers are NaN or infinite. On this thread alone: PyTorch's own team would wait for busy neighbours."""
    if tensor.dtype in (torch.float32, torch.float64):
        values = tensor.numpy()
        # One pass over the memory; the sum of many finite numbers may overflow, so it only raises the suspicion.
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum()):
                return 0
        return int((~np.isfinite(values)).sum())
    if tensor.dtype == torch.bfloat16:
        return int(((tensor.view(torch.int16).numpy() & 0x7F80) == 0x7F80).sum())
    return int((~np.isfinite(tensor.float().numpy())).sum())


def _in_folder(folder: Path) -> Path:
    for name in STANDARD:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) != 1:
        found = (
            "no checkpoint" if not others else f"{len(others)} checkpoints ({', '.join(f.name for f in others[:3])})"
        )
        raise UserError(f"the folder {folder} holds {found} and no model.safetensors: name the checkpoint file itself")
    return others[0]


def _shards(index: Path) -> list[Path]:
    data = _json(index) or {}
    names = data.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is no index of shards (it has no weight_map): copy it again")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != index.parent or not shard.is_file():
            raise UserError(f"{index} names the shard {shard.name}, which is not beside it: copy all its shards")
    return shards


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): copy it again, or take it away") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} is no JSON table: copy it again, or take it away")
    return data
