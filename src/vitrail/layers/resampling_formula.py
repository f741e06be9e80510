"""The resampling matrix of an axis whose new length is not known yet, as arithmetic that a graph for any size can hold.

Unusual: PyTorch's own interpolation is written out, by its rules for where a new place lies between the old ones, and for
how much it takes of each; a test holds the two together.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.core.types import Resampling

SHARPNESS = -0.75
"""Of PyTorch's bicubic kernel (Keys' a); antialiased it is -0.5, as Pillow's."""
OFFSET = 0.1
"""DINO's, of a cell."""


def resampling_formula(old: int, new: int | torch.SymInt, rule: Resampling) -> Float[Tensor, "new old"]:
    """How much of each old row a new one takes; `new` may be a symbol."""
    place = torch.arange(new, dtype=torch.float32)[:, None]  # type: ignore[arg-type]
    rows = torch.arange(old, dtype=torch.float32)[None]
    length = place[-1:] + 1
    if rule in ("zoom", "bicubic-aligned"):
        centre = place * (old - 1) / (length - 1).clamp(min=1)
    else:
        centre = (place + 0.5) * old / (length + (OFFSET if rule == "bicubic-offset" else 0)) - 0.5
    if rule in ("zoom", "bilinear"):
        return (1 - (centre.clamp(0, old - 1) - rows).abs()).clamp(min=0)
    if rule == "bicubic-antialias":
        width = (old / length).clamp(min=1)
        taken = cubic((rows - centre).abs() / width, -0.5)
        return taken / taken.sum(1, keepdim=True)
    first = centre.floor()
    taken = torch.zeros_like(rows)
    for tap in (first - 1, first, first + 1, first + 2):
        taken = taken + cubic((tap - centre).abs(), SHARPNESS) * (tap.clamp(0, old - 1) == rows)
    # At its own size a table stays as it is, which DINO's offset would not give.
    return torch.where(length == old, (place == rows).float(), taken)


def cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' kernel of distances that are not negative."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
