"""A batch in parts, so that it needs less memory, and which parts do fit once memory has run out."""

from collections.abc import Callable

import torch

from vitrail.core import ranks
from vitrail.core.types import Batch, Labels

OUT = (
    *("out of memory", "DefaultCPUAllocator", "bad_alloc"),
    *("an't allocate memory", "annot allocate memory", "could not create a memory"),
)
ANEW = "a run that has begun needs another --out for that"


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch's rows in `parts` equal parts (fewer, where there are fewer rows)."""
    if parts == 1:
        return [batch]
    size = -(-batch.valid.shape[0] // parts)
    return [
        Batch(
            tuple(view[first : first + size] for view in batch.views),
            None if batch.targets is None else Labels(batch.targets.values[first : first + size]),
            batch.valid[first : first + size],
            batch.index[first : first + size],
        )
        for first in range(0, batch.valid.shape[0], size)
    ]


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or the system ran out of memory; on the CPU torch has no error type of its own for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT)
    )


def what_fits(
    batch: Batch,
    parts: int,
    attempt: Callable[[Batch], None],
    device: torch.device,
    forget: Callable[[], None],
) -> str:
    """A sentence that names a batch size that fits, found by trying.

    batch: this process's, which did not fit in `parts` parts. attempt: does with a part what training would; forget: lets
    go of the gradients that an attempt left behind.
    """
    rows = batch.valid.shape[0]
    while parts < rows:
        parts *= 2
        if _fits(batch, parts, attempt, device, forget):
            size = -(-rows // parts) * ranks.count()
            return (
                f"A batch of {rows * ranks.count()} pictures does not fit into {device.type} memory; {size} at a time "
                f"do: add --accumulate {parts} (the same numbers, but for what is drawn at random) or give --batch {size}; "
                f"{ANEW}."
            )
    return (
        f"Even one picture of this size does not fit into {device.type} memory with this model; give a smaller --model "
        f"or --size; {ANEW}."
    )


def _fits(
    batch: Batch, parts: int, attempt: Callable[[Batch], None], device: torch.device, forget: Callable[[], None]
) -> bool:
    forget()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        attempt(split(batch.to(device), parts)[0])
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True
