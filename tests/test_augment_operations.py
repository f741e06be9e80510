"""RandAugment's operations against Pillow's own, on colour and grey, picture by picture."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.data import operations
from vitrail.data.operations import OPERATIONS, randaugment


def pictures(channels: int) -> Tensor:
    """Six pictures that operations treat differently: noise, a ramp, low contrast, one level, two levels, blocks."""
    rng = np.random.default_rng(channels)
    height, width = 37, 52
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.4, 1, channels)
    kinds = [
        rng.integers(0, 256, (height, width, channels)),
        np.broadcast_to(ramp, (height, width, channels)),
        rng.normal(100, 9, (height, width, channels)),
        np.full((height, width, channels), 77),
        np.where(rng.random((height, width, channels)) < 0.1, 3, 250),
        rng.integers(0, 256, (5, 7, channels)).repeat(8, 0).repeat(8, 1)[:height, :width],
    ]
    return torch.from_numpy(np.stack(kinds).clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def in_pillow(batch: Tensor, operation: object) -> Tensor:
    done = [operation(Image.fromarray(p.permute(1, 2, 0).squeeze(2).numpy())) for p in batch]  # type: ignore[operator]
    return torch.stack([torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1) for image in done])


def off(got: Tensor, wanted: Tensor) -> int:
    assert got.dtype == torch.uint8
    assert got.shape == wanted.shape
    return int((got.int() - wanted.int()).abs().max())


def moved(*matrix: float) -> object:
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(128,) * len(image.getbands())
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_is_pillows(channels: int) -> None:
    batch = pictures(channels)
    before = batch.clone()
    # Pillow stretches contrast in floats, whose rounding may fall one level below the whole number.
    assert off(operations.autocontrast(batch), in_pillow(batch, ImageOps.autocontrast)) <= 1
    assert off(operations.equalize(batch), in_pillow(batch, ImageOps.equalize)) == 0
    assert off(operations.invert(batch), in_pillow(batch, ImageOps.invert)) == 0
    for bits in range(1, 9):
        assert off(operations.posterize(batch, bits), in_pillow(batch, lambda i, b=bits: ImageOps.posterize(i, b))) == 0
    for threshold in (0, 1, 100, 128, 255, 256):
        wanted = in_pillow(batch, lambda i, t=threshold: ImageOps.solarize(i, t))
        assert off(operations.solarize(batch, threshold), wanted) == 0
    for addition in (0, 55, 110, 220):
        wanted = in_pillow(batch, lambda i, a=addition: i.point(lambda v: min(255, v + a) if v < 128 else v))
        assert off(operations.solarize_add(batch, addition), wanted) == 0
    for factor in (0.0, 0.1, 0.55, 1.0, 1.27, 1.9, 2.8, 3.7):
        for ours, theirs in [
            (operations.color, ImageEnhance.Color),
            (operations.contrast, ImageEnhance.Contrast),
            (operations.brightness, ImageEnhance.Brightness),
            (operations.sharpness, ImageEnhance.Sharpness),
        ]:
            assert off(ours(batch, factor), in_pillow(batch, lambda i, k=theirs, f=factor: k(i).enhance(f))) == 0
    assert torch.equal(batch, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_affine_is_pillows(channels: int) -> None:
    batch = pictures(channels)
    for matrix in [
        (1, 0.3, 0, 0, 1, 0),
        (1, -0.6, 0, 0, 1, 0),
        (1, 0, 0, 0.45, 1, 0),
        (1, 0, 7, 0, 1, 0),
        (1, 0, 0, 0, 1, -60),
        (0.8, -0.5, 3.3, 0.51, 0.9, -2.7),
    ]:
        rows = np.tile(np.array(matrix, float), (batch.shape[0], 1))
        assert off(operations.affine(batch, rows), in_pillow(batch, moved(*matrix))) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_official_strengths(channels: int) -> None:
    """Each entry of the table at m = 15, in the official code's numbers, with Pillow doing the work. Of the two signs a
    picture draws, Pillow tries both."""
    batch = pictures(channels)
    fill = (128,) * channels if channels == 3 else 128
    wide, tall = round(150 / 224 * 52), round(150 / 224 * 37)
    wanted = [
        [ImageOps.autocontrast],
        [ImageOps.equalize],
        [ImageOps.invert],
        [lambda i, a=a: i.rotate(a, Image.Resampling.NEAREST, fillcolor=fill) for a in (45, -45)],
        [lambda i: ImageOps.posterize(i, 6)],
        [lambda i: i],  # the official threshold is past 255 by now
        [lambda i: i.point(lambda v: min(255, v + 165) if v < 128 else v)],
        *[
            [lambda i, k=kind: k(i).enhance(2.8)]
            for kind in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
        ],
        [moved(1, s, 0, 0, 1, 0) for s in (0.45, -0.45)],
        [moved(1, 0, 0, s, 1, 0) for s in (0.45, -0.45)],
        [moved(1, 0, s, 0, 1, 0) for s in (wide, -wide)],
        [moved(1, 0, 0, 0, 1, s) for s in (tall, -tall)],
    ]
    for number, choices in enumerate(wanted):
        got = OPERATIONS[number](batch, 1.5, np.random.default_rng(number))
        tried = torch.stack([in_pillow(batch, choice) for choice in choices])
        nearest = (tried.int() - got.int()).abs().flatten(2).amax(2).amin(0)
        assert int(nearest.max()) <= (1 if number == 0 else 0), number


def test_cutout() -> None:
    batch = pictures(3)
    centre = np.array([[0, 0], [18, 26], [36, 51], [5, 40], [30, 2], [18, 0]])
    got = operations.cutout(batch, np.array([4, 6]), centre)
    for picture, out, (y, x) in zip(batch, got, centre, strict=True):
        wanted = picture.clone()
        wanted[:, max(0, y - 4) : y + 4, max(0, x - 6) : x + 6] = 128
        assert torch.equal(out, wanted)


def test_every_picture_draws_its_own() -> None:
    batch = pictures(3)[:1].expand(400, -1, -1, -1)
    once = randaugment(batch, 1, 10.0, np.random.default_rng(0))
    # 16 operations, of which solarize is the identity at 10; five come with two signs, cutout with any centre
    kinds = {out.numpy().tobytes() for out in once}
    assert len(kinds) >= 16 + 5
    assert any(torch.equal(out, batch[0]) for out in once)
    assert torch.equal(once, randaugment(batch, 1, 10.0, np.random.default_rng(0)))
    assert not torch.equal(once, randaugment(batch, 1, 10.0, np.random.default_rng(1)))
    assert torch.equal(batch[0], pictures(3)[0])
    assert torch.equal(randaugment(batch, 0, 10.0, np.random.default_rng(0)), batch)


@pytest.mark.parametrize("magnitude", [0.0, 5.0, 10.0, 15.0, 20.0, 30.0])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (32, 32)])
def test_any_strength_and_size(magnitude: float, size: tuple[int, int]) -> None:
    batch = torch.randint(0, 256, (64, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = randaugment(batch, 3, magnitude, np.random.default_rng(0))
    assert out.shape == batch.shape
    assert out.dtype == torch.uint8


def test_channels_without_colours_are_refused() -> None:
    with pytest.raises(UserError, match="1 or 3 channels, not 5"):
        randaugment(torch.zeros(2, 5, 4, 4, dtype=torch.uint8), 1, 10.0, np.random.default_rng(0))
