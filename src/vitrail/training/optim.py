"""Optimisers, learning-rate schedules and the Polyak average.

"Weight decay 0.1" has three meanings in the field, and numbers are copied between them by mistake. Here each run names its
own (`Decay`): with learning rate r(t) = base * shape(t) and a weight w,

    adamw      w -= r(t) * decay * w             PyTorch's AdamW, Flax's Adam of 2020 and so the paper's Table 3, DeiT, MAE
    decoupled  w -= shape(t) * decay * w         big_vision: independent of the base rate
    l2         gradient += decay * w             Adam's and SGD's own

so adamw 0.1 at a base rate of 1e-3 is decoupled 1e-4.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitrail.core.errors import UserError

Decay = Literal["adamw", "decoupled", "l2"]


@dataclass(frozen=True)
class Optimiser:
    """How gradients become steps."""

    optimiser: Literal["adam", "sgd"] = "adam"
    """The update rule: Adam (Table 3) or SGD with momentum (Table 4)."""
    rate: float = 0.0
    """Base learning rate; 0: planned from the model."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's running averages (Table 3)."""
    momentum: float = 0.9
    """SGD's momentum (Table 4)."""
    weight_decay: float = 0.1
    """How strongly weights shrink, in the meaning that --decay names."""
    decay: Decay = "adamw"
    """What --weight-decay means: adamw (rate x decay), decoupled (of the base rate) or l2 (added to the gradient)."""
    clip: float = 1.0
    """Global norm that gradients are scaled down to; 0: none."""
    layer_decay: float = 1.0
    """Each layer's rate is this times that of the layer above it; 1: all the same."""
    polyak: float = 0.0
    """Factor of the weights' running average that is evaluated and kept (0.9999 in Table 2); 0: none."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Parameter groups: matrices decay, while biases, norms, positions and tokens do not (big_vision decays kernels
        only). The model's `layer_of(name)` numbers a parameter's layer, for `layer_decay`. Raises UserError where that
        would be needed and is not there."""
        layer_of: Callable[[str], int] | None = getattr(model, "layer_of", None)
        if self.layer_decay != 1 and layer_of is None:
            raise UserError(
                f"--layer-decay {self.layer_decay:g} needs the layer of each parameter, and {type(model).__qualname__} has "
                "no layer_of(name) to tell it; add one, or leave --layer-decay out."
            )
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                layer = layer_of(name) if layer_of is not None and self.layer_decay != 1 else 0
                groups.setdefault((layer, decays(name, parameter)), []).append(parameter)
        top = max(layer for layer, _ in groups)
        settings = []
        for (layer, decayed), parameters in sorted(groups.items(), key=lambda item: item[0]):
            scale = self.layer_decay ** (top - layer)
            settings.append(
                {
                    "params": parameters,
                    "lr": self.rate * scale,
                    "scale": scale,
                    # The rule's own decay multiplies by the rate, so "decoupled" divides by the base rate beforehand.
                    "weight_decay": self._rule_decay() if decayed else 0.0,
                }
            )
        fused = all(parameter.device.type in ("cuda", "cpu") for parameter in model.parameters())
        if self.optimiser == "sgd":
            return _SGD(settings, momentum=self.momentum, outside=self.decay != "l2", fused=fused)
        rule = torch.optim.Adam if self.decay == "l2" else torch.optim.AdamW
        return rule(settings, betas=self.betas, eps=1e-8, fused=fused)

    def _rule_decay(self) -> float:
        return self.weight_decay / self.rate if self.decay == "decoupled" else self.weight_decay


class _SGD(torch.optim.SGD):
    """SGD whose weight decay may stay outside the momentum, as AdamW's does."""

    def __init__(self, groups: list[dict], *, momentum: float, outside: bool, fused: bool) -> None:
        for group in groups:
            group["outside"] = group["weight_decay"] if outside else 0.0
            group["weight_decay"] = 0.0 if outside else group["weight_decay"]
        super().__init__(groups, lr=0.0, momentum=momentum, fused=fused)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["outside"]:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["outside"])
        super().step(closure)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: weights of projections and patches, not tokens, positions, biases or norms."""
    return name.endswith("weight") and parameter.ndim >= 2


@dataclass(frozen=True)
class Schedule:
    """The learning rate over time, as a factor of the base rate."""

    warmup: int = -1
    """Steps in which the rate grows from 0, multiplied onto the decay as the official code does; -1: planned."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up."""
    end: float = 0.0
    """The factor that --schedule linear ends at (the official code ends at a rate of 1e-5); cosine ends at 0."""

    def factor(self, step: int, total: int) -> float:
        """For the update that follows `step` completed ones, of `total`. In [0, 1]."""
        warmup = max(self.warmup, 0)
        progress = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
        decay = {
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "linear": self.end + (1 - self.end) * (1 - progress),
            "constant": 1.0,
        }[self.schedule]
        return decay * (min(1.0, step / warmup) if warmup else 1.0)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


class Average:
    """The Polyak average of a model's weights: average = factor * average + (1 - factor) * weights, after each step.

    While it is young the factor is held down to (1 + steps) / (10 + steps), so that the random weights of the beginning
    do not linger (the rule of TensorFlow's moving average).
    """

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.factor = factor
        self.steps = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        factor = min(self.factor, (1 + self.steps) / (10 + self.steps))
        state = model.state_dict()
        names = [name for name, value in self.weights.items() if value.is_floating_point()]
        _lerp([self.weights[name] for name in names], [state[name] for name in names], 1 - factor)


def _lerp(averages: Iterable[Tensor], values: Iterable[Tensor], weight: float) -> None:
    torch._foreach_lerp_(list(averages), list(values), weight)
