"""The values that cross from room to room, and the protocols that rooms rely on.

Axis letters, everywhere in the house: b images, c channels, h w pixels, n patch tokens, p prefix tokens (class token,
registers), t = p + n tokens, d token width, e head width, k classes, y x the patch grid.

Everything here is a frozen dataclass: a value is made once, handed on, and never changed in place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Interpolation = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]
Resampling = Literal["zoom", "bilinear", "bicubic", "bicubic-antialias", "bicubic-aligned", "bicubic-offset"]
Gelu = Literal["tanh", "erf", "quick"]


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the numbers that a model was trained on. Travels inside every checkpoint.

    size: (height, width) in pixels that the model is given.
    resize: what happens before the central crop to `size`: an int is the length of the shorter side (aspect kept), a
        pair is an exact (height, width) (aspect given up), None is `size` itself, exactly, with no crop.
    interpolation: the resampling filter, applied with Pillow's support widening (that is, antialiased).
    mean, deviation: one number a channel, on pixels scaled to [0, 1]; their count is the number of channels:
        1 grey, 3 RGB, 4 RGBA.

    The default is the official ViT one: (x - 127.5) / 127.5 after a square bilinear resize.
    """

    size: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalize(self, pixels: UInt8[Tensor, "... h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels 0..255, (b, c, h, w), to fp32 model input, on whatever device they are on; contiguous, however the pixels
        lie. Grey ones (b, 1, h, w) are repeated for each channel, and one picture (c, h, w) is a batch of one."""
        # Filled in where the pixels are: numbers copied to a GPU would make the processor wait for it at every batch.
        mean, deviation = (
            torch.cat([torch.full((1, 1, 1, 1), one, dtype=torch.float32, device=pixels.device) for one in each], 1)
            for each in (self.mean, self.deviation)
        )
        if pixels.ndim != 4 or pixels.shape[1] != self.channels:
            pixels = torch.broadcast_tensors(pixels, mean)[0]
        # In place: on a processor a new 10 MB a step costs three times the arithmetic, in pages that are touched first.
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return images.div_(255).sub_(mean).div_(deviation)


@dataclass(frozen=True)
class Numerics:
    """The arithmetic in which "the same" ViTs differ between libraries. Travels inside every checkpoint.

    gelu: "tanh" is Flax's default and so the official code's; "erf" is PyTorch's; "quick" is CLIP's x * sigmoid(1.702 x).
    norm_epsilon: added to the variance in every LayerNorm; 1e-6 in Flax and timm, 1e-12 in Hugging Face's ViT.
    resample: how the position grid changes size: "zoom" is the official scipy order-1 zoom (corners aligned); the others
        are PyTorch's, "bicubic-aligned" torchvision's with corners aligned, "bicubic-offset" DINO's, with its 0.1 cell.
    """

    gelu: Gelu = "tanh"
    norm_epsilon: float = 1e-6
    resample: Resampling = "zoom"


Picture = Path | bytes | np.ndarray
"""An undecoded picture file (its path or its bytes), or pixels as (h, w) or (h, w, c): uint8, or floating in [0, 1]."""


@dataclass(frozen=True)
class Sample:
    """One picture of a source, not yet decoded.

    name: what to call it in a message: its path, or "file.parquet, row 17".
    label: index into the source's classes; -1 where it has none.
    """

    name: str
    picture: Picture
    label: int = -1


@runtime_checkable
class Source(Protocol):
    """Pictures that can be counted and fetched in any order. Must survive pickling: data workers get a copy."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> np.ndarray:
        """(len,) int64: each sample's label without opening its picture; -1 where there is none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the samples, their order or their labels change; hex digits."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Labels:
    """One class index a picture, or (after mixing) a weight for each class."""

    values: Int[Tensor, "b"] | Float[Tensor, "b k"]

    def to(self, device: torch.device) -> "Labels":
        return Labels(_moved(self.values, device))


@dataclass(frozen=True)
class Batch:
    """What the loader gives and an objective takes.

    views: one tensor for each view of the same b pictures: uint8 pixels 0..255 from the loader, normalised fp32 after
        augmentation.
    targets: None where nothing is known of the pictures.
    valid: False for rows that only fill the batch up; they count nowhere.
    index: each row's place in its source; -1 in filled rows.
    """

    views: tuple[UInt8[Tensor, "b _ _ _"] | Float[Tensor, "b _ _ _"], ...]
    targets: Labels | None
    valid: Bool[Tensor, "b"]
    index: Int[Tensor, "b"]

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            tuple(_moved(view, device) for view in self.views),
            None if self.targets is None else self.targets.to(device),
            _moved(self.valid, device),
            _moved(self.index, device),
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. To a GPU only a copy from pinned memory runs beside the processor; any other waits for all steps that
    the GPU has still to take."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Tokens:
    """Patches as words.

    coords: where each token lies, in patches from the first: (y, x) for pictures, one number for sound, three for video.
    grid: (y, x) while the tokens fill it in row order; None once some were dropped, merged or packed.
    valid: False for tokens that only fill up; None when all count.
    """

    x: Float[Tensor, "b n d"]
    coords: Float[Tensor, "b n axes"]
    grid: tuple[int, ...] | None
    valid: Bool[Tensor, "b n"] | None = None


@dataclass(frozen=True)
class Positions:
    """Everything that tells the encoder where a token is.

    stem: added once to all tokens, prefix rows first (a prefix without a position has a row of zeros).
    per_layer: added again before each block, one entry a block; None where positions enter at the stem alone.
    rotary: cosines and sines that rotate the patch tokens' queries and keys.
    bias: from the queries (b, heads, t, e) to what is added to the attention logits (b, heads, t, t).
    """

    stem: Float[Tensor, "#b t d"] | None = None
    per_layer: tuple[Float[Tensor, "#b t d"], ...] | None = None
    rotary: tuple[Float[Tensor, "#b n e"], Float[Tensor, "#b n e"]] | None = None
    bias: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Features:
    """What a backbone sees in a picture.

    prefix: class token and registers, in that order; p may be 0.
    tokens: one for each cell of `grid`, in row order (each token kept, where grid is None).
    stride: input pixels a cell, (y, x).
    layers: the layers asked for with `keep`, in that order, each with its own width, grid and stride.
    """

    prefix: Float[Tensor, "b p d"]
    tokens: Float[Tensor, "b n d"]
    grid: tuple[int, ...] | None
    stride: tuple[int, ...]
    layers: tuple["Features", ...] = ()


@dataclass(frozen=True)
class Loss:
    """total: the mean over the batch's valid rows, to be differentiated. parts: its named pieces, to be shown."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of results: a value with its 95 % interval and the exact count it rests on.

    value, low and high are in `unit` ("%" or "" for plain numbers); low and high are None where no interval is known.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    unit: str = "%"
    expected: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where training stands: steps done, and steps in all."""

    step: int
    total: int


@runtime_checkable
class Backbone(Protocol):
    """Headless: pictures in, features out. Kept by every family of models."""

    width: int
    depth: int

    def features(self, images: Float[Tensor, "b c h w"], keep: tuple[int, ...] = ()) -> Features:
        """`keep` names blocks from 0; negative ones count from the last."""
        ...

    def layer_of(self, parameter: str) -> int:
        """0 for what comes before the first block, 1 + i for block i, depth + 1 for what comes after the last."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A training task: what to do to a batch, and what to ask of the model. Holds the model, no parameters of its own."""

    def __call__(self, batch: Batch, seed: int) -> Loss:
        """`seed` is this batch's own, for whatever is drawn: augmentation, corruption, views."""
        ...

    def after_backward(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress) -> None: ...


class Loader(Protocol):
    """Batches of a source, in an order fixed by its seed."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...
