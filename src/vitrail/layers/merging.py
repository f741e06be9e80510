"""Token merging ("Token Merging: Your ViT But Faster", arXiv 2210.09461): fewer tokens after each block, no training.

Every shape follows from the picture's size and the count alone, so a merged model exports like any other. What leaves
the encoder is spread out again: each of the first tokens has the output of the token that it became part of. So the grid
stays whole, and whatever reads the tokens (a mean, an attention pool, a dense head) weighs each by its size by itself.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.core.errors import UserError

WAYS = "24, or 24,begin=3,by=tokens,attention=plain with any of the three left out"


@dataclass(frozen=True)
class Merging:
    """How tokens are merged; the default is the paper's way.

    count: patch tokens fewer after each block; 0: nothing is merged. begin: the first block, from 0, after which it is so.
    by: what says how alike two tokens are: "keys", the mean of the heads' (the paper's Table 1a), or "tokens" themselves,
        which suits DINOv2 better (docs/log.md).
    proportional: whether a merged token is looked at as often as those it is made of (Eq. 1). Models pre-trained without
        labels tend to do better without.
    """

    count: int = 0
    begin: int = 0
    by: Literal["keys", "tokens"] = "keys"
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.count < 0 or self.begin < 0:
            raise UserError(f"merge must be at least 0 tokens a block, from block 0 on, not {self.count}, {self.begin}")

    def __bool__(self) -> bool:
        return self.count > 0

    @classmethod
    def of(cls, given: "int | str | Merging") -> "Merging":
        """A number is the paper's way; words are those of --merge. Raises UserError for other words."""
        if isinstance(given, Merging):
            return given
        words = re.fullmatch(
            r"(-?\d+)(?:,begin=(\d+))?(?:,by=(keys|tokens))?(?:,attention=(proportional|plain))?", str(given)
        )
        if words is None:
            raise UserError(f"--merge {given} is not known: give {WAYS}.")
        by: Literal["keys", "tokens"] = "tokens" if words[3] == "tokens" else "keys"
        return cls(int(words[1]), int(words[2] or 0), by, words[4] != "plain")

    @property
    def said(self) -> int | str:
        """What `of` takes: a number where that says all."""
        words = [f"begin={self.begin}"] * (self.begin > 0) + ["by=tokens"] * (self.by == "tokens")
        words += ["attention=plain"] * (not self.proportional)
        return ",".join([str(self.count), *words]) if self and words else self.count


@dataclass(frozen=True)
class Groups:
    """Which of the first tokens the present ones are made of, prefix tokens included.

    size: how many each is made of; owner: for each of the first s tokens the present one that it became part of. Both are
    None before the first merging, when each stands for itself.
    """

    size: Float[Tensor, "b t"] | None = None
    owner: Int[Tensor, "b s"] | None = None

    def mask(self, query: Tensor) -> Tensor | None:
        """Proportional attention (Eq. 1): log(size), added to the logits of each key."""
        return None if self.size is None else self.size.log().to(query.dtype)[:, None, None]


@dataclass(frozen=True)
class Matching:
    """stay: the tokens that stay, in their new order: prefix, then set A's, then set B's. gone: those of A that are merged.
    into: for each of these its partner's place in the new order."""

    stay: Int[Tensor, "b less"]
    gone: Int[Tensor, "b r"]
    into: Int[Tensor, "b r"]


def match(metric: Float[Tensor, "b t e"], prefixes: int, count: int) -> Matching:
    """Bipartite soft matching: patch tokens fall into the sets A and B by turns, each of A draws an edge to the most
    similar of B, and the `count` best edges stay.

    Similar: by the cosine of their metrics. Prefix tokens take no part. count: at most half of the patch tokens.
    """
    # By chosen rows, which a runtime copies at once; slices with a step go number by number.
    numbers, unit = torch.arange(prefixes, metric.shape[1], device=metric.device), F.normalize(metric, dim=-1)
    similarity, nearest = (unit.index_select(1, numbers[::2]) @ unit.index_select(1, numbers[1::2]).mT).max(-1)
    order = similarity.argsort(-1, descending=True)
    gone, kept = order[:, :count], order[:, count:].sort(-1).values
    every = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[0], -1)
    stay = torch.cat([every[:, :prefixes], 2 * kept + prefixes, every[:, prefixes + 1 :: 2]], dim=1)
    return Matching(stay, 2 * gone + prefixes, nearest.gather(1, gone) + (prefixes + kept.shape[1]))


def merge(x: Float[Tensor, "b t d"], groups: Groups, matching: Matching) -> tuple[Float[Tensor, "b less d"], Groups]:
    """The mean of merged tokens, weighted by their sizes."""
    stay, gone, into = matching.stay, matching.gone, matching.into
    size = x.new_ones(x.shape[:2]) if groups.size is None else groups.size
    places = torch.arange(stay.shape[1], device=x.device)
    # A product with a table (b, less, r) of who goes where adds up what meets in one place: on a CPU that is cheaper than
    # a scatter, and sums in a fixed order.
    goes = (into[:, None] == places[:, None]).to(x.dtype) * size.gather(1, gone)[:, None]
    before = size.gather(1, stay)
    total = before + goes.sum(-1)
    mean = rows(x, stay) * (before / total)[..., None] + (goes / total[..., None]) @ rows(x, gone)
    place = torch.cat([places.expand(x.shape[0], -1), into], dim=1).gather(1, torch.cat([stay, gone], 1).argsort(1))
    return mean, Groups(total, place if groups.owner is None else place.gather(1, groups.owner))


def spread(x: Float[Tensor, "b t d"], groups: Groups) -> Float[Tensor, "b all d"]:
    """Each of the first tokens as the token that it became part of."""
    return x if groups.owner is None else rows(x, groups.owner)


def rows(x: Float[Tensor, "b t d"], index: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """Of each picture the tokens at `index`. By whole rows of all pictures, which runtimes copy at once; `gather` goes
    number by number."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1)[index + first]
