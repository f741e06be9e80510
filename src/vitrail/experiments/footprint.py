"""The memory that training needs, before any of it is taken.

Unusual: a step is carried out on tensors without numbers (torch's fake tensors), and what would be alive is counted at
each operation. So every copy that autocast makes and every tensor that the backward pass keeps is in the sum, of any
model, and no formula has to be kept in step with the code.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.core.device import Precision, autocast
from vitrail.models.classifier import ClassifierConfig
from vitrail.training.optim import Optimiser


@dataclass(frozen=True)
class Footprint:
    """Bytes. The first four are there between steps or at the end of the forward pass; peak is the most at any moment.

    activations: what the forward pass leaves for the backward pass, autocast's copies of weights among it.
    peak: of all, with what is alive only within an operation's neighbourhood; without Python, torch and their libraries.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    data: int
    peak: int


class Alive(TorchDispatchMode):
    """Bytes of all tensors' storages that are alive, as operations make them and references go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        made = function(*arguments, **(keywords or {}))
        self.count(made)
        return made

    def count(self, tensors: Any) -> None:
        """Adds the storages that are not counted yet, until they are freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen:
                    self._seen.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def footprint(
    config: ClassifierConfig,
    batch: int,
    *,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    checkpointing: bool = False,
    accumulate: int = 1,
    optimiser: Optimiser | None = None,
) -> Footprint:
    """What a step of `batch` pictures needs at most, in `accumulate` parts, once the optimiser has its state."""
    device, optimiser = torch.device(device), optimiser or Optimiser(rate=1e-3)
    backbone = config.backbone
    part = -(-batch // accumulate)
    model = config.build(device="meta")
    with FakeTensorMode(), Alive() as alive:
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, value in own.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                        own[name] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake  # type: ignore[assignment]
        model.backbone.checkpointing = checkpointing
        model.train()
        weights = alive.now
        images = torch.empty(batch, backbone.channels, *backbone.image, dtype=torch.uint8, device=device)
        labels = torch.empty(batch, dtype=torch.long, device=device)
        data = alive.now - weights
        step = optimiser.build(model)

        def forward() -> Tensor:
            with autocast(device, precision):
                logits = model(model.preprocess.normalize(images[:part]))
            return F.cross_entropy(logits.float(), labels[:part])

        # The optimiser's state comes with its first step; it is there whenever a batch is.
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        del parameter
        before = alive.now
        step.step()
        state = alive.now - before
        step.zero_grad()
        alive.most = alive.now
        base = alive.now
        loss = forward()
        kept = alive.now - base
        loss.backward()
        del loss
        gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
        if accumulate > 1:
            forward().backward()
        if optimiser.clip:
            nn.utils.clip_grad_norm_(model.parameters(), optimiser.clip)
        step.step()
        return Footprint(weights, gradients, state, kept, data, alive.most)
