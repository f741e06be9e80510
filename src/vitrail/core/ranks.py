"""Work shared between processes. On one process every function is the identity, so no caller asks how many there are.

The only file that imports torch.distributed. Processes are started by `torchrun`, which sets RANK, LOCAL_RANK and
WORLD_SIZE; without it there is one process.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


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
    """Joins the processes that torchrun started, for as long as the block lasts."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


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
    return gather_objects(item)[0]
