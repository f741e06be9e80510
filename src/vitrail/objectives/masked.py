"""Masked patch prediction, as the paper's appendix B.1.2 has it: BERT's game with patches for words.

Half of each picture's patches are corrupted: 80 % of these get the learned `[mask]` embedding, 10 % the embedding of another
patch, 10 % keep their own; the loss is on all corrupted patches, those that kept theirs among them. Where the paper is
silent, this is chosen:

- The share is exact in each picture (rounded; never all, never none); which patches is a uniform draw, and what
  becomes of each is a draw of its own.
- Another patch is one of the same picture that is not corrupted. So a picture's loss depends on nothing but itself,
  whatever batch it is in, and what is hidden in one place is shown in no other.
- A colour's 3 bits a channel are 8 uniform levels of the mean in [0, 1]: floor(8 mean), 1 to the highest; computed in
  integers, so exact. It is the mean of the pixels that the model is given: after cropping, flipping and all else that
  is done to them, before they are normalised. Grey pictures have 8 classes.
- A patch downsized to 4 x 4 is the mean of the pixels that each cell touches (16 predictions, of which the loss is the
  mean). The pixels of a whole patch are regressed as the model's input has them, normalised; the loss is the mean square.

The trunk of a hybrid has looked at neighbours before its map is cut into patches: there a hidden patch is not wholly hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vitrail.core.device import mix
from vitrail.core.types import Batch, Loss, Preprocess, Progress
from vitrail.data.augment import Augmentation
from vitrail.models.masked import CELLS, LEVELS, MaskedPatchConfig

MASKED, MOVED = 0.8, 0.1
"""Shares of the corrupted patches that get the mask embedding, and that of another patch; the rest are kept."""


@dataclass(frozen=True)
class Corruption:
    """places: the corrupted patches. sources: whose embedding stands at each place; -1: the mask's."""

    places: Int[Tensor, "b m"]
    sources: Int[Tensor, "b n"]

    @property
    def hidden(self) -> Tensor:
        """(b, m) bool: of the corrupted ones, those whose own embedding is gone."""
        return self.sources.gather(1, self.places) != self.places


def corrupt(draws: Float[Tensor, "3 b n"], share: float) -> Corruption:
    """The corruption that uniform numbers in [0, 1) stand for: the order of the patches, their fate, whose embedding."""
    patches = draws.shape[2]
    count = min(max(round(share * patches), 1), patches - 1)
    order = draws[0].argsort(1)
    places, others = order[:, :count], order[:, count:]
    fate = draws[1, :, :count]
    other = others.gather(1, (draws[2, :, :count] * (patches - count)).long().clamp(max=patches - count - 1))
    source = torch.where(fate < MASKED, -1, torch.where(fate < MASKED + MOVED, other, places))
    own = torch.arange(patches, device=draws.device).expand(draws.shape[1:])
    return Corruption(places, own.scatter(1, places, source))


def drawn(batch: int, patches: int, seed: int, device: torch.device) -> Float[Tensor, "3 b n"]:
    """For training: a function of the batch's seed (and of the kind of device, whose own generator draws)."""
    generator = torch.Generator(device).manual_seed(mix("corrupt", seed))
    return torch.rand(3, batch, patches, generator=generator, device=device)


def fixed(index: Int[Tensor, "b"], patches: int) -> Float[Tensor, "3 b n"]:
    """For measuring: a function of each picture's place in its source, on any device and in any batch."""
    rows = [np.random.default_rng(mix("held-out", i)).random((3, patches), np.float32) for i in index.tolist()]
    return torch.from_numpy(np.stack(rows, 1))


