"""Every kind of picture file, written for real, against the upright RGB original that it was made from."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features

from vitrail.core.errors import UserError
from vitrail.data.decode import REDUCED, UnreadablePicture, decode, opened


def photo(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    """Like a photograph in what matters here: smooth shading, hard edges, a little texture, no symmetry. Mid-range."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    phase = rng.uniform(0, 6, 3)
    picture = 128 + 50 * np.sin(3 * x + phase) * np.cos(5 * y - phase) + 30 * (x - 0.5)
    for _ in range(6):
        cy, cx, radius = rng.random(3) * (1, 1, 0.3)
        picture = np.where((y - cy) ** 2 + (x - cx) ** 2 < radius**2, picture * 0.5 + 127 * rng.random(3), picture)
    return np.clip(picture + rng.normal(0, 2, (height, width, 1)), 0, 255).round().astype(np.uint8)


RGB = photo()
JPEG_LOSS = 30  # at quality 95, at the hardest edges; a flip of RGB is off by 130
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
ALPHA = np.linspace(0, 255, RGB.shape[1]).round().astype(np.uint8)[None].repeat(RGB.shape[0], 0)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha[..., None] / 255
    return colour * part + 255 * (1 - part)


def grey3(grey: np.ndarray) -> np.ndarray:
    return grey[..., None].repeat(3, 2)


