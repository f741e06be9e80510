"""A data set as a plane: t-SNE of the model's features, so that pictures that the model finds alike lie together."""

import numpy as np
from jaxtyping import Float

from vitrail.core.errors import UserError

FEWEST = 10
"""Pictures below which a map says nothing."""


def plane(features: Float[np.ndarray, "n d"], seed: int = 0, perplexity: float = 30.0) -> Float[np.ndarray, "n 2"]:
    """Each picture's place by t-SNE ("Visualizing Data using t-SNE", van der Maaten and Hinton 2008), in no unit.

    scikit-learn's, on features of unit length, begun from their first two principal components; its perplexity is at most a
    third of the pictures. Neighbours mean likeness; sizes of groups and distances between them mean nothing.
    Raises UserError for fewer than 10 pictures, and where scikit-learn is not installed.
    """
    if len(features) < FEWEST:
        raise UserError(f"a map needs at least {FEWEST} pictures, not {len(features)}: give more with --data.")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("a map needs scikit-learn, which is not installed: pip install 'vitrail[figures]'.") from error
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = min(perplexity, (len(features) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(unit.astype(np.float32))
    return np.asarray(found, np.float64)


def neighbours_alike(places: Float[np.ndarray, "n 2"], labels: np.ndarray, count: int = 10) -> float:
    """The share of each picture's `count` nearest on the map that are of its class, averaged: 1 where classes are apart."""
    squared = (places**2).sum(1)
    distance = squared[:, None] + squared - 2 * places @ places.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argpartition(distance, min(count, len(places) - 1) - 1, axis=1)[:, :count]
    return float((labels[nearest] == labels[:, None]).mean())
