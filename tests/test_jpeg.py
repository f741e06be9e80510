"""Reading a JPEG only as far as a crop needs it: the same bits as Pillow, and any doubt left to Pillow."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vitrail.core.types import Preprocess
from vitrail.data import decode, jpeg
from vitrail.data.decode import UnreadablePicture, opened
from vitrail.data.jpeg import first_rows, header
from vitrail.data.transforms import Transform

KINDS = {
    "colour at full size": {"subsampling": 0},
    "colour at half width": {"subsampling": 1},
    "colour at half size": {"subsampling": 2},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "stored as RGB": {"keep_rgb": True},
}


def pixels(height: int = 203, width: int = 157) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return (128 + 90 * np.sin(9 * x * y + np.arange(3)) + noise).clip(0, 255).astype(np.uint8)


def stored(picture: np.ndarray, **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_pillows_to_the_bit(kind: str) -> None:
    for picture in (pixels(), pixels()[:, :, 0]):
        if picture.ndim == 3 or kind != "stored as RGB":
            rows_are_pillows(stored(picture, **KINDS[kind]), stops=kind != "progressive")


@pytest.mark.parametrize("sampling", ["411", "440"])
def test_rows_are_pillows_where_pillow_stores_no_such_colours(sampling: str) -> None:
    """At a quarter of the width, and at half the height alone."""
    rows_are_pillows(simplejpeg.encode_jpeg(pixels(), quality=90, colorsubsampling=sampling), stops=True)


def rows_are_pillows(data: bytes, stops: bool) -> None:
    wanted = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    for rows in range(1, len(wanted) + 1):
        got = first_rows(data, rows)
        assert got is not None
        assert np.array_equal(got[:rows], wanted[:rows])
        assert len(got) <= rows + 1 if stops else len(got) == len(wanted)


def test_a_crop_is_the_same_with_and_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored(pixels(), subsampling=2)
    transform = Transform(Preprocess((64, 64)), "inception")
    with_it = [transform(data, np.random.default_rng(seed)) for seed in range(8)]
    monkeypatch.setattr(jpeg, "_decoder", lambda: None)
    for seed, got in enumerate(with_it):
        assert np.array_equal(got, transform(data, np.random.default_rng(seed)))


def test_what_is_not_plain_is_left_to_pillow() -> None:
    """Turned, CMYK and large pictures: the crop is the same as from their decoded pixels."""
    transform = Transform(Preprocess((48, 48)), "inception")
    turned = Image.Exif()
    turned[0x0112] = 6
    print_colours = BytesIO()
    Image.fromarray(pixels()).convert("CMYK").save(print_colours, "JPEG")
    for data in (stored(pixels(), exif=turned, subsampling=0), print_colours.getvalue()):
        with opened(data) as file:
            whole = np.asarray(file.pixels(3)[0])
        for seed in range(4):
            got = transform(data, np.random.default_rng(seed))
            assert np.array_equal(got, transform(whole, np.random.default_rng(seed)))
    with opened(stored(pixels(), exif=turned)) as file:
        assert file.size == (157, 203)
        assert file.crop((0.0, 0.0, 10.0, 10.0), 3, (30, 40)) is None  # Pillow gives it at half size


def exif(**tags: int) -> bytes:
    made = Image.Exif()
    for name, value in tags.items():
        made[{"orientation": 0x0112, "width": 0x0100}[name]] = value
    return made.tobytes()


SWAPPED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%c\0\0\0\0\0\0\0"
"""EXIF with an orientation alone, in Intel's order of bytes."""
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/' xmlns:tiff='http://ns.adobe.com/tiff/1.0/' %s</x:xmpmeta>"


