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

WAYS = "48, or 48,blocks=1+3,by=tokens,keep=one,attention=plain with any of the four left out"
WORDS = re.compile(
    r"(-?\d+)(?:,blocks=(\d+(?:\+\d+)*))?(?:,by=(keys|tokens))?(?:,keep=(mean|one))?(?:,attention=(proportional|plain))?"
)


@dataclass(frozen=True)
class Merging:
    """How tokens are merged; the default is the paper's way. What suits a DINOv2 better is measured in docs/log.md.

    count: patch tokens fewer after each block; 0: nothing is merged. blocks: in which, from 0; none named: in all.
    by: what says how alike two tokens are: "keys", the mean of the heads' (the paper's Table 1a), or "tokens" themselves.
    keep: what tokens become that are merged: their "mean", or the "one" that the others are most alike to (Table 1d).
    proportional: whether a merged token is looked at as often as those it is made of (Eq. 1). Models pre-trained without
        labels tend to do better without.
    """

    count: int = 0
    blocks: tuple[int, ...] = ()
    by: Literal["keys", "tokens"] = "keys"
    keep: Literal["mean", "one"] = "mean"
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.count < 0 or any(block < 0 for block in self.blocks):
            raise UserError(f"merge must be at least 0 tokens, in blocks from 0 on, not {self.count} in {self.blocks}")

    def __bool__(self) -> bool:
        return self.count > 0

    @classmethod
    def of(cls, given: "int | str | Merging") -> "Merging":
        """A number is the paper's way; words are those of --merge. Raises UserError for other words."""
        if isinstance(given, Merging):
            return given
        words = WORDS.fullmatch(str(given))
        if words is None:
            raise UserError(f"--merge {given} is not known: give {WAYS}.")
        blocks = tuple(map(int, words[2].split("+"))) if words[2] else ()
        by: Literal["keys", "tokens"] = "tokens" if words[3] == "tokens" else "keys"
        return cls(int(words[1]), blocks, by, "one" if words[4] == "one" else "mean", words[5] != "plain")

    @property
    def said(self) -> int | str:
        """What `of` takes: a number where that says all."""
        words = ["blocks=" + "+".join(map(str, self.blocks))] * bool(self.blocks)
        words += ["by=tokens"] * (self.by == "tokens") + ["keep=one"] * (self.keep == "one")
        words += ["attention=plain"] * (not self.proportional)
        return ",".join([str(self.count), *words]) if self and words else self.count

    def at(self, block: int, patches: int) -> int:
        """How many of so many patch tokens are merged in a block: at most half."""
        return min(self.count, patches // 2) if not self.blocks or block in self.blocks else 0


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


def merge(
    x: Float[Tensor, "b t d"], groups: Groups, matching: Matching, keep: Literal["mean", "one"] = "mean"
) -> tuple[Float[Tensor, "b less d"], Groups]:
    """The mean of merged tokens, weighted by their sizes; or B's of them, as it is."""
    stay, gone, into = matching.stay, matching.gone, matching.into
    size = x.new_ones(x.shape[:2]) if groups.size is None else groups.size
    places = torch.arange(stay.shape[1], device=x.device)
    # A product with a table (b, less, r) of who goes where adds up what meets in one place: on a CPU that is cheaper than
    # a scatter, and sums in a fixed order.
    goes = (into[:, None] == places[:, None]).to(x.dtype) * size.gather(1, gone)[:, None]
    before = size.gather(1, stay)
    total = before + goes.sum(-1)
    kept = rows(x, stay)
    if keep == "mean":
        kept = kept * (before / total)[..., None] + (goes / total[..., None]) @ rows(x, gone)
    place = torch.cat([places.expand(x.shape[0], -1), into], dim=1).gather(1, torch.cat([stay, gone], 1).argsort(1))
    return kept, Groups(total, place if groups.owner is None else place.gather(1, groups.owner))


def spread(x: Float[Tensor, "b t d"], groups: Groups) -> Float[Tensor, "b all d"]:
    """Each of the first tokens as the token that it became part of."""
    return x if groups.owner is None else rows(x, groups.owner)


def rows(x: Float[Tensor, "b t d"], index: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """Of each picture the tokens at `index`. By whole rows of all pictures, which runtimes copy at once; `gather` goes
    number by number."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1)[index + first]
