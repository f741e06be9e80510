"""Vitrail's own checkpoint: one safetensors file that says everything about itself.

The header's metadata carries, as JSON, the config with its numerics, the preprocessing and the labels, so a file can
be described without a tensor being read, and loaded without a word from the user. It is written to the side, flushed
to the disk and renamed: whoever looks sees the old file or the new one, never half of one.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.core.values import from_json, to_json
from vitrail.models.classifier import Classifier, ClassifierConfig, resize_classifier
from vitrail.models.vit import ViT, ViTConfig, resize_backbone

FORMAT = 1
KEY = "vitrail"
FILE = "model.safetensors"
KINDS = {"classifier": ClassifierConfig, "backbone": ViTConfig}


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself. labels and a head are a classifier's alone."""

    format: int
    kind: Literal["classifier", "backbone"]
    config: ClassifierConfig | ViTConfig
    preprocess: Preprocess
    labels: tuple[str, ...] = ()

    @property
    def backbone(self) -> ViTConfig:
        return self.config.backbone if isinstance(self.config, ClassifierConfig) else self.config


def save(model: Classifier | ViT, destination: str | Path) -> Path:
    """Writes a model, each tensor in its own dtype, and returns the file.

    destination: a path that ends in .safetensors is the file; any other is a folder, made if need be, that gets
        model.safetensors and, for people to read, config.json.
    Raises UserError where it cannot be written; what stood there before is then still there.
    """
    destination = Path(destination)
    folder = destination.parent if destination.suffix == ".safetensors" else destination
    file = destination if destination.suffix == ".safetensors" else folder / FILE
    is_classifier = isinstance(model, Classifier)
    description = Description(
        FORMAT,
        "classifier" if is_classifier else "backbone",
        model.config,
        model.preprocess,
        model.labels if isinstance(model, Classifier) else (),
    )
    data = to_json(description)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.partial")
        try:
            # safetensors would close the file to all others; a touched one has the permissions that files have here.
            aside.touch()
            permissions = aside.stat().st_mode
            save_file(tensors, aside, metadata={KEY: json.dumps(data)})
            aside.chmod(permissions)
            _settle(aside, file)
        finally:
            aside.unlink(missing_ok=True)
        if file != destination:
            aside = folder / ".config.json.partial"
            aside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _settle(aside, folder / "config.json")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} could not be written ({error}): make room there, or choose another place") from error
    return file


def describe(path: str | Path) -> Description:
    """What a checkpoint, a file or a folder that holds model.safetensors, says of itself; no tensor is read.

    Raises UserError, as `load` does, for a file that is missing, damaged, foreign or too new.
    """
    file = _file(path)
    return _describe(file, _header(file))


def load(
    path: str | Path,
    *,
    image: tuple[int, int] | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> Classifier:
    """A classifier, ready to use (in evaluation mode), from a file or a folder that `save` wrote.

    image: (height, width) to work at from now on; the position grid is resampled by the model's own rule.
    dropout, drop_path: other chances than the checkpoint was trained with.
    Raises UserError for a file that is missing, damaged, foreign, too new, without a head or at odds with its config.
    """
    file = _file(path)
    header = _header(file)
    description = _describe(file, header)
    if not isinstance(description.config, ClassifierConfig):
        raise UserError(f"{file} holds a backbone without a head: load it with load_backbone, or finetune it first")
    config = replace(description.config, backbone=_with_chances(description.backbone, dropout, drop_path))
    model = config.build(device="meta")
    model.load_state_dict(_tensors(file, header, model, ""), assign=True)
    model.labels = description.labels
    model.preprocess = description.preprocess
    if image is not None:
        resize_classifier(model, image)
    return model.eval()


def load_backbone(
    path: str | Path,
    *,
    image: tuple[int, int] | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> ViT:
    """The ViT of a backbone's or a classifier's checkpoint; all else as `load`."""
    file = _file(path)
    header = _header(file)
    description = _describe(file, header)
    model = _with_chances(description.backbone, dropout, drop_path).build(device="meta")
    prefix = "backbone." if description.kind == "classifier" else ""
    model.load_state_dict(_tensors(file, header, model, prefix), assign=True)
    model.preprocess = description.preprocess
    if image is not None:
        resize_backbone(model, image)
    return model.eval()


def _settle(aside: Path, file: Path) -> None:
    """Onto the disk, then into place, and the rename onto the disk too."""
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    aside.replace(file)
    if os.name == "posix":
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise UserError(
                f"the folder {path} holds no {FILE}: name a folder that vitrail wrote, or a checkpoint file"
            )
        return path / FILE
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: check the path")
    return path


def _header(file: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file: https://github.com/huggingface/safetensors#format."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            start = opened.read(min(length, 100_000_000))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    if size == 0:
        raise UserError(f"{file} is empty: copy it again, or use another checkpoint")
    if size < 10 or not start.startswith(b"{"):
        raise UserError(f"{file} is no safetensors file: give a checkpoint that vitrail wrote")
    cut = UserError(f"{file} is cut short, at {size} bytes: copy it again, or use another checkpoint")
    if len(start) < length:
        raise cut
    try:
        header: dict[str, Any] = json.loads(start)
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} has a damaged header: copy it again, or use another checkpoint") from error
    if size < 8 + length + end:
        raise cut
    return header


def _describe(file: Path, header: dict[str, Any]) -> Description:
    text = header.get("__metadata__", {}).get(KEY)
    if text is None:
        raise UserError(
            f"{file} is another project's checkpoint, without vitrail's description: give one that vitrail wrote"
        )
    try:
        data = json.loads(text)
        found = data["format"]
        if found > FORMAT:
            raise UserError(
                f"{file} has checkpoint format {found}, and this vitrail reads up to {FORMAT}: update vitrail"
            )
        kind: type[ClassifierConfig | ViTConfig] = KINDS[data["kind"]]
        preprocess = from_json(Preprocess, data["preprocess"])
        return Description(found, data["kind"], from_json(kind, data["config"]), preprocess, tuple(data["labels"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} describes its model in a way that this vitrail does not know ({error})") from error


def _with_chances(config: ViTConfig, dropout: float | None, drop_path: float | None) -> ViTConfig:
    return replace(
        config,
        dropout=config.dropout if dropout is None else dropout,
        drop_path=config.drop_path if drop_path is None else drop_path,
    )


def _tensors(file: Path, header: dict[str, Any], model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix`, which must be the model's exactly, by name and shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {
        name.removeprefix(prefix): tuple(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and name.startswith(prefix)
    }
    for what, names in (("lacks", wanted.keys() - found.keys()), ("holds the unknown", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{file} {what} tensor {min(names)}{more}, against its own config: use another checkpoint")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(
                f"{file} holds {name} of shape {found[name]}, where its own config says {shape}: use another checkpoint"
            )
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again, or use another checkpoint") from error
    # Copied into memory that PyTorch aligned itself: at other addresses its kernels round differently in the last bit.
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}
