"""The first rows of a JPEG, to the bit as Pillow decodes them, without reading on to its end.

Unusual: the height in a copy of the header is lowered to the last row that is asked for, so that libjpeg stops there. A
training crop ends at 81 % of the height in the mean, and most of a JPEG's decoding is undoing its Huffman code, which
knows no way to begin in the middle but can be left at any time. Decoding is simplejpeg's, the libjpeg-turbo of whose
wheels needs 3/4 of the time of Pillow's for the same pixels; where the package is not there, Pillow does it.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

SEQUENTIAL = (0xC0, 0xC1)
OTHERS = frozenset((0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
START_OF_SCAN, EXIF_OR_XMP, MULTI_PICTURE, BEGIN, END = 0xDA, 0xE1, 0xE2, b"\xff\xd8", b"\xff\xd9"
UPRIGHT = (
    *(bytes.fromhex("0112 0003 00000001 0001"), bytes.fromhex("1201 0300 01000000 0100")),
    *(b'tiff:Orientation="1"', b"tiff:Orientation>1</tiff:Orientation>"),
)
"""What says upright: EXIF's entry for an orientation (its tag comes first) in either order of bytes (EXIF 2.32, 4.6.2), and
XMP's property of that name (XMP 1, 8.3), as an attribute and as an element."""
TURNS = (UPRIGHT[0][:2], UPRIGHT[1][:2], b"Orientation")
"""What may say otherwise, where it stands anywhere else."""


@dataclass(frozen=True)
class Header:
    """What stands before a JPEG's pixels, of one whose only scan holds all components from top to bottom.

    size: (height, width) as stored. components: 1 of a grey, 3 of a colour picture. frame: where in the file the height
    stands. block: the rows that are coded together. plain: a picture of 8-bit grey or colour, alone in its file and, as far
    as the file says, upright.
    """

    size: tuple[int, int]
    components: int
    frame: int
    block: int
    plain: bool


def header(data: bytes) -> Header | None:
    """Of a file, or of its beginning. None where there is any doubt, or no such scan."""
    if not data.startswith(BEGIN):
        return None
    at, frame, components, block, plain = 2, 0, 0, 0, True
    while at + 9 < len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if kind == START_OF_SCAN:
            if not frame or data[at + 4] != components:
                return None
            height, width = data[frame] << 8 | data[frame + 1], data[frame + 2] << 8 | data[frame + 3]
            plain &= data[frame - 1] == 8 and components in (1, 3) and height > 0 and width > 0
            return Header((height, width), components, frame, block, plain)
        if kind in SEQUENTIAL:
            frame, components = at + 5, data[at + 9]
            factors = [data[place] & 15 for place in range(at + 11, min(at + 10 + 3 * components, len(data)), 3)]
            block = 8 * max(factors, default=0)
        if kind in OTHERS or length < 2 or (frame and not block):
            return None
        if kind == EXIF_OR_XMP:
            said = data[at + 4 : at + 2 + length]
            if any(turn in said for turn in TURNS):
                for upright in UPRIGHT:
                    said = said.replace(upright, b"")
                plain &= not any(turn in said for turn in TURNS)
        elif kind == MULTI_PICTURE:
            plain &= not data.startswith(b"MPF\0", at + 4)
        at += 2 + length
    return None


def first_rows(data: bytes, rows: int, known: Header | None = None) -> UInt8[np.ndarray, "h w 3"] | None:
    """RGB pixels of a grey or colour JPEG, at least the first `rows` rows of them; what is behind is not looked at.

    known: its header, where that was read already.
    None where there is any doubt: the file is damaged or cut, or simplejpeg is not installed. Pillow is to judge then.
    """
    decoder = _decoder()
    if decoder is None:
        return None
    lower = _lowered(data, rows, known or header(data))
    try:
        # That data follow the last row is a warning of libjpeg's, which must be no error then.
        pixels: np.ndarray = decoder.decode_jpeg(data if lower is None else lower, strict=lower is None)
    except ValueError:
        return None
    return pixels


@cache
def _decoder() -> Any:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _lowered(data: bytes, rows: int, known: Header | None) -> bytearray | None:
    """The file with a smaller height; None where that is not possible or saves nothing.

    Only where its `header` is known, and the file is not cut (libjpeg would not say so).
    """
    if not data.endswith(END):
        return None
    if known is None:
        return None
    # Where colours are stored at half the height, every second row leans on the next one of theirs.
    low = rows if known.block == 8 else rows | 1
    if low >= known.size[0]:
        return None
    lower = bytearray(data)
    lower[known.frame : known.frame + 2] = low.to_bytes(2, "big")
    return lower
