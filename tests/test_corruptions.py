"""Common corruptions against imagecorruptions 1.1.2, to which the same random numbers are given.

imagecorruptions as it is cannot be imported beside NumPy 2, SciPy 1.15, scikit-image 0.23 or setuptools 82: it asks for
pkg_resources, scipy.ndimage.interpolation, np.float_ and gaussian(multichannel=True). Each is handed to it here; its own
formulas are untouched. It draws from np.random, which is replaced, in its module alone, by one generator, a copy of which
draws for ours.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.filters
import skimage.util
import torch
from PIL import Image

from vitrail.analysis import corruptions, weather
from vitrail.analysis.blurs import gaussian
from vitrail.analysis.colours import from_hsv, to_hsv
from vitrail.analysis.corruptions import COMMON, CORRUPTIONS, EXTRA, TABLE, corrupt, sample_affine
from vitrail.core.errors import UserError


class Handed:
    """A module with a few names replaced."""

    def __init__(self, module: object, **replaced: object) -> None:
        self.__dict__.update(replaced, module=module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.module, name)


@pytest.fixture(scope="module")
def library() -> Any:
    found = importlib.util.find_spec("imagecorruptions")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent
    resources, interpolation = types.ModuleType("pkg_resources"), types.ModuleType("scipy.ndimage.interpolation")
    resources.__dict__["resource_filename"] = lambda _, name: str(folder / name)
    interpolation.__dict__["map_coordinates"] = scipy.ndimage.map_coordinates
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pkg_resources", resources)
        patch.setitem(sys.modules, "scipy.ndimage.interpolation", interpolation)
        module = importlib.import_module("imagecorruptions.corruptions")

    def old_gaussian(image: np.ndarray, sigma: object, multichannel: bool = False, **more: object) -> np.ndarray:
        return skimage.filters.gaussian(image, sigma, channel_axis=-1 if multichannel else None, **more)

    module.__dict__["gaussian"] = old_gaussian
    return module


def theirs(module: Any, name: str, picture: np.ndarray, severity: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed)
    random = SimpleNamespace(normal=draws.normal, uniform=draws.uniform, poisson=draws.poisson, randint=draws.integers)
    module.np = Handed(np, random=random, float_=np.float64)

    def noisy(image: np.ndarray, **how: object) -> np.ndarray:
        return skimage.util.random_noise(image, rng=draws, **how)

    module.sk = SimpleNamespace(util=SimpleNamespace(random_noise=noisy), color=skimage.color)
    return np.uint8(getattr(module, name)(Image.fromarray(picture), severity))


def ours(name: str, picture: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """With ImageNet-C's constants, which imagecorruptions has, at any size."""
    formula, _, large = TABLE[name]
    return corruptions.levels(formula(picture, large[severity - 1], np.random.default_rng(seed)))


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colours that run into each other, flat parts, edges, black and white."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    picture = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y), np.sin(5 * x * y + 1)], -1) * 110 + 128
    picture += generator.normal(0, 6, picture.shape)
    picture[height // 5 : height // 2, width // 4 : width // 2] = generator.integers(0, 256, 3)
    picture[: height // 8, : width // 8], picture[-height // 8 :, -width // 8 :] = 0, 255
    return np.clip(picture, 0, 255).astype(np.uint8)


# What may differ by one level, as a share of all numbers: where a picture is flat, OpenCV's sums (by Fourier transform, in
# fp32) end on the other side of a whole number. All others agree to the bit.
LOOSE = {"defocus_blur": 0.1, "snow": 1e-3, "spatter": 0.01}


@pytest.mark.parametrize("name", [name for name in TABLE if name != "frost"])
def test_as_imagecorruptions(library: Any, name: str) -> None:
    for size in ((32, 32), (64, 96), (120, 75)):
        for severity in range(1, 6):
            picture, seed = scene(*size), 10 * severity
            there, here = theirs(library, name, picture, severity, seed), ours(name, picture, severity, seed)
            apart = np.abs(there.astype(int) - here)
            assert apart.max() <= (name in LOOSE), (size, severity)
            assert (apart > 0).mean() <= LOOSE.get(name, 0), (size, severity)


def test_frost_is_laid_on_as_in_imagecorruptions(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same layer: noise in place of a photograph."""
    picture = scene(70, 90)
    layer = np.random.default_rng(3).integers(0, 256, (400, 400, 3), np.uint8)
    seen = {}

    def read(_: str) -> np.ndarray:
        return layer

    def resized(image: np.ndarray, dsize: tuple[int, int], interpolation: int) -> np.ndarray:
        seen["whole"] = np.tile(image, (2, 2, 1))[: dsize[1], : dsize[0]]
        return seen["whole"]

    monkeypatch.setattr(library, "cv2", SimpleNamespace(imread=read, resize=resized, INTER_CUBIC=2))
    for severity in range(1, 6):
        there = theirs(library, "frost", picture, severity, severity)
        draws = np.random.default_rng(severity)
        draws.integers(5)
        top, left = (draws.integers(0, seen["whole"].shape[axis] - picture.shape[axis]) for axis in (0, 1))
        part = seen["whole"][top : top + 70, left : left + 90, ::-1]
        np.testing.assert_array_equal(
            there, corruptions.levels(weather.frosted(picture, weather.FROST[severity - 1], part))
        )


def test_grown_frost_is_like_the_photographs(library: Any) -> None:
    """Mean, deviation, and how power falls with frequency, as in the five pictures that the library draws from."""
    folder = Path(library.__file__).parent / "frost"
    falls = []
    for name, (mean, deviation) in zip(("1.png", "2.png", "3.png", "4.jpg", "5.jpg"), weather.FROSTS, strict=True):
        photograph = np.asarray(Image.open(folder / f"frost{name}").convert("RGB"), float)
        np.testing.assert_allclose(photograph.mean((0, 1)), mean, atol=0.6)
        np.testing.assert_allclose(photograph.std((0, 1)), deviation, atol=0.6)
        falls.append(fall(photograph[:256, :256].mean(2)))
    grown = [fall(weather.ice((256, 256), np.random.default_rng(seed))) for seed in range(5)]
    assert abs(np.mean(grown) - np.mean(falls)) < 0.3, (grown, falls)


def fall(x: np.ndarray) -> float:
    """The slope of log power against log frequency, from 2 to 64 waves a side of 256."""
    power = np.abs(np.fft.fft2(x - x.mean())) ** 2
    waves = np.hypot(*np.meshgrid(*[np.fft.fftfreq(len(x)) * len(x)] * 2))
    octaves = [np.log2(power[(waves >= low) & (waves < 2 * low)].mean()) for low in (2, 4, 8, 16, 32)]
    return float(np.polyfit(range(5), octaves, 1)[0])


def test_filters_are_scipys() -> None:
    x = np.random.default_rng(0).random((40, 50, 3))
    for sigma in (0.3, 1.0, 2.7):
        np.testing.assert_array_equal(
            gaussian(x, sigma), scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
        )
        there = scipy.ndimage.gaussian_filter(x[..., 0], (sigma, 2), mode="reflect", truncate=3)
        np.testing.assert_array_equal(gaussian(x[..., 0], (sigma, 2.0), "symmetric", 3.0), there)


def test_colours_are_scikit_images() -> None:
    levels = np.linspace(0, 1, 12)
    rgb = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(12, -1, 3)
    np.testing.assert_array_equal(to_hsv(rgb), skimage.color.rgb2hsv(rgb))
    np.testing.assert_array_equal(from_hsv(to_hsv(rgb)), skimage.color.hsv2rgb(skimage.color.rgb2hsv(rgb)))


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (64, 64), (97, 128)])
def test_any_size_and_every_severity_is_worse(size: tuple[int, int]) -> None:
    """Each gives the same shape, does something, and at 5 more than at 1; and a seed gives the same picture twice."""
    picture = scene(*size)
    assert len(COMMON) == 15
    assert len(EXTRA) == 4
    for name, corruption in CORRUPTIONS.items():
        apart = []
        for severity in (1, 5):
            done = corruption(picture, severity, np.random.default_rng(1))
            assert done.shape == picture.shape
            np.testing.assert_array_equal(done, corruption(picture, severity, np.random.default_rng(1)))
            apart.append(np.abs(done.astype(int) - picture).mean())
        assert apart[0] > 0, name
        # The authors' saturation falls at 1 and rises at 5; on small pictures that is the smaller change.
        assert apart[1] > apart[0] or name in ("saturate", "elastic_transform"), (name, apart)


def test_small_pictures_take_cifars_constants() -> None:
    small, large = scene(63, 80), scene(64, 80)
    for picture, constants in ((small, 1), (large, 2)):
        expected = corruptions.contrast(picture, TABLE["contrast"][constants][2], np.random.default_rng(0))
        np.testing.assert_array_equal(
            CORRUPTIONS["contrast"](picture, 3, np.random.default_rng(0)), expected.astype(np.uint8)
        )


class Told(np.random.Generator):
    """Draws what it is told."""

    def __init__(self, pair: tuple[float, float]) -> None:
        super().__init__(np.random.PCG64(0))
        self.pair = pair

    def uniform(self, low: Any = 0, high: Any = 1, size: Any = None) -> Any:
        return np.broadcast_to(self.pair, size)


def test_an_affine_part_moves_what_the_corners_say() -> None:
    """Corners that stay move nothing; corners that move as one move the picture."""
    x = scene(40, 40) / 255
    np.testing.assert_allclose(sample_affine(x, 0.1, Told((0.0, 0.0))), x, atol=1e-12)
    np.testing.assert_allclose(sample_affine(x, 0.1, Told((3.0, -2.0)))[5:30, 5:30], x[7:32, 2:27], atol=1e-12)


def test_a_batch() -> None:
    pictures = torch.from_numpy(np.stack([scene(32, 40, seed) for seed in range(3)])).permute(0, 3, 1, 2)
    done = corrupt(pictures, "gaussian_noise", 2, 5)
    assert done.shape == pictures.shape
    third = CORRUPTIONS["gaussian_noise"](scene(32, 40, 2), 2, np.random.default_rng((5, 2)))
    np.testing.assert_array_equal(done[2].permute(1, 2, 0).numpy(), third)


@pytest.mark.parametrize(
    ("corruption", "words"),
    [
        (lambda x: corrupt(x, "gauss", 1, 0), "no corruption 'gauss'"),
        (lambda x: corrupt(x, "fog", 6, 0), "1 to 5, not 6"),
        (lambda x: corrupt(x[..., :31], "fog", 1, 0), "at least 32 pixels"),
        (lambda x: corrupt(x[:, :1], "fog", 1, 0), "3 channels, not 1"),
    ],
)
def test_mistakes_are_said(corruption: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    with pytest.raises(UserError, match=words):
        corruption(torch.zeros(1, 3, 32, 40, dtype=torch.uint8))
