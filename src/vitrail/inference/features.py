"""Pictures to one vector each, computed once: what probes, `fit` and searches stand on.

Unusual: the cache is a folder of parts, and any set of parts is a valid state. Each part says which pictures it holds and
carries a checksum; what is missing, damaged or of another width is computed. So an extraction can be killed at any
moment and goes on from there, and two processes may fill the same folder at once: at worst both compute the same rows.

The key is the SHA-256 of all that decides a feature up to its last digits: the model, the pictures, the preprocessing,
the reading and the precision. Batch size, workers and device are not in it. Rows are computed independently of each other;
another batch size only lets the matrix library sum in another order, about 1e-6 of a feature's size.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitrail.core import ranks
from vitrail.core.device import Precision, cores
from vitrail.core.errors import UserError
from vitrail.core.runs import write_whole
from vitrail.core.types import Preprocess, Source
from vitrail.core.values import to_json
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import subset
from vitrail.data.transforms import Transform
from vitrail.inference.predict import BROKEN, broken, predict
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT

Model = Classifier | ViT | ResNet
Reading = Literal["planned", "class", "mean", "class-mean", "pre-logits"]

FORMAT = 1
"""Part of the key: raise it when the same inputs give other features."""
PART_SECONDS = 10.0
"""How often what was computed is written down, and so the most that a kill can cost."""
SPOKEN = {
    "class": "class token",
    "mean": "mean of the patch tokens",
    "class-mean": "class token and mean of the patch tokens",
    "pre-logits": "tanh layer before the logits",
    "attention": "attention pool",
    "prefix": "class and distillation token",
}


@dataclass(frozen=True)
class Rows:
    """Some pictures' places in the source and their vectors, in any order."""

    index: Int[Tensor, "n"]
    features: Float[Tensor, "n d"]


@dataclass(frozen=True)
class FeatureTable:
    """One row for each picture that could be read, in the source's order.

    features: fp32, on the CPU. labels: class indices, -1 for none. index: each row's place in the source, ascending.
    problems: place in the source -> why that picture was left out.
    """

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, "n"]
    index: Int[Tensor, "n"]
    problems: dict[int, str] = field(default_factory=dict)


