"""Which pictures are likely to be labelled wrongly, from what a model says of pictures that it was not trained on.

The rule is confident learning's (Northcutt et al. 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels",
section 3): a class counts as likely for a picture where its probability is at least the mean that the class gets on the
pictures labelled so. It puts classes that a model is shy of on the same footing as those it is sure of.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Suspect:
    """A picture that may be labelled wrongly.

    index: its row. given: the class that it is labelled with, with its `probability_of_given`. other: the likeliest
    other class, with its `probability`. likely: whether confident learning counts the label as wrong; the rest only come
    next in line.
    """

    index: int
    given: int
    other: int
    probability: float
    probability_of_given: float
    likely: bool


def suspects(probabilities: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"]) -> list[Suspect]:
    """Every picture, the most suspect first: by the margin of the best other class over the given one, each probability
    taken relative to its class's mean; those counted as wrong before all others.

    probabilities: out of sample, rows of sum 1. labels: in [0, k).
    """
    count, classes = probabilities.shape
    rows = np.arange(count)
    own = probabilities[rows, labels].astype(np.float64)
    held = np.bincount(labels, minlength=classes)
    # A class without pictures has no mean; what is then asked of it is certainty. That of a class with a picture or two,
    # which no fold could learn, may be next to nothing; no less than an even guess is asked of any.
    means = np.bincount(labels, own, classes) / np.maximum(held, 1)
    typical = np.where(held > 0, np.maximum(means, 1 / classes), 1.0)
    others = probabilities.astype(np.float64)
    others[rows, labels] = -1.0
    other = (others - typical).argmax(1)
    best = others[rows, other]
    likely = (best >= typical[other]) & (best > own)
    margin = (best - typical[other]) - (own - typical[labels])
    order = np.lexsort((rows, -margin, ~likely))
    return [
        Suspect(int(i), int(labels[i]), int(other[i]), float(best[i]), float(own[i]), bool(likely[i])) for i in order
    ]
