"""The weights that come with the package, pre-trained here; each has a model card beside it (weights/own/NAME.md).

They are kept in bf16, which halves them; `load` makes fp32 of them, as of any half-precision file.
"""

from pathlib import Path

from vitrail.core.errors import UserError
from vitrail.weights import zoo

FOLDER = Path(__file__).parent / "own"

OWN = {"vitrail:ViT-Micro/7": "ViT-Micro_7.safetensors"}
"""Ids to files."""


def place(source: str) -> Path:
    """The file of an id. Raises UserError where there is none such."""
    name = source.removeprefix("vitrail:")
    for known, file in OWN.items():
        own = known.removeprefix("vitrail:")
        if name == own or zoo.parse(own) == _parsed(name):
            return FOLDER / file
    raise UserError(f"{source} is none of the weights that come with Vitrail; these are {', '.join(OWN)}.")


def _parsed(name: str) -> tuple[str, tuple[int, int]] | None:
    try:
        return zoo.parse(name)
    except UserError:
        return None
