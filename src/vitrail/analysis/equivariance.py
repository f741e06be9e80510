"""Measured: does moving the picture move the features, f(g(x)) = g(f(x)), and does a set of patches know its order?

Unusual: the sums over tokens in `permutation`. Without positions a ViT is a function of a set, so that patches in another
order must give the same features in that order. A computer's sums depend on their order in the last bits: the two of
attention, the softmax's denominator and the mean of the values, and whatever a matrix product does with a row because of
where it stands. So in fp32 and fp64 the two agree to rounding alone, which is reported too; and to the bit where each token
goes through the dense layers alone and attention's sums are of whole numbers (fixed point in int64), which have no order.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vitrail.analysis.internals import Model, evaluating, normalized, vit_of
from vitrail.core.errors import UserError
from vitrail.core.types import Features, Positions
from vitrail.layers.transformer import Block, Encoder
from vitrail.models.classifier import Classifier

Border = Literal["cyclic", "crop"]
# Binary places of a number in fixed point: sums of products, of twice as many, must stay below 2^63.
PLACES = 24


@dataclass(frozen=True)
class Translation:
    """shifts: pixels (down, right). error: |f(g(x)) - g(f(x))| / |g(f(x))| over the cells that both see.

    unmoved: the same with f(x), not moved along, in place of g(f(x)): what a model would have that did not notice.
    cells: how many cells were compared for each shift.
    """

    shifts: tuple[tuple[int, int], ...]
    error: Float[np.ndarray, "b shifts"]
    unmoved: Float[np.ndarray, "b shifts"]
    cells: Int[np.ndarray, "shifts"]


@torch.no_grad()
def translation(
    model: Model,
    images: Shaped[Tensor, "b c h w"],
    shifts: Sequence[tuple[int, int]],
    border: Border = "cyclic",
    margin: int = 1,
) -> Translation:
    """Equivariance of the patch features (a ResNet's last map) under shifts of the picture by whole pixels.

    On features, g moves the map by shift / stride cells, linearly between cells where that is no whole number.
    border: "cyclic": what leaves the picture at one side comes in at the other, so both see the same pixels, and the map
        is moved round too; "crop": two windows of the model's size are cut from larger images, the second `shift` pixels
        up and left of the first, so that new content comes in; only cells that lie in both are compared.
    margin: cells left out at each side, where padding is seen.

    Raises UserError where images are too small for "crop", a shift is negative then, or no cell is left.
    """
    backbone = model.backbone if isinstance(model, Classifier) else model
    pixels = normalized(model, images)
    if border == "crop":
        size = backbone.preprocess.size
        most = tuple(max(abs(shift[axis]) for shift in shifts) for axis in (0, 1))
        if min(min(shift) for shift in shifts) < 0:
            raise UserError("a cropped shift must go down and right, by 0 or more pixels each")
        if any(pixels.shape[2 + axis] < size[axis] + most[axis] for axis in (0, 1)):
            raise UserError(
                f"cropped shifts of up to {most[0]} x {most[1]} pixels need pictures of {size[0] + most[0]} x "
                f"{size[1] + most[1]}, not {pixels.shape[2]} x {pixels.shape[3]}"
            )
    errors, unmoved, cells = [], [], []
    with evaluating(model):
        for shift in shifts:
            if border == "cyclic":
                before, after = pixels, pixels.roll(shift, (2, 3))
            else:
                before, after = (_window(pixels, most, size, move) for move in ((0, 0), shift))
            found = backbone.features(before)
            there, here = as_map(found), as_map(backbone.features(after))
            steps = shift[0] / found.stride[0], shift[1] / found.stride[1]
            moved = shifted(there, steps)
            kept = _inside(here.shape[2:], steps, margin, border)
            errors.append(apart(here[..., kept], moved[..., kept]))
            unmoved.append(apart(here[..., kept], there[..., kept]))
            cells.append(int(kept.sum()))
    return Translation(tuple(shifts), np.stack(errors, 1), np.stack(unmoved, 1), np.array(cells))


def _window(images: Tensor, most: tuple[int, ...], size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    top, left = most[0] - shift[0], most[1] - shift[1]
    return images[:, :, top : top + size[0], left : left + size[1]]


def _inside(grid: Sequence[int], steps: tuple[float, float], margin: int, border: Border) -> Tensor:
    """The cells to compare, (y, x): a margin away from the border, both where they are now and where they were."""
    sides = []
    for length, step in zip(grid, steps, strict=True):
        cell = torch.arange(length)
        was = cell - step
        if border == "cyclic":
            was = was % length
        # Between two cells, both must be inside.
        inside = (cell >= margin) & (cell < length - margin) & (was >= margin) & (was <= length - 1 - margin)
        sides.append(inside)
    kept = sides[0][:, None] & sides[1][None]
    if not kept.any():
        raise UserError(
            f"no cell of a {grid[0]} x {grid[1]} grid is left to compare after a shift of {steps[0]:g} x {steps[1]:g} "
            f"cells with a margin of {margin}: take larger pictures, a smaller shift or margin=0"
        )
    return kept


def as_map(features: Features) -> Float[Tensor, "b d y x"]:
    assert features.grid is not None
    return features.tokens.mT.unflatten(-1, (features.grid[0], features.grid[1]))


def shifted(x: Float[Tensor, "b d y x"], steps: tuple[float, float]) -> Float[Tensor, "b d y x"]:
    """Moved down and right by so many cells, round the border, linearly between cells."""
    for axis, step in zip((2, 3), steps, strict=True):
        whole = int(np.floor(step))
        part = step - whole
        x = x.roll(whole, axis)
        if part:
            x = (1 - part) * x + part * x.roll(1, axis)
    return x


def apart(x: Float[Tensor, "b *rest"], y: Float[Tensor, "b *rest"]) -> Float[np.ndarray, "b"]:
    """|x - y| / |y| of each picture; 0.0 exactly where all numbers are equal."""
    difference = (x.double() - y.double()).flatten(1).norm(dim=1)
    return (difference / y.double().flatten(1).norm(dim=1)).cpu().numpy()


@dataclass(frozen=True)
class Permutation:
    """Relative errors of the patch features of permuted patches against the permuted features.

    with_positions: as the model is, its positions staying where they are. without_positions: with none, in fp32.
    double: likewise in fp64. exact: with sums that have no order; 0.0 means equal to the bit.
    arithmetic: how far the features of `exact` are from those of `double`: that it is the same model.
    """

    with_positions: Float[np.ndarray, "b"]
    without_positions: Float[np.ndarray, "b"]
    double: Float[np.ndarray, "b"]
    exact: Float[np.ndarray, "b"]
    arithmetic: Float[np.ndarray, "b"]


@torch.no_grad()
def permutation(model: Model, images: Shaped[Tensor, "b c h w"], seed: int = 0) -> Permutation:
    """Patches (of a hybrid, cells of the trunk's map) in a random order, the same one for all pictures.

    Raises UserError for a ResNet, which has no set of patches.
    """
    backbone = vit_of(model)
    with evaluating(backbone):
        tokens = backbone.tokenize(normalized(model, images))
        order = torch.randperm(tokens.x.shape[1], generator=torch.Generator().manual_seed(seed)).to(tokens.x.device)
        positions = backbone.positions(tokens)

        def ran(encoder: nn.Module, x: Tensor, where: Positions) -> Tensor:
            return encoder(backbone.prepend(x).to(next(encoder.parameters()).dtype), where)[0][
                :, backbone.config.prefixes :
            ]

        def error(encoder: nn.Module, where: Positions) -> Float[np.ndarray, "b"]:
            return apart(ran(encoder, tokens.x[:, order], where), ran(encoder, tokens.x, where)[:, order])

        placed, plain = error(backbone.encoder, positions), error(backbone.encoder, Positions())
        double = deepcopy(backbone.encoder).double()
        exact = [ordered_by_nothing(double, backbone.prepend(x).double()) for x in (tokens.x, tokens.x[:, order])]
        here, there = (x[:, backbone.config.prefixes :] for x in exact)
        same = apart(here, ran(double, tokens.x, Positions()))
        return Permutation(placed, plain, error(double, Positions()), apart(there, here[:, order]), same)


def ordered_by_nothing(encoder: Encoder, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    """The encoder without positions, each token's numbers independent of where in the row it and the others stand.

    For fp64. Attention's sums are in fixed point of PLACES binary places, all else is done a token at a time.
    """
    x = alone(encoder.pre_norm, x)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        query, key, value = _projected(block, x)
        logits = whole_product(query * query.shape[-1] ** -0.5, key.mT)
        shares = fixed((logits - logits.amax(-1, keepdim=True)).exp())
        mixed = whole_product(shares.double() / shares.sum(-1, keepdim=True), value)
        mixed = mixed.transpose(1, 2).flatten(2)
        x = block.add_attended(x, alone(block.attention.output, mixed))
        x = block.add_transformed(x, alone(block.mlp, alone(block.mlp_norm, x)))
    return alone(encoder.norm, x)


def _projected(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = [block.attention.project(block.attention_norm(x[:, i : i + 1])) for i in range(x.shape[1])]
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*rows, strict=True))
    return query, key, value


def alone(module: nn.Module, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t wide"]:
    """Each token by itself: a matrix product may add up a row otherwise for where it stands in the matrix."""
    return torch.cat([module(x[:, i : i + 1].contiguous()) for i in range(x.shape[1])], dim=1)


def fixed(x: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    return (x * 2.0**PLACES).round().long()


def whole_product(x: Float[Tensor, "*any n k"], y: Float[Tensor, "*any k m"]) -> Float[Tensor, "*any n m"]:
    """x y by whole numbers: each sum is exact, so that the order of its terms is nothing."""
    if float((x.abs() @ y.abs()).max()) >= 2.0 ** (62 - 2 * PLACES):
        raise UserError(
            "this model's queries, keys or values are too large for sums in fixed point: give another model."
        )
    return (fixed(x) @ fixed(y)).double() / 2.0 ** (2 * PLACES)