def difference(got: Image.Image, wanted: np.ndarray) -> float:
    pixels = np.asarray(got)
    assert pixels.shape == wanted.shape
    return float(np.abs(pixels.astype(float) - wanted).max())


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG written by hand, for kinds that Pillow does not write."""
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP", "JPEG2000", "GIF-exact"])
def test_lossless_colour(kind: str) -> None:
    original = RGB if kind != "GIF-exact" else RGB // 64 * 80
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(kind, {})
    assert difference(decode(stored(Image.fromarray(original), kind.removesuffix("-exact"), **options)), original) == 0


def test_jpeg_within_its_own_loss() -> None:
    data = stored(Image.fromarray(RGB), "JPEG", quality=95, subsampling=0)
    error = np.abs(np.asarray(decode(data)).astype(int) - RGB)
    assert error.mean() < 2
    assert error.max() <= JPEG_LOSS


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    """The inverse of each orientation, written out in NumPy, is what a camera stores."""
    as_stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: RGB.swapaxes(0, 1)[::-1],
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: RGB.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    data = stored(Image.fromarray(np.ascontiguousarray(as_stored)), kind, exif=exif, **options)
    with opened(data) as file:
        assert file.size == RGB.shape[:2]
    assert difference(decode(data), RGB) <= (JPEG_LOSS if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    image = Image.fromarray(np.ascontiguousarray(np.rot90(RGB, turns)))
    file = BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, chroma=444, matrix_coefficients=0, exif=exif.tobytes())
    error = np.abs(np.asarray(decode(file.getvalue())).astype(int) - RGB)
    assert error.max() <= 4
    assert error.mean() < 1


def test_avif() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for orientation, turns in [(1, 0), (6, 1)]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(np.rot90(RGB, turns)))
        data = stored(image, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
        assert np.abs(np.asarray(decode(data)).astype(int) - RGB).mean() < 1


def test_grey_and_bits() -> None:
    assert difference(decode(stored(Image.fromarray(GREY), "PNG")), grey3(GREY)) == 0
    assert difference(decode(stored(Image.fromarray(GREY), "PNG"), 1), GREY) == 0
    assert difference(decode(stored(Image.fromarray(RGB), "PNG"), 1), GREY) == 0
    bits = GREY > 128
    assert difference(decode(stored(Image.fromarray(bits), "PNG")), grey3(bits * 255)) == 0
    assert difference(decode(stored(Image.fromarray(bits), "TIFF", compression="group4"), 1), bits * 255) == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = stored(Image.fromarray(np.dstack([RGB, ALPHA])), kind, **options)
    assert difference(decode(data), on_white(RGB, ALPHA)) <= 1
    assert difference(decode(data, 4), np.dstack([RGB, ALPHA])) == 0
    assert difference(decode(data, 1), on_white(RGB, ALPHA) @ (0.299, 0.587, 0.114)) <= 2
    assert difference(decode(stored(Image.fromarray(RGB), "PNG"), 4), np.dstack([RGB, ALPHA * 0 + 255])) == 0


def test_grey_with_alpha() -> None:
    image = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
    assert difference(decode(stored(image, "PNG")), on_white(grey3(GREY), ALPHA)) <= 1
    assert difference(decode(stored(image, "PNG"), 4), np.dstack([grey3(GREY), ALPHA])) == 0


def test_palette_and_its_transparency() -> None:
    few = RGB // 64 * 80
    palette = Image.fromarray(few).quantize(64)
    assert difference(decode(stored(palette, "PNG")), few) == 0
    index = np.asarray(palette)
    clear = int(np.bincount(index.ravel()).argmax())
    one = decode(stored(palette, "PNG", transparency=clear))
    assert difference(one, np.where(index[..., None] == clear, 255, few)) == 0
    table = bytes(range(0, 256, 4))
    many = decode(stored(palette, "PNG", transparency=table))
    assert difference(many, on_white(few, np.frombuffer(table, np.uint8)[index])) <= 1
    gif = stored(palette, "GIF", transparency=clear)
    assert difference(decode(gif), np.where(index[..., None] == clear, 255, few)) == 0


def test_colour_key_transparency() -> None:
    few = RGB // 64 * 80
    key = tuple(int(value) for value in few[0, 0])
    wanted = np.where((few == few[0, 0]).all(-1, keepdims=True), 255, few)
    assert difference(decode(stored(Image.fromarray(few), "PNG", transparency=key)), wanted) == 0


def test_cmyk() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert difference(decode(stored(cmyk, "TIFF")), RGB) == 0
    jpeg = stored(cmyk, "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in jpeg  # the marker under which print programs store CMYK inverted
    error = np.abs(np.asarray(decode(jpeg)).astype(int) - RGB)
    assert error.mean() < 2
    assert error.max() <= JPEG_LOSS


def test_16_bit_is_scaled_not_clipped() -> None:
    deep = GREY.astype(np.uint16) * 257
    assert difference(decode(stored(Image.fromarray(deep), "PNG")), grey3(GREY)) == 0
    assert difference(decode(stored(Image.fromarray(deep), "TIFF"), 1), GREY) == 0
    assert difference(decode(stored(Image.fromarray(deep.astype(np.int32)), "TIFF")), grey3(GREY)) == 0
    assert difference(decode(b"P5 %d %d 65535\n" % GREY.shape[::-1] + deep.astype(">u2").tobytes(), 1), GREY) == 0
    height, width = GREY.shape
    rows = b"".join(b"\0" + (RGB[y].astype(">u2") * 257).astype(">u2").tobytes() for y in range(height))
    assert difference(decode(png(struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0), rows)), RGB) == 0


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floating_tiff(white: int) -> None:
    deep = Image.fromarray((GREY / np.float32(255) * white).astype(np.float32))
    assert difference(decode(stored(deep, "TIFF")), grey3(GREY)) == 0


@pytest.mark.parametrize("pixels", [np.array([[0.5, np.nan]]), np.array([[-1.0, 2.0]]), np.array([[0.0, 1e9]])])
def test_floating_tiff_without_a_range(pixels: np.ndarray) -> None:
    with pytest.raises(UnreadablePicture, match=r"^a\.tiff cannot be read: its pixels range from .* to "):
        decode(stored(Image.fromarray(pixels.astype(np.float32)), "TIFF"), name="a.tiff")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(kind: str) -> None:
    few = RGB // 64 * 80
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.fromarray(255 - few), Image.fromarray(few.swapaxes(0, 1).copy().reshape(few.shape))]
    data = stored(Image.fromarray(few), kind, save_all=True, append_images=frames, **options)
    with Image.open(BytesIO(data)) as file:
        assert file.n_frames == 3
    assert difference(decode(data), few) == 0


def test_multi_picture_jpeg() -> None:
    exact = {"save_all": True, "quality": 95, "subsampling": 0}
    data = stored(Image.fromarray(RGB), "MPO", append_images=[Image.fromarray(255 - RGB)], **exact)
    with Image.open(BytesIO(data)) as file:
        assert file.format == "MPO"
    assert difference(decode(data), RGB) <= JPEG_LOSS
    big = stored(Image.fromarray(photo(800, 1200)), "MPO", save_all=True, append_images=[Image.fromarray(RGB)])
    assert decode(big, 3, (100, 150)).size == (300, 200)


@pytest.mark.parametrize("large", [False, True])
def test_from_a_path_closes_it(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr("vitrail.data.decode.WHOLE", 100)
    path = tmp_path / "a picture.png"
    Image.fromarray(RGB).save(path)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    image = decode(path)
    assert difference(image, RGB) == 0
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    path.write_bytes(b"")
    with pytest.raises(UnreadablePicture, match="empty"):
        decode(path)
    path.write_bytes(b"no picture at all" * 10)
    with pytest.raises(UnreadablePicture, match="no picture of a format known here") as held:
        decode(path)
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before, held  # though the error still holds the file
    path.write_bytes(stored(Image.fromarray(RGB), "JPEG"))
    with opened(path) as file:
        assert file.crop((0.0, 0.0, 5.0, 6.0), 3, RGB.shape[:2]).shape == (6, 5, 3)  # type: ignore[union-attr]
        assert file.pixels(3)[0].size == RGB.shape[1::-1]
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    Image.fromarray(RGB).save(path)
    (tmp_path / "b.jpg").write_bytes(path.read_bytes())  # a PNG under another name is still that PNG
    assert difference(decode(tmp_path / "b.jpg"), RGB) == 0


def test_reduced_jpeg_is_as_exact_as_it_says() -> None:
    """Reduced decoding, then resizing, against full decoding, then resizing."""
    for seed in range(3):
        data = stored(Image.fromarray(photo(600, 901, seed)), "JPEG", quality=90)
        for target in [(64, 96), (100, 100), (140, 220)]:
            reduced = decode(data, 3, target)
            assert reduced.width < 901
            assert reduced.height >= REDUCED * target[0]
            assert reduced.width >= REDUCED * target[1]
            size = target[::-1]
            full = decode(data).resize(size, Image.Resampling.BILINEAR)
            error = np.abs(np.asarray(reduced.resize(size, Image.Resampling.BILINEAR)).astype(int) - np.asarray(full))
            assert error.mean() < 0.6
            assert np.quantile(error, 0.99) <= 6
    assert decode(data, 3, (301, 300)).size == (901, 600)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_jpeg_fills_a_box_that_lies_true(orientation: int) -> None:
    """A size that no block divides, decoded at an eighth: the last sample of the stored axes covers but a part of a
    block, and lies first where the orientation runs against them. Off by that part, the edge would move."""
    upright = np.zeros((803, 1205, 3), np.uint8)
    upright[:400, :600] = 255
    stand_in = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)}
    stand_in |= {6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3)}
    pixels = stand_in.get(orientation, lambda a: a)(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(Image.fromarray(np.ascontiguousarray(pixels)), "JPEG", exif=exif, quality=95)
    with opened(data) as file:
        image, box = file.pixels(1, (40, 60))
    assert image.size == (151, 101)
    assert (box[2] - box[0], box[3] - box[1]) == (1205 / 8, 803 / 8)
    got = np.asarray(image.resize((1205, 803), Image.Resampling.BILINEAR, box=box))
    across, down = int((got[200] > 127).sum()), int((got[:, 300] > 127).sum())
    assert abs(across - 600) <= 1
    assert abs(down - 400) <= 1


def damaged() -> dict[str, tuple[bytes, str]]:
    jpeg, whole = stored(Image.fromarray(photo(200, 300)), "JPEG"), stored(Image.fromarray(RGB), "PNG")
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    smaller = struct.pack(">IIBBBBB", 10000, 10000, 8, 0, 0, 0, 0)
    return {
        "empty": (b"", r"is empty \(0 bytes\)"),
        "text": (
            b"Dear reader, this is no picture.",
            r"is no picture of a format known here: it begins with b'Dear reader, thi'",
        ),
        "cut jpeg": (jpeg[: len(jpeg) // 2], r"cannot be read: .*truncated"),
        "cut head": (jpeg[:40], r"no picture|cannot be read"),
        "cut png": (whole[: len(whole) // 2], r"cannot be read: "),
        "flipped bits": (whole[:100] + bytes(byte ^ 255 for byte in whole[100:200]) + whole[200:], r"cannot be read: "),
        "bomb error": (png(header, b""), r"decompression bomb"),
        "bomb warning": (png(smaller, b""), r"would unpack to 10000 x 10000 pixels, .* decompression bomb"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", r"is no picture"),
        "heic": (b"\0\0\0\x18ftypheic" + b"\0" * 100, r"no picture|cannot be read"),
    }


@pytest.mark.parametrize("what", list(damaged()))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable(what: str, tmp_path: Path) -> None:
    data, found = damaged()[what]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for picture in (path, data):
        with pytest.raises(UnreadablePicture, match=rf"^\S*a\.jpg .*{found}.*\.$") as caught:
            decode(picture, name="" if picture is path else "a.jpg")
        assert "\n" not in str(caught.value)
    assert issubclass(UnreadablePicture, UserError)


def test_every_truncation_is_noticed() -> None:
    """At no length is half a picture handed on as a whole one."""
    for kind, options in [("PNG", {}), ("JPEG", {"progressive": True}), ("JPEG", {}), ("WEBP", {"lossless": True})]:
        data = stored(Image.fromarray(RGB), kind, **options)
        for length in range(0, len(data) - 16, 97):
            with pytest.raises(UnreadablePicture):
                decode(data[:length])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_of_any_kind_is_told_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    """Bytes overwritten anywhere: a picture comes back, or one sentence does; never another error."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image, heif = Image.fromarray(RGB), BytesIO()
    pillow_heif.from_pillow(image).save(heif)
    files = {kind: stored(image, kind) for kind in ("GIF", "TIFF", "BMP", "PPM", "JPEG2000", "TGA")}
    files |= {kind: stored(image, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")} | {"HEIF": heif.getvalue()}
    rng, said = np.random.default_rng(0), []
    for data in files.values():
        for _ in range(60):
            spoilt = np.frombuffer(data, np.uint8).copy()
            spoilt[rng.integers(0, rng.choice([len(data), min(len(data), 200)]), rng.integers(1, 6))] = rng.integers(
                256
            )
            try:
                assert decode(spoilt.tobytes(), int(rng.choice([1, 3, 4])), (8, 8), "it").width > 0
            except UnreadablePicture as error:
                said.append(str(error))
    assert len(said) > 100
    assert all(sentence.startswith("it ") and "\n" not in sentence for sentence in said)
    capfd.readouterr()  # libtiff speaks for itself


def test_missing_and_forbidden(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePicture, match=r"none\.png cannot be read: No such file or directory"):
        decode(tmp_path / "none.png")
    with pytest.raises(UnreadablePicture, match="cannot be read: Is a directory"):
        decode(tmp_path)
    path = tmp_path / "secret.png"
    Image.fromarray(RGB).save(path)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # for root there is no forbidden file
    try:
        with pytest.raises(UnreadablePicture, match=r"secret\.png cannot be read: Permission denied"):
            decode(path)
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="has no such device")
def test_a_device_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(UnreadablePicture, match="/dev/zero is no picture"):
        decode(Path("/dev/zero"))


def test_strange_exif_spoils_no_picture() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"):
        assert (
            difference(decode(stored(Image.fromarray(RGB), "JPEG", quality=95, exif=exif, subsampling=0)), RGB)
            <= JPEG_LOSS
        )


def test_arrays() -> None:
    assert difference(decode(RGB), RGB) == 0
    assert difference(decode(GREY), grey3(GREY)) == 0
    assert difference(decode(GREY[..., None], 1), GREY) == 0
    assert difference(decode(RGB[::2, ::-3]), RGB[::2, ::-3]) == 0
    for kind in (np.float16, np.float32, np.float64):
        assert difference(decode((RGB / 255).astype(kind)), RGB) == 0
    for pixels, found in [
        (np.full((4, 4), np.nan), "floating pixels from nan to nan"),
        (np.array([[0.2, np.inf]]), "floating pixels from 0.2 to inf"),
        (np.array([[-0.1, 0.2]]), "floating pixels from -0.1 to 0.2"),
        (RGB.astype(np.float32), "floating pixels from"),
        (RGB.astype(np.int64), "holds int64 pixels"),
        (RGB.transpose(2, 0, 1), "array of shape"),
        (np.zeros((0, 4), np.uint8), "array of shape"),
    ]:
        with pytest.raises(UnreadablePicture, match=f"^row 7 .*{found}"):
            decode(pixels, name="row 7")
