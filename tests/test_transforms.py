"""Evaluation against plain Pillow, and the crops that training draws."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.decode import UnreadablePicture
from vitrail.data.transforms import FILTERS, Transform, read
from vitrail.weights.preprocessing import changed


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shading and hard edges, no symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    shade = 128 + 60 * np.sin(4 * x + rng.uniform(0, 6, 3)) * np.cos(5 * y) + 40 * (y > 0.3) * (x > 0.6)
    return shade.clip(0, 255).astype(np.uint8)


def stored(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def planes(image: Image.Image) -> np.ndarray:
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("interpolation", list(FILTERS))
@pytest.mark.parametrize("shape", [(70, 131), (131, 70), (20, 30), (64, 64)])
def test_evaluation_is_pillows(interpolation: str, shape: tuple[int, int]) -> None:
    """Exactly, where no crop follows; to the levels of rounding, where Pillow resizes the whole and then crops."""
    pixels, kernel = picture(*shape), FILTERS[interpolation]
    image = Image.fromarray(pixels)
    got = Transform(Preprocess((48, 40), None, interpolation))(stored(pixels), None)
    assert np.array_equal(got, planes(image.resize((40, 48), kernel)))
    tall, wide = (48, int(48 * shape[1] / shape[0])) if shape[0] <= shape[1] else (int(48 * shape[0] / shape[1]), 48)
    for resize, (height, width) in [(48, (tall, wide)), ((60, 50), (60, 50))]:
        top, left = round((height - 40) / 2), round((width - 32) / 2)
        wanted = planes(image.resize((width, height), kernel).crop((left, top, left + 32, top + 40)))
        got = Transform(Preprocess((40, 32), resize, interpolation))(stored(pixels), None)
        if interpolation in ("nearest", "box"):  # a centre or an edge between two pixels may fall to either
            assert np.abs(got - wanted).mean() < 2
        else:  # in floats they agree to 1e-4, but each of Pillow's two passes rounds to whole levels, ties either way
            assert np.abs(got - wanted).max() <= 3
            assert np.abs(got - wanted).mean() < 0.2


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    grey = picture(28, 28)[:, :, 0]
    for given in (stored(grey), grey, grey[..., None], grey / 255):
        got = Transform(Preprocess((28, 28), mean=(0.5,), deviation=(0.5,)))(given, None)
        assert np.array_equal(got, grey[None])
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert got.dtype == np.uint8


@pytest.mark.parametrize("interpolation", ["box", "bilinear", "bicubic", "lanczos"])
def test_reduced_jpegs_are_as_exact_as_stated(interpolation: str) -> None:
    for seed, shape in enumerate([(803, 1205), (1205, 803), (401, 402)]):
        data = stored(picture(*shape, seed), "JPEG", quality=92)
        for preprocess in (Preprocess((64, 64), None, interpolation), Preprocess((56, 56), 64, interpolation)):
            got = Transform(preprocess)(data, None).astype(int)
            with Image.open(BytesIO(data)) as image:
                exact = Transform(preprocess)(np.asarray(image.convert("RGB")), None)
            assert np.abs(got - exact).mean() < 0.6
            assert np.abs(got - exact).max() <= 8


def test_inception_crop_is_crop_and_resize() -> None:
    """Away from the border, where plain Pillow cannot see beyond the crop, the two agree to a level; the border is as
    wide as the filter, and there the mean is what agrees."""
    pixels = picture(300, 400)
    image = Image.fromarray(pixels)
    transform = Transform(Preprocess((32, 32)), "inception")
    for seed in range(20):
        got = transform(pixels, np.random.default_rng(seed)).astype(int)
        box = transform._inception_crop((300, 400), np.random.default_rng(seed))
        wanted = planes(image.crop(tuple(map(int, box))).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(got - wanted)[:, 2:-2, 2:-2].max() <= 1
        assert np.abs(got - wanted).mean() < 1
        data = stored(pixels, "JPEG", quality=95, subsampling=0)
        assert np.abs(transform(data, np.random.default_rng(seed)) - got).mean() < 1.5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("side", [32, 140])
def test_training_pixels_lie_side_by_side(interpolation: str, side: int) -> None:
    """Of arrays and files, cropped by torch or by Pillow, at full or at reduced size: planes would take as long as half
    of the resizing."""
    pixels = picture(900, 800)
    transform = Transform(Preprocess((side, side), None, interpolation), "inception")
    room = transform.room(3)
    for given in (pixels, stored(pixels), stored(pixels, "JPEG"), stored(pixels[:300, :300], "JPEG")):
        got = transform(given, np.random.default_rng(0))
        assert got.strides == room.strides[1:] == (1, 3 * side, 3)
        assert got.flags.writeable
        assert Transform(transform.preprocess)(given, None).strides == (side * side, side, 1)
    assert room.shape == (3, 3, side, side)
    many = Transform(Preprocess((side, side), None, interpolation, (0.5,) * 5, (0.5,) * 5), "inception")
    got = many(np.repeat(pixels[:, :, :1], 5, axis=2), np.random.default_rng(0))
    assert got.strides == many.room(2).strides[1:]
    assert Transform(transform.preprocess).room(3).flags.c_contiguous


@pytest.mark.parametrize("size", [(300, 300), (200, 500), (500, 200)])
def test_inception_crops_are_drawn_as_said(size: tuple[int, int]) -> None:
    transform, rng = Transform(Preprocess((8, 8)), "inception"), np.random.default_rng(0)
    boxes = np.array([transform._inception_crop(size, rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= size[1]
    assert bottom.max() <= size[0]
    assert {tuple(box % 1) for box in boxes} == {(0, 0, 0, 0)}
    wide, tall = right - left, bottom - top
    area = wide * tall / (size[0] * size[1])
    assert 0.045 < area.min() < 0.06
    assert ((wide / tall) > 0.73).all()
    assert ((wide / tall) < 1.36).all()
    # Places are uniform: a crop lies as far from one edge as from the other.
    for low, room in ((left, size[1] - wide), (top, size[0] - tall)):
        assert abs((low[room > 0] / room[room > 0]).mean() - 0.5) < 0.02
    if size == (300, 300):
        assert abs((wide / tall).mean() - 25 / 24) < 0.02  # uniform from 3/4 to 4/3
        # Given the ratio r the height is uniform from the side that holds 5 % to the picture's or that of its width.
        ratio = wide / tall
        lowest, highest = np.sqrt(0.05 / ratio) * 300, np.minimum(1, 1 / ratio) * 300
        place = np.sort((tall - lowest) / (highest - lowest))
        # Kolmogorov-Smirnov: 1.36 / sqrt(4000) = 0.022 by chance, and heights are whole pixels.
        assert np.abs(place - np.linspace(0, 1, len(place))).max() < 0.03


def test_a_crop_that_does_not_fit_is_the_largest_central_one() -> None:
    transform = Transform(Preprocess((8, 8)), "inception", area=(0.9, 1.0))
    assert transform._inception_crop((100, 400), np.random.default_rng(0)) == (133.0, 0.0, 266.0, 100.0)
    assert transform._inception_crop((400, 100), np.random.default_rng(0)) == (0.0, 133.0, 100.0, 266.0)
    for size in [(1, 1), (1, 90), (90, 1), (2, 3)]:
        for seed in range(20):
            box = Transform(Preprocess((8, 8)), "inception")._inception_crop(size, np.random.default_rng(seed))
            assert 0 <= box[0] < box[2] <= size[1]
            assert 0 <= box[1] < box[3] <= size[0]
    assert Transform(Preprocess((8, 8)), "inception")(picture(1, 1), np.random.default_rng(0)).shape == (3, 8, 8)


@pytest.mark.parametrize("orientation", [1, 6, 8, 3])
def test_crops_of_turned_jpegs(orientation: int) -> None:
    """What is drawn is drawn in the upright picture, however it is stored and at whatever scale it is decoded."""
    upright = picture(803, 1205)
    turned = np.ascontiguousarray(np.rot90(upright, {1: 0, 6: 1, 3: 2, 8: 3}[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(turned, "JPEG", quality=95, subsampling=0, exif=exif)
    transform = Transform(Preprocess((40, 40)), "inception")
    for seed in range(8):
        got, wanted = (transform(given, np.random.default_rng(seed)).astype(int) for given in (data, upright))
        assert np.abs(got - wanted).mean() < 1.5


def test_crops_come_from_the_generator_alone() -> None:
    transform, pixels = Transform(Preprocess((16, 16)), "inception"), picture(90, 120)
    first, again, other = (transform(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert transform.random
    assert not Transform(Preprocess()).random
    with pytest.raises(ValueError, match="generator"):
        transform(pixels, None)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_the_models(channels: int) -> None:
    preprocess = Preprocess((16, 16), mean=(0.5,) * channels, deviation=(0.5,) * channels)
    assert Transform(preprocess)(stored(picture(20, 30)), None).shape == (channels, 16, 16)


def test_arrays_of_any_channels() -> None:
    many = np.random.default_rng(0).random((30, 40, 6))
    preprocess = Preprocess((16, 12), 20, mean=(0.5,) * 6, deviation=(0.5,) * 6)
    got = Transform(preprocess)(many, None)
    assert got.shape == (6, 16, 12)
    one = Transform(Preprocess((16, 12), 20, mean=(0.5,), deviation=(0.5,)))(many[:, :, 4], None)
    assert np.array_equal(got[4], one[0])
    same = np.repeat(many[:, :, :1], 6, axis=2)
    cropped = Transform(preprocess, "inception")(same, np.random.default_rng(3))
    assert (cropped == cropped[:1]).all()
    with pytest.raises(UnreadablePicture, match=r"^b is no array of \(height, width, 6\)"):
        Transform(preprocess)(stored(picture(20, 30)), None, "b")


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(stored(picture(50, 40)))
    preprocess = Preprocess((24, 32), 40, "bicubic")
    got = read([path, path.read_bytes(), picture(50, 40)], preprocess)
    assert got.dtype == torch.uint8
    assert got.shape == (3, 3, 24, 32)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])
    assert read([], preprocess).shape == (0, 3, 24, 32)
    with pytest.raises(UnreadablePicture, match=r"b\.png"):
        read([path, tmp_path / "b.png"], preprocess)


def test_impossible_settings_are_refused() -> None:
    for preprocess in (Preprocess((64, 64), 48), Preprocess((64, 64), (64, 48))):
        with pytest.raises(UserError, match="too small for a crop") as refused:
            Transform(preprocess)
        advised = str(refused.value).split("--preprocess ")[1].removesuffix(".")
        assert Transform(changed(preprocess, advised)).preprocess.resize == (64, 64)  # what it says can be typed
    for area in ((0.0, 1.0), (0.5, 0.2), (0.5, 1.5)):
        with pytest.raises(UserError, match="cannot be drawn"):
            Transform(Preprocess(), "inception", area=area)


def test_mean_crop_area_is_the_one_the_docstring_states() -> None:
    """38 % of a square picture, from the stated distribution by numerical integration, and as drawn."""
    ratio = np.linspace(3 / 4, 4 / 3, 2001)
    low, high = np.sqrt(0.05 / ratio), np.minimum(1, 1 / ratio)
    stated = float((ratio * (high**3 - low**3) / (3 * (high - low))).mean())
    rng, transform = np.random.default_rng(0), Transform(Preprocess(), "inception")
    boxes = np.array([transform._inception_crop((1000, 1000), rng) for _ in range(3000)])
    drawn = float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).mean() / 1e6)
    assert math.isclose(stated, 0.375, abs_tol=0.005)
    assert math.isclose(stated, drawn, abs_tol=0.01)


class Copies(TorchDispatchMode):
    """Notes where tensors are copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.to: list[object] = []

    def __torch_dispatch__(self, operation, kinds, given=(), named=None):  # type: ignore[no-untyped-def]
        if operation is torch.ops.aten._to_copy.default and "device" in (named or {}):
            self.to.append(named["device"])
        return operation(*given, **(named or {}))


