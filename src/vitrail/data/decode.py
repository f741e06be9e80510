"""Any picture file, upright, as 8-bit grey, RGB or RGBA.

Unusual: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the caller needs no more, inside libjpeg's inverse
cosine transform, and only while the reduced picture still has `REDUCED` times the pixels a side that are asked for. A
file that cannot be read is an `UnreadablePicture` that says what was found; nothing is guessed or half-decoded. A
training crop alone (`Opened.crop`) reads a JPEG no further than to the crop's last row.

What is decided here, for want of a rule in the files themselves:
- Transparent pixels are laid on white, the page that cut-outs and line drawings are made for; the colours stored under
  full transparency are arbitrary (often black) and never meant to be seen.
- 16-bit grey is divided by 257, as its full range says. Floating TIFFs state no range: the smallest of 1, 255 and 65535
  that holds every pixel is taken as white.
- Colour profiles are ignored, as in the pipelines that published models were trained with.
- Of animations and multi-picture files the first frame counts.
"""

import errno
import math
import os
import stat
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from io import BufferedReader, BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vitrail.core.errors import UserError
from vitrail.core.types import Picture
from vitrail.data.jpeg import Header, first_rows, header

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

WHOLE, HEAD = 2**20, 2**15
"""Bytes up to which a file is read at once, and those of a larger one that are read first: a JPEG's size mostly stands
among them, behind a thumbnail perhaps and a profile."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Pillow's bitmap readers, commonest first. EPS and WMF are left out on purpose: they would start another program on
# whatever a file named .jpg holds.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "PPM", "JPEG2000"),
    *("TGA", "ICO", "DIB", "PCX", "SGI", "DDS", "QOI", "PSD"),
)

# Measured on 80 photographs (median 500 x 375, JPEG), reduced decoding then `resize` against full decoding then
# `resize`, bilinear and bicubic, to 32, 64, 96 and 128 pixels, mean absolute difference in levels of 255, with the
# worst picture in brackets: factor 1: 0.9 to 1.5 (3.8); 1.5: 0.5 to 0.7 (2.1); 2: 0.36 to 0.46 (1.1); 3: 0.19 to 0.35
# (0.5). At 2 the error is that of rounding to a level.
REDUCED = 2

# EXIF orientation -> how to turn the stored pixels upright, and which upright axes (x, y) then run against the stored
# ones: there the part block that a reduced JPEG adds at its end comes first.
ORIENTATIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}


class UnreadablePicture(UserError):
    """One picture that cannot be read: its name, what was found, what to do."""


class Shrunk(np.ndarray):
    """uint8 pixels of a picture that was made smaller beforehand. It is treated as the picture that it was: crops are
    drawn, and taken, as of `whole`, its (height, width)."""

    whole: tuple[int, int]

    @classmethod
    def of(cls, pixels: np.ndarray, whole: tuple[int, int]) -> "Shrunk":
        shrunk = pixels.view(cls)
        shrunk.whole = whole
        return shrunk


def decode(picture: Picture, channels: int = 3, at_least: tuple[int, int] | None = None, name: str = "") -> Image.Image:
    """A picture upright, in mode L (1 channel), RGB (3) or RGBA (4).

    at_least: the (height, width) that is needed of the whole upright picture. A JPEG may then come back at 1/2, 1/4 or
        1/8 of its size, never below `REDUCED` times this: resized to `at_least`, it differs from the full decode by
        half a level of 255 in the mean. None decodes in full.
    name: what to call the picture in a message; a path names itself.
    Raises UnreadablePicture.
    """
    with opened(picture, name) as file:
        return file.pixels(channels, at_least)[0]


@dataclass
class Opened:
    """A picture whose header is read and whose pixels are not: its size is known before it is decoded.

    given: Pillow's picture; of a plain JPEG its header, for which Pillow takes a tenth of the time of decoding. file: of a
    picture file; array: (h, w) or (h, w, 3 or 4) uint8, of what is no file. size: (height, width) of the whole, upright.
    """

    given: Image.Image | Header | None
    file: BufferedReader | BytesIO | None
    array: np.ndarray | None
    orientation: int
    name: str
    size: tuple[int, int]

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    @cached_property
    def image(self) -> Image.Image:
        """A file's, as Pillow has it: of a plain JPEG asked only now, which takes as long as a tenth of its decoding."""
        assert self.file is not None
        return self.given if isinstance(self.given, Image.Image) else _identified(self.file, self.name)

    def crop(self, box: Box, channels: int, at_least: tuple[int, int]) -> UInt8[np.ndarray, "h w c"] | None:
        """The pixels of a box of whole pixels, once; read-only perhaps. Of a picture shrunk beforehand, the nearest
        whole pixels there. None where a JPEG is so large that `pixels` would give it reduced."""
        left, top, right, bottom = map(int, box)
        if self.array is not None:
            if (stored := self.array.shape[:2]) != self.size:
                across, down = stored[1] / self.size[1], stored[0] / self.size[0]
                left, top = min(round(left * across), stored[1] - 1), min(round(top * down), stored[0] - 1)
                right, bottom = max(left + 1, round(right * across)), max(top + 1, round(bottom * down))
            if self.array.shape[2:] == (channels,):
                return self.array[top:bottom, left:right]
            return np.atleast_3d(np.asarray(self.pixels(channels)[0].crop((left, top, right, bottom))))
        assert self.file is not None
        plain = self.given if isinstance(self.given, Header) else None
        if plain or self.image.format in ("JPEG", "MPO"):
            if min(size // math.ceil(REDUCED * wanted) for size, wanted in zip(self.size, at_least, strict=True)) >= 2:
                return None
            if channels == 3 and (plain or self._as_plain()):
                with _Reading(self.name):
                    place = self.file.tell()
                    self.file.seek(0)
                    rows = first_rows(self.file.read(), bottom, plain)
                    self.file.seek(place)
                if rows is not None:
                    return rows[top:bottom, left:right]
        return np.atleast_3d(np.asarray(self.pixels(channels)[0].crop((left, top, right, bottom))))

    def _as_plain(self) -> bool:
        return (self.image.format, self.orientation) == ("JPEG", 1) and self.image.mode in ("L", "RGB")

    def pixels(
        self, channels: int, at_least: tuple[int, int] | None = None, part: Box | None = None
    ) -> tuple[Image.Image, Box]:
        """The picture as in `decode`, once, and the box in it that the whole picture fills: all of it, except where a
        reduced JPEG ends in part of a block, or where `part`, a box of the whole, is all that is needed."""
        if channels not in MODES:
            raise UserError(f"{self.name} is a picture file, which gives 1, 3 or 4 channels, not {channels}")
        if self.array is not None:
            return self._array_pixels(channels, at_least, part)
        with _Reading(self.name):
            wanted = None
            if at_least is not None:
                down, across = at_least[::-1] if self.orientation >= 5 else at_least
                wanted = (max(1, math.ceil(REDUCED * across)), max(1, math.ceil(REDUCED * down)))
            drafted = self.image.draft("L" if channels == 1 else None, wanted)
            image = _converted(self.image, MODES[channels])
            width, height = map(float, drafted[1][2:] if drafted else image.size)
        against_x = against_y = False
        if self.orientation in ORIENTATIONS:
            turn, against_x, against_y = ORIENTATIONS[self.orientation]
            image = image.transpose(turn)
            if self.orientation >= 5:
                width, height = height, width
        left, top = (image.width - width) * against_x, (image.height - height) * against_y
        return image, (left, top, left + width, top + height)

    def _array_pixels(
        self, channels: int, at_least: tuple[int, int] | None, part: Box | None
    ) -> tuple[Image.Image, Box]:
        assert self.array is not None
        height, width = self.array.shape[:2]
        left, top, right, bottom = 0, 0, width, height
        if part is not None and at_least is not None:
            # With what a filter of Pillow's, at most 3 wide on either side, sees beyond it.
            across, down = width / self.size[1], height / self.size[0]
            wide, tall = (1 + 3 * max(1.0, have / want) for have, want in ((width, at_least[1]), (height, at_least[0])))
            left, right = max(0, int(part[0] * across - wide)), min(width, math.ceil(part[2] * across + wide))
            top, bottom = max(0, int(part[1] * down - tall)), min(height, math.ceil(part[3] * down + tall))
        image = Image.fromarray(np.ascontiguousarray(self.array[top:bottom, left:right]))
        filled = (float(-left), float(-top), float(width - left), float(height - top))
        return _converted(image, MODES[channels]), filled


def opened(picture: Picture, name: str = "") -> Opened:
    """Reads a picture's header. As a context it closes the picture's file. Raises UnreadablePicture."""
    name = name or (str(picture) if isinstance(picture, Path) else "the picture")
    if isinstance(picture, np.ndarray):
        whole = getattr(picture, "whole", None)
        array = _checked(np.asarray(picture), name)
        return Opened(None, None, array, 1, name, whole or (array.shape[0], array.shape[1]))
    _silence_bomb_warning()
    with _Reading(name):
        file = _file(picture) if isinstance(picture, Path) else BytesIO(picture)
        try:
            return _begun(file, name)
        except BaseException:
            file.close()
            raise


def _file(path: Path) -> BufferedReader | BytesIO:
    file = path.open("rb", buffering=0)
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_size > WHOLE:  # a device may have no end
        return BufferedReader(file)
    with file:
        return BytesIO(file.read())


def _begun(file: BufferedReader | BytesIO, name: str) -> Opened:
    head = file.read(HEAD)
    if not head:
        raise UnreadablePicture(f"{name} cannot be read: it is empty (0 bytes); replace it or take it out.")
    known = header(head)
    if known is not None and known.plain:
        _refuse_bomb(known.size[1], known.size[0], name)
        return Opened(known, file, None, 1, name, known.size)
    image = _identified(file, name)
    _refuse_bomb(image.width, image.height, name)
    if image.format == "TIFF":
        image.load()  # which turns it upright and forgets the orientation: Pillow does so for this format alone
    orientation = image.getexif().get(0x0112, 1)
    orientation = orientation if orientation in ORIENTATIONS else 1
    return Opened(image, file, None, orientation, name, image.size if orientation >= 5 else image.size[::-1])


def _identified(file: BufferedReader | BytesIO, name: str) -> Image.Image:
    """By Pillow. Raises UnreadablePicture where it knows no such format, and what its readers raise."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if head[4:8] == b"ftyp":
        _register_heif()
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        raise UnreadablePicture(
            f"{name} is no picture of a format known here: it begins with {head!r}; replace it or take it out."
        ) from error


def _refuse_bomb(width: int, height: int, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise UnreadablePicture(
            f"{name} would unpack to {width} x {height} pixels, more than the {limit:,} from which on a file is taken for a "
            "decompression bomb; shrink it or take it out."
        )


class _Reading:
    """Turns whatever a reader raises on a bad file into UnreadablePicture. Pillow's readers raise OSError, SyntaxError,
    ValueError, struct.error, IndexError and more; only what is the machine's fault is let through."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError | MemoryError):
            return
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            return
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        found = " ".join(found.split()).rstrip(".")
        raise UnreadablePicture(f"{self.name} cannot be read: {found}; replace it or take it out.") from error


@cache
def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


@cache
def _silence_bomb_warning() -> None:
    """`opened` refuses at the size where Pillow only warns. The filter stays: to set and reset it for each picture
    would reset every other warning's "shown once" along with it."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _formats() -> tuple[str, ...]:
    return FORMATS if "HEIF" in Image.OPEN else tuple(name for name in FORMATS if name != "HEIF")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    white = next((white for white in (1, 255, 65535) if high <= white), None) if image.mode == "F" else 65535
    if white is None or not (low >= 0 and high <= white):
        raise ValueError(f"its pixels range from {low:g} to {high:g}, which says nothing of black and white")
    return Image.fromarray(np.rint(pixels * (255 / white)).astype(np.uint8))


def _checked(pixels: np.ndarray, name: str) -> np.ndarray:
    """(h, w) or (h, w, 3 or 4) uint8."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise UnreadablePicture(
            f"{name} is an array of shape {pixels.shape}; give (height, width) or (height, width, 1, 3 or 4)."
        )
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):
            raise UnreadablePicture(
                f"{name} holds floating pixels from {low:g} to {high:g}; give finite numbers from 0 to 1, or uint8."
            )
        pixels = np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise UnreadablePicture(f"{name} holds {pixels.dtype} pixels; give uint8, or floating numbers from 0 to 1.")
    return pixels