@pytest.mark.parametrize(
    ("said", "plain", "turned"),
    [
        ({}, True, 1),
        ({"exif": exif(width=7)}, True, 1),
        ({"exif": exif(orientation=1, width=7)}, True, 1),
        ({"exif": exif(orientation=6)}, False, 6),
        ({"exif": SWAPPED % 1}, True, 1),
        ({"exif": SWAPPED % 8}, False, 8),
        ({"exif": exif(width=0x0112)}, False, 1),  # no orientation, but its tag's two bytes: left to Pillow
        ({"xmp": XMP % b">"}, True, 1),
        ({"xmp": XMP % b'tiff:Orientation="1">'}, True, 1),
        ({"xmp": XMP % b'tiff:Orientation="6">'}, False, 6),
        ({"xmp": XMP % b"><tiff:Orientation>1</tiff:Orientation>"}, True, 1),
        ({"xmp": XMP % b"><tiff:Orientation>8</tiff:Orientation>"}, False, 8),
        ({"xmp": XMP % b"tiff:Orientation='1'>"}, False, 1),  # not as it is mostly written: left to Pillow
        ({"exif": exif(orientation=1), "xmp": XMP % b'tiff:Orientation="6">'}, False, 1),  # EXIF goes first
        ({"exif": exif(orientation=6), "xmp": XMP % b'tiff:Orientation="1">'}, False, 6),
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_a_header_says_what_pillow_says(said: dict[str, bytes], plain: bool, turned: int, grey: bool) -> None:
    picture = pixels()[:, :, 0] if grey else pixels()
    data = stored(picture, **said)
    found, pillow = header(data), Image.open(BytesIO(data))
    assert found is not None
    assert (found.size, found.components) == (pillow.size[::-1], len(pillow.getbands()))
    assert found.plain == plain
    assert pillow.getexif().get(0x0112, 1) == turned
    with opened(data) as file:
        assert file.size == (pillow.size if turned >= 5 else pillow.size[::-1])
        whole = np.asarray(file.pixels(3)[0])
    transform = Transform(Preprocess((48, 48)), "inception")
    assert np.array_equal(transform(data, np.random.default_rng(0)), transform(whole, np.random.default_rng(0)))


def test_pillow_is_not_asked_for_a_crop_of_a_plain_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*given: object) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(decode, "_identified", asked)
    transform = Transform(Preprocess((48, 48)), "inception")
    assert transform(stored(pixels()), np.random.default_rng(0)).shape == (3, 48, 48)
    with pytest.raises(UnreadablePicture, match="Pillow was asked"):
        transform(stored(pixels(), exif=exif(orientation=6)), np.random.default_rng(0))


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 203 * 157 - 1)
    with pytest.raises(UnreadablePicture, match=r"157 x 203 pixels, more than the 31,870"):
        Transform(Preprocess((48, 48)))(stored(pixels()), None)


def test_a_cut_file_is_noticed_wherever_the_crop_lies() -> None:
    data = stored(pixels())
    transform = Transform(Preprocess((32, 32)), "inception", area=(0.05, 0.06))
    for end in (len(data) - 1, len(data) - 200, len(data) // 2):
        assert first_rows(data[:end], 8) is None
        for seed in range(5):
            with pytest.raises(UnreadablePicture, match="cannot be read"):
                transform(data[:end], np.random.default_rng(seed))


def test_no_bytes_make_it_fail_otherwise() -> None:
    """Headers with any one byte changed: pixels or None, or pictures that Pillow judges; never another error."""
    data = stored(pixels(40, 40))
    rng = np.random.default_rng(0)
    for place in range(2, 700):
        spoilt = bytearray(data)
        spoilt[place] = rng.integers(256)
        got = first_rows(bytes(spoilt), 8)
        assert got is None or got.shape[2] == 3
    for rubbish in (b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xc0\x00\x0b\xff\xd9", bytes(300)):
        assert first_rows(rubbish, 8) is None


def test_from_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(stored(pixels()))
    transform = Transform(Preprocess((32, 32)), "inception")
    from_path = transform(tmp_path / "a.jpg", np.random.default_rng(3))
    assert np.array_equal(from_path, transform(stored(pixels()), np.random.default_rng(3)))
