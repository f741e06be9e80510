"""How a person says in a flag what a file does not: "imagenet,bicubic,resize=256,size=224"."""

import re
from dataclasses import replace
from typing import Any, get_args

from vitrail.core.errors import UserError
from vitrail.core.types import Interpolation, Preprocess
from vitrail.weights.looks import CLIP, HALF, IMAGENET

NORMALISATIONS = {"half": HALF, "imagenet": IMAGENET, "clip": CLIP}
WAYS = (
    "half, imagenet or clip, an interpolation, size=224 or size=224x192, resize=256 (the shorter side), 256x256 or none"
)


def changed(preprocess: Preprocess, words: str) -> Preprocess:
    """`preprocess` with what the words say, parted by commas; see WAYS. Raises UserError for other words."""
    changes: dict[str, Any] = {}
    for word in filter(None, (part.strip() for part in words.split(","))):
        size = re.fullmatch(r"(size|resize)=(?:(\d+)(?:x(\d+))?|none)", word)
        if word in NORMALISATIONS:
            changes["mean"], changes["deviation"] = NORMALISATIONS[word]
        elif word in get_args(Interpolation):
            changes["interpolation"] = word
        elif size is not None and size[2]:
            first, second = int(size[2]), int(size[3] or size[2])
            if not first or not second:
                raise UserError(f"--preprocess {word} asks for no pixels: give at least 1")
            changes[size[1]] = first if size[1] == "resize" and not size[3] else (first, second)
        elif word == "resize=none":
            changes["resize"] = None
        else:
            raise UserError(f"--preprocess knows no {word!r}: give {WAYS}, with commas between them")
    return replace(preprocess, **changes)
