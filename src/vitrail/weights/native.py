"""Vitrail's own checkpoint: one safetensors file that says everything about itself.

The header's metadata carries, as JSON, the config with its numerics, the preprocessing and the labels, so a file can
be described without a tensor being read, and loaded without a word from the user.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitrail.core.errors import UserError
from vitrail.core.runs import write_json, write_whole
from vitrail.core.types import Preprocess
from vitrail.core.values import from_json, to_json
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNet, ResNetConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights.conversion import Converted, Keys
from vitrail.weights.source import Checkpoint, open_checkpoint
from vitrail.weights.writing import make_folder, save_safetensors

NAME = "vitrail"
FORMAT = 1
KEY = "vitrail"
FILE, CONFIG = "model.safetensors", "config.json"
Config = ClassifierConfig | ViTConfig | ResNetConfig
KINDS: dict[str, type[Config]] = {"classifier": ClassifierConfig, "backbone": ViTConfig, "resnet": ResNetConfig}


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself. labels and a head are a classifier's alone."""

    format: int
    kind: Literal["classifier", "backbone", "resnet"]
    config: Config
    preprocess: Preprocess
    labels: tuple[str, ...] = ()

    @property
    def backbone(self) -> ViTConfig | ResNetConfig:
        return self.config.backbone if isinstance(self.config, ClassifierConfig) else self.config


def save(model: Classifier | ViT | ResNet, destination: str | Path) -> Path:
    """Writes a model, each tensor in its own dtype, and returns the file.

    destination: a path that ends in .safetensors is the file; any other is a folder, made if need be, that gets
        model.safetensors and, for people to read, config.json.
    Raises UserError where it cannot be written, or the folder is a training run's, whose own config.json tells what the
        run was; what stood there before is then still there.
    """
    destination = Path(destination)
    folder = destination.parent if destination.suffix == ".safetensors" else destination
    file = destination if destination.suffix == ".safetensors" else folder / FILE
    if file != destination:
        spare_runs(folder)
    description = Description(
        FORMAT,
        "classifier" if isinstance(model, Classifier) else "backbone" if isinstance(model, ViT) else "resnet",
        model.config,
        model.preprocess,
        model.labels if isinstance(model, Classifier) else (),
    )
    data = to_json(description)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}

    make_folder(folder)
    write_whole(file, lambda part: save_safetensors(tensors, part, {KEY: json.dumps(data)}))
    if file != destination:
        write_json(folder / CONFIG, data)
    return file


def spare_runs(folder: Path) -> None:
    """Raises UserError where a training run lies there."""
    if _of_a_run(folder / CONFIG):
        raise UserError(
            f"{folder} is the folder of a training run, whose weights and settings would be lost: give another folder, or "
            "a file that ends in .safetensors"
        )


def _of_a_run(config: Path) -> bool:
    try:
        data = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "settings" in data


def write(model: Classifier | ViT | ResNet, destination: Path) -> tuple[str, ...]:
    """`save` as formats are written; nothing has to be folded."""
    save(model, destination)
    return ()


def recognises(checkpoint: Checkpoint) -> bool:
    return KEY in checkpoint.metadata


def convert(checkpoint: Checkpoint, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> Converted:
    """The file as it is; `heads` and `grid` are stated in it."""
    description = _description(checkpoint)
    keys = Keys(checkpoint)
    for name in keys:
        keys.take(name, name)
    is_classifier = isinstance(description.config, ClassifierConfig)
    return Converted(
        config=description.config,
        tensors=keys.tensors,
        preprocess=description.preprocess,
        preprocess_source="stated in the file",
        labels=description.labels,
        head="usable" if is_classifier else "absent",
        renamed=keys.renamed,
    )


def describe(path: str | Path) -> Description:
    """What a checkpoint of ours, a file or a folder that holds model.safetensors, says of itself; no tensor is read.

    Raises UserError for a file that is missing, damaged, foreign or too new.
    """
    checkpoint = open_checkpoint(path)
    if not recognises(checkpoint):
        raise UserError(
            f"{path} is another project's checkpoint, without vitrail's description: give one that vitrail wrote"
        )
    return _description(checkpoint)


def _description(checkpoint: Checkpoint) -> Description:
    try:
        data: dict[str, Any] = json.loads(checkpoint.metadata[KEY])
        found = data["format"]
        if found > FORMAT:
            raise UserError(
                f"{checkpoint.path} has checkpoint format {found}, and this vitrail reads up to {FORMAT}: update vitrail"
            )
        config = from_json(KINDS[data["kind"]], data["config"])
        return Description(
            found, data["kind"], config, from_json(Preprocess, data["preprocess"]), tuple(data["labels"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint.path} describes its model in a way that this vitrail does not know ({error}): update vitrail"
        ) from error