def test_normalising_copies_nothing_to_a_gpu() -> None:
    """A copy of two numbers makes the processor wait until the GPU has done all that it was given before."""
    with FakeTensorMode(), Copies() as copies:
        pixels = torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
        assert Preprocess().normalize(pixels).device.type == "cuda"
    assert copies.to == []


def test_normalising_is_by_channel() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    found = Preprocess(mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 1.0)).normalize(pixels)
    for place, (mean, deviation) in enumerate(((0.4, 0.2), (0.5, 0.3), (0.6, 1.0))):
        assert found[:, place].equal((pixels[:, place].float() / 255 - mean) / deviation)


def test_normalising_repeats_grey_and_makes_one_picture_a_batch() -> None:
    pixels = torch.randint(0, 256, (2, 1, 4, 5), dtype=torch.uint8)
    assert Preprocess().normalize(pixels).equal(Preprocess().normalize(pixels.expand(2, 3, 4, 5)))
    colour = pixels.expand(2, 3, 4, 5)
    assert Preprocess().normalize(colour[1]).equal(Preprocess().normalize(colour)[1:])


def test_normalising_leaves_what_it_is_given_and_puts_planes_behind_one_another() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    wanted = Preprocess().normalize(pixels)
    for given in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        before = given.clone()
        found = Preprocess().normalize(given)
        assert found.equal(wanted)
        assert found.is_contiguous()
        assert given.equal(before)