def patches_at(
    pixels: UInt8[Tensor, "b c h w"], patch: tuple[int, int], places: Int[Tensor, "b m"]
) -> UInt8[Tensor, "b m c ph pw"]:
    """The pixels of some patches, which are counted row by row."""
    (tall, wide), rows = patch, torch.arange(pixels.shape[0], device=pixels.device)[:, None]
    across = pixels.shape[3] // wide
    cut = pixels.unflatten(3, (across, wide)).unflatten(2, (-1, tall))
    return cut[rows, :, places // across, :, places % across]


def levels(patches: UInt8[Tensor, "b m c ph pw"], cells: int = 1) -> Int[Tensor, "b m c cells cells"]:
    """0 to 7: each channel's mean in cells x cells parts of a patch, or of the pixels these touch."""
    rows = torch.stack(
        [patches[..., i:j, :].sum(-2, dtype=torch.int32) for i, j in _edges(patches.shape[3], cells)], -2
    )
    sums = torch.stack([rows[..., i:j].sum(-1, dtype=torch.int32) for i, j in _edges(patches.shape[4], cells)], -1)
    tall, wide = ([j - i for i, j in _edges(length, cells)] for length in patches.shape[3:])
    counts = torch.tensor([[t * w for w in wide] for t in tall], dtype=torch.int32, device=patches.device)
    return (LEVELS * sums).div(255 * counts, rounding_mode="floor").clamp(max=LEVELS - 1)


def _edges(length: int, cells: int) -> list[tuple[int, int]]:
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def classes_of(found: Int[Tensor, "b m c y x"]) -> Int[Tensor, "b m cells"]:
    """Levels to classes, the first channel's being the highest digit; cells row by row."""
    weights = torch.tensor([LEVELS**place for place in reversed(range(found.shape[2]))], device=found.device)
    return (found.long() * weights[:, None, None]).sum(2).flatten(2)


def colours_of(classes: Int[Tensor, "*any"], channels: int) -> Float[Tensor, "*any c"]:
    """The colour in [0, 1] at the middle of each class."""
    places = torch.tensor([LEVELS**place for place in reversed(range(channels))], device=classes.device)
    return (classes[..., None] // places % LEVELS + 0.5) / LEVELS


def patch_loss(
    config: MaskedPatchConfig,
    preprocess: Preprocess,
    predicted: Float[Tensor, "b m numbers"],
    patches: UInt8[Tensor, "..."],
) -> Float[Tensor, "b m"]:
    """Of each patch: nats, or for pixels the mean square in units of the normalised input. patches: (b, m, c, ph, pw)."""
    predicted = predicted.float()
    if config.targets == "pixels":
        wanted = preprocess.normalize(patches.flatten(0, 1)).flatten(1).view(predicted.shape)
        return (predicted - wanted).square().mean(-1)
    classes = classes_of(levels(patches, CELLS if config.targets == "downsized" else 1))
    logits = predicted.unflatten(-1, (classes.shape[2], config.colours))
    return F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view(classes.shape).mean(-1)


def painted(
    config: MaskedPatchConfig, preprocess: Preprocess, predicted: Float[Tensor, "b m numbers"]
) -> Float[Tensor, "b m c ph pw"]:
    """Patches in [0, 1] that look as the prediction has them: of one colour, of 4 x 4 colours, or pixel by pixel."""
    channels, (tall, wide), predicted = config.backbone.channels, config.backbone.stride, predicted.float()
    if config.targets == "pixels":
        mean, deviation = (
            torch.tensor(values, device=predicted.device).view(-1, 1, 1)
            for values in (preprocess.mean, preprocess.deviation)
        )
        return (predicted.unflatten(-1, (channels, tall, wide)) * deviation + mean).clamp(0, 1)
    sides = CELLS if config.targets == "downsized" else 1
    best = predicted.unflatten(-1, (sides, sides, config.colours)).argmax(-1)
    down, across = (torch.arange(length, device=best.device) * sides // length for length in (tall, wide))
    return colours_of(best, channels).movedim(-1, 2)[..., down[:, None], across]


@dataclass
class MaskedPatches:
    """The loss of a MaskedPatchPredictor (`model`, compiled or shared or as it is) on augmented, corrupted pictures.

    corrupt: the share of the patches.
    """

    model: nn.Module
    config: MaskedPatchConfig
    preprocess: Preprocess
    augmentation: Augmentation
    corrupt: float = 0.5

    def __call__(self, batch: Batch, seed: int) -> Loss:
        """The mean over the corrupted patches of the valid rows; zero, with gradients of zero, where no row is valid. Labels
        are not looked at."""
        pixels = self._pixels(batch, seed)
        tall, wide = self.config.backbone.stride
        count = (pixels.shape[2] // tall) * (pixels.shape[3] // wide)
        corruption = corrupt(drawn(pixels.shape[0], count, seed, pixels.device), self.corrupt)
        predicted = self.model(pixels, corruption.sources, corruption.places)
        patches = patches_at(pixels, (tall, wide), corruption.places)
        each = patch_loss(self.config, self.preprocess, predicted, patches).mean(1)
        return Loss(torch.where(batch.valid, each, 0.0).sum() / batch.valid.sum().clamp(min=1))

    def _pixels(self, batch: Batch, seed: int) -> UInt8[Tensor, "b c h w"]:
        """Augmented, and pixels still: what is to be predicted must be exact."""
        channels = self.preprocess.channels
        plain = Preprocess(self.preprocess.size, mean=(0.0,) * channels, deviation=(1.0,) * channels)
        augmented = self.augmentation(batch, 0, plain, mix("augment", seed))
        return (augmented.views[0] * 255).round().to(torch.uint8)

    def after_backward(self, progress: Progress) -> None:
        """Nothing to do."""

    def after_step(self, progress: Progress) -> None:
        """Nothing to do."""