def reader(model: Model, reading: Reading = "planned") -> Callable[[Tensor], Tensor]:
    """A function from pictures (b c h w) to vectors (b d), without gradient rules of its own: the model's mode is kept.

    Pictures are uint8 pixels, which are normalised as the model has it, or floating ones that are normalised already.
    reading: "planned" is what the model's own head stands on: a classifier's pool, with its norm and its tanh layer
        (the official code's `pre_logits`) where it has them; of a bare backbone the class token, else the mean of the
        patch tokens. "class", "mean" and "class-mean" are the backbone's tokens, whatever the head does; "pre-logits"
        is the tanh layer and nothing else.
    Raises UserError where the model has no such thing.
    """
    check(model, reading)
    backbone = model.backbone if isinstance(model, Classifier) else model
    own = resolved(model, reading)
    classifier = model if isinstance(model, Classifier) and reading in ("planned", "pre-logits") else None

    def read(images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        pixels = backbone.preprocess.normalize(images) if images.dtype == torch.uint8 else images
        if classifier is not None:
            pooled, hidden = classifier.pooled(pixels), getattr(classifier.head, "hidden", None)
            return pooled if hidden is None else hidden(pooled).tanh()
        if own == "class" and isinstance(backbone, ViT):
            return backbone.prefix_features(pixels).prefix[:, 0]  # without the last block's other tokens
        features = backbone.features(pixels)
        parts = [features.prefix[:, 0]] if own == "class-mean" else []
        return torch.cat([*parts, features.tokens.mean(1)], 1)

    return read


def check(model: Model, reading: Reading) -> None:
    """Raises UserError where the model has no such reading."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    if reading in ("class", "class-mean") and not (isinstance(backbone, ViT) and backbone.config.class_token):
        kind = "ResNet" if isinstance(backbone, ResNet) else "model"
        raise UserError(f"--reading {reading} needs a class token, and this {kind} has none: give --reading mean.")
    if reading == "pre-logits" and (not isinstance(model, Classifier) or model.config.hidden is None):
        raise UserError(
            "--reading pre-logits needs a head with a tanh layer, which this model lacks: give --reading planned."
        )


def resolved(model: Model, reading: Reading) -> str:
    """The reading that "planned" stands for, one of `SPOKEN`; any other reading is itself."""
    if reading != "planned":
        return reading
    if isinstance(model, Classifier):
        return "pre-logits" if model.config.hidden is not None else model.config.pool
    return "class" if isinstance(model, ViT) and model.config.class_token else "mean"


def spoken(model: Model, reading: Reading) -> str:
    """The reading for people: "class token"."""
    return SPOKEN[resolved(model, reading)]


def extract(
    model: Model,
    source: Source,
    preprocess: Preprocess,
    *,
    reading: Reading = "planned",
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch: int = 64,
    workers: int = -1,
    cache: Path | None = None,
    progress: bool = False,
    of: Callable[[Tensor], Tensor] | None = None,
    mark: str = "",
) -> FeatureTable:
    """The vectors of all pictures of `source`, each computed once if there is a cache.

    model: already on `device`. preprocess: of the pictures; the model's own is not consulted.
    batch: pictures at a time, in all processes together; no result depends on it beyond rounding.
    workers: processes that decode; -1: one a core, or none where a single batch is to be read.
    of: an engine that reads uint8 pixels in place of the model, with the same preprocessing and reading; mark: what its
        features are told apart by in the cache.
    cache: a folder that gets a folder named by the key; None keeps nothing. One that cannot be written is said on standard
        error, and nothing is kept.

    Pictures that cannot be read are left out, and tried again the next time. Raises UserError for a picture whose
    features are not finite (named), where no picture can be read, and as `reader` does.
    """
    device = torch.device(device)
    read = reader(model, reading)
    folder = None if cache is None else cache / key(model, source, preprocess, reading, precision, mark)
    found = ranks.by_first(lambda: [] if folder is None else recall(folder, len(source)))
    missing = np.setdiff1d(np.arange(len(source)), np.concatenate([np.zeros(0, int), *(rows.index for rows in found)]))
    problems: dict[int, str] = {}
    if missing.size:
        batch = min(batch, missing.size) if ranks.count() == 1 else batch
        loader = PictureLoader(
            subset(source, missing),
            Transform(preprocess),
            Order(missing.size, batch, missing.size, shuffle=False),
            workers=workers if workers >= 0 else cores() if missing.size > batch else 0,
        )

        def ask(pixels: Tensor) -> Tensor:
            return read(preprocess.normalize(pixels)) if of is None else of(pixels)

        fresh: list[Rows] = []
        kept, last = 0, time.monotonic()
        try:
            for seen in predict(model, loader, device=device, precision=precision, progress=progress, of=ask):
                places = missing[seen.index.numpy()]
                for row in broken(seen.logits)[:1]:
                    raise UserError(f"{source[int(places[row])].name}: {BROKEN}")
                if places.size:
                    fresh.append(Rows(torch.from_numpy(places), seen.logits))
                if folder is not None and time.monotonic() - last > PART_SECONDS:
                    folder = folder if keep(folder, joined(fresh[kept:])) else None
                    kept, last = len(fresh), time.monotonic()
        finally:
            # Also on Ctrl-C and on errors: what was computed stays.
            if folder is not None and len(fresh) > kept:
                keep(folder, joined(fresh[kept:]))
        for part, lost in ranks.gather_objects((fresh, loader.problems)):
            found += part
            problems.update({int(missing[place]): why for place, why in lost.items()})
    if not found:
        raise UserError(f"None of the {len(source)} pictures could be read; check the files.")
    rows = joined(found)
    index, first = np.unique(rows.index.numpy(), return_index=True)
    return FeatureTable(
        rows.features[torch.from_numpy(first)],
        torch.from_numpy(np.asarray(source.labels)[index]).long(),
        torch.from_numpy(index),
        dict(sorted(problems.items())),
    )


def default_cache() -> Path:
    """$VITRAIL_CACHE/features, or ~/.cache/vitrail/features. May be deleted at any time."""
    return Path(os.environ.get("VITRAIL_CACHE") or "~/.cache/vitrail").expanduser() / "features"


def weights_hash(model: Model) -> str:
    """SHA-256 of all tensors with their names, and of the config with its numerics; hex digits. 88 MB take 0.1 to 0.3 s."""
    seen = hashlib.sha256(json.dumps([type(model).__name__, to_json(model.config)], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        seen.update(raw(tensor))
    return seen.hexdigest()


def merging(model: nn.Module) -> int | str:
    """How many tokens a model merges in each block, or how; it is neither in its config nor in its tensors."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    return backbone.merge.said if isinstance(backbone, ViT) else 0


def key(
    model: Model, source: Source, preprocess: Preprocess, reading: Reading, precision: Precision, mark: str = ""
) -> str:
    """What the features of these pictures are kept under; hex digits.

    A source's fingerprint knows names and sizes of picture files; the times of their last change are added here, so that
    a picture that was painted over is not taken for the old one.
    """
    parts = [FORMAT, weights_hash(model), source.fingerprint, to_json(preprocess), resolved(model, reading), reading]
    how = [precision, *([merging(model), mark] if merging(model) or mark else [])]
    seen = hashlib.sha256(json.dumps([*parts, *how], sort_keys=True).encode())
    seen.update(changes(source))
    return seen.hexdigest()


def changes(source: Source) -> bytes:
    """When each picture file was changed last; nothing of pictures that are no files."""
    found = []
    for place in range(len(source)):
        picture = source[place].picture
        if not isinstance(picture, Path):
            break  # the fingerprint of pictures held in memory or in a table is all that is known
        try:
            found.append(picture.stat().st_mtime_ns.to_bytes(8, "little", signed=True))
        except OSError:
            found.append(b"missing")
    return b"".join(found)


def recall(folder: Path, count: int) -> list[Rows]:
    """All rows that whole parts in `folder` hold; a damaged part is deleted and said on standard error."""
    found: list[Rows] = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as part:
                rows, said = Rows(part.get_tensor("index"), part.get_tensor("features")), part.metadata() or {}
            whole = said.get("sha256") == sha256(rows) and int(rows.index.max()) < count
        except FileNotFoundError:
            continue  # another process found it damaged first
        except (SafetensorError, OSError):
            whole = False
        if whole:
            found.append(rows)
        else:
            print(f"{file} is damaged; its features are computed again.", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):  # in a folder that cannot be written it stays, and is said again
                file.unlink(missing_ok=True)
    return found


def keep(folder: Path, rows: Rows) -> bool:
    """Writes one part, under a name that no other process takes. False, after a word on standard error, where it cannot."""
    data = save({"index": rows.index, "features": rows.features}, {"sha256": sha256(rows)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{uuid.uuid4().hex}.safetensors", lambda part: part.write_bytes(data))
    except (UserError, OSError) as error:
        print(f"Features are not kept: {error}", file=sys.stderr, flush=True)
        return False
    return True


def joined(parts: Sequence[Rows]) -> Rows:
    return Rows(torch.cat([part.index for part in parts]), torch.cat([part.features for part in parts]))


def sha256(rows: Rows) -> str:
    seen = hashlib.sha256(raw(rows.index))
    seen.update(raw(rows.features))
    return seen.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
