"""What the training loop is given beside the model, and what it gives back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from vitrail.core.device import Precision
from vitrail.core.types import Batch, Row


@runtime_checkable
class Steps(Protocol):
    """A loader that can begin at any step and make any batch again."""

    def __len__(self) -> int: ...

    def batches(self, start: int = 0) -> Iterator[Batch]: ...

    def at(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Pace:
    """How the loop runs, apart from what it computes."""

    precision: Precision = "fp32"
    """Of matrix products; weights, norms and losses stay fp32."""
    accumulate: int = 1
    """Parts that each batch is cut into, to save memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    evaluate_every: int = 1000
    """Steps between evaluations."""
    log_every: int = 50
    """Steps between lines of metrics."""
    save_minutes: float = 5.0
    """The most minutes of work that a kill can lose."""
    checks: int = 1
    """Steps between looks at whether the loss is finite: 1, or at each line, as on a GPU each look makes it wait; 0: it
    does not matter."""


@dataclass(frozen=True)
class Outcome:
    """step: where the run stopped, of `total`. best: the best evaluation's first row and its step. interrupted: the signal
    that ended it early, if one did."""

    step: int
    total: int
    best: float | None
    best_step: int
    seconds: float
    interrupted: int | None = None


Evaluate = Callable[[nn.Module], Sequence[Row]]
"""Its first row's value, the higher the better, chooses the best weights."""
