"""What a person may say beside a checkpoint; checked at once, so that a wrong type is one sentence and no traceback."""

from dataclasses import dataclass

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess


@dataclass(frozen=True)
class Options:
    """What `load` may be told beside the source, in its words; of the right types, or a UserError says which is not."""

    heads: int | None = None
    grid: tuple[int, int] | None = None
    image: tuple[int, int] | None = None
    dropout: float | None = None
    drop_path: float | None = None
    preprocess: Preprocess | str | None = None

    def __post_init__(self) -> None:
        pair = "a pair of whole numbers from 1, as in (12, 16)"
        wanted = {
            "heads": ("a whole number from 1", _whole),
            "grid": (pair, _pair),
            "image": (pair, _pair),
            "dropout": ("a number", _number),
            "drop_path": ("a number", _number),
            "preprocess": ("a Preprocess or words", lambda value: isinstance(value, Preprocess | str)),
        }
        for name, (what, fits) in wanted.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise UserError(f"{name} must be {what}, not {value!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_whole(one) for one in value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
