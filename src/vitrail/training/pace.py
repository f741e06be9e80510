"""What the training loop is given beside the model, and what it gives back."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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


_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def ending_by(moment: float) -> Iterator[None]:
    """Inside, `moment`, of time.monotonic(), is each Pace's deadline, if it is not given another.

    Like Ctrl-C it comes from around a run. It is no setting of a recipe, which gives the same weights on any day.
    """
    before = _deadline.set(moment)
    try:
        yield
    finally:
        _deadline.reset(before)


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
    deadline: float = field(default_factory=_deadline.get)
    """The moment, of time.monotonic(), after which a run that has a folder ends as if its steps were done."""


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

    @property
    def late(self) -> bool:
        """Whether its deadline ended it, before all of its steps were done."""
        return self.interrupted is None and self.step < self.total


Evaluate = Callable[[nn.Module], Sequence[Row]]
"""Its first row's value, the higher the better, chooses the best weights."""
