"""Work shared between processes. On one process every function is the identity, so no caller asks how many there are.

The only file that imports torch.distributed. Processes are started by `torchrun`, which sets RANK, LOCAL_RANK and
WORLD_SIZE; without it there is one process.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.core.errors import UserError

T = TypeVar("T")

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say when the process at the other end has gone."""


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its own machine: which GPU it takes. Known before `together` begins."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the block lasts.

    A UserError, or another process that has gone, ends this process at once, with one sentence and exit code 2: to go on
    alone is impossible, and to let go of gloo in the middle of its work can wait for ever (its thread wants the
    interpreter's lock while whoever frees it holds that lock and waits for the thread).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL puts the objects that are gathered
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except UserError as error:
        _leave(str(error))
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST):
            raise
        _leave(f"Process {rank()} ends because another one has; see what that one said.")
    distributed.destroy_process_group()


def _leave(sentence: str) -> NoReturn:
    sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)
    os._exit(2)


def share(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over all processes in each backward pass."""
    if count() == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def quiet(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, backward passes add up on each process alone; the next one outside averages the sum."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, known to each of them."""
    if count() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def reduce_max(tensor: Tensor) -> Tensor:
    """The largest over all processes, known to each of them."""
    if count() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def gather_objects(item: T) -> list[T]:
    """Each process's item, in the order of ranks, known to each of them."""
    if count() == 1:
        return [item]
    items: list[T | None] = [None] * count()
    distributed.all_gather_object(items, item)
    return items  # type: ignore[return-value]


def from_first(item: T) -> T:
    """The first process's item, on every process."""
    if count() == 1:
        return item
    items = [item]
    distributed.broadcast_object_list(items)
    return items[0]


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives on the first process, on every process; where it raises UserError, all of them do.

    Without the latter the others would wait for the first one for ever.
    """
    found, problem = None, None
    if first():
        try:
            found = work()
        except UserError as error:
            problem = error
    found, said = from_first((found, problem and str(problem)))
    if said is not None:
        raise UserError(said) from problem
    return found  # type: ignore[return-value]
