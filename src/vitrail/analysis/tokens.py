"""What patches have become: how alike their tokens are, and their main directions as colours."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.analysis.filters import principal

EDGES = (2, 98)
"""Percentiles that become the darkest and the brightest of a colour: a few odd tokens must not leave the rest grey."""
MOST_SAMPLES = 20_000
"""Tokens that directions are found from; more are thinned evenly."""


def token_similarity(tokens: Float[Tensor, "b n d"], queries: tuple[int, ...]) -> Float[np.ndarray, "b queries n"]:
    """The cosine similarity of patch tokens `queries` (from 0, in row order) with all patch tokens, in [-1, 1]."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    return (unit[:, list(queries)] @ unit.mT).float().cpu().numpy()


def token_colours(
    tokens: Float[Tensor, "b n d"],
) -> tuple[UInt8[np.ndarray, "b n 3"], Float[np.ndarray, "three"]]:
    """The first three principal components of all tokens of all pictures as red, green and blue; and their variance shares.

    Each from its 2nd percentile (0) to its 98th (255). A colour means the same in all the pictures given together, and
    nothing across two calls.
    """
    rows = tokens.flatten(0, 1).double().cpu().numpy()
    axes, shares = principal(rows[:: -(-len(rows) // MOST_SAMPLES)], 3)
    along = np.zeros((len(rows), 3))
    along[:, : len(axes)] = (rows - rows.mean(0)) @ axes.T
    low, high = np.percentile(along, EDGES, axis=0)
    scaled = np.clip((along - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours = np.round(255 * scaled).astype(np.uint8).reshape(*tokens.shape[:2], 3)
    return colours, np.pad(shares[:3], (0, 3 - len(shares[:3])))
