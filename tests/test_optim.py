"""Optimisers, schedules and the average, against their formulas written out in NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.core.errors import UserError
from vitrail.training.optim import Average, Optimiser, Schedule, decays, set_rate

STEPS = 12
SCHEDULE = Schedule(warmup=4)


class Small(nn.Module):
    """One weight that decays and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        start = np.random.default_rng(1)
        self.first = nn.Linear(3, 2, bias=False)
        self.last = nn.Linear(1, 1, bias=True)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.from_numpy(start.normal(size=tuple(parameter.shape))))


def gradients(shape: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    return [random.normal(size=shape).astype(np.float32) for _ in range(STEPS)]


def trained(settings: Optimiser, name: str, schedule: Schedule = SCHEDULE) -> np.ndarray:
    """One parameter after STEPS steps with given gradients."""
    model = Small()
    optimiser = settings.build(model)
    parameter = model.get_parameter(name)
    for step, gradient in enumerate(gradients(tuple(parameter.shape))):
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        parameter.grad = torch.from_numpy(gradient)
        set_rate(optimiser, settings.rate * schedule.factor(step, STEPS))
        optimiser.step()
    return parameter.detach().numpy()


def by_hand(name: str, update: Callable[[np.ndarray, np.ndarray, float, int], np.ndarray]) -> np.ndarray:
    """The same with `update(weight, gradient, schedule factor, step from 1)` in double precision."""
    weight = Small().get_parameter(name).detach().double().numpy()
    for step, gradient in enumerate(gradients(weight.shape)):
        weight = update(weight, gradient.astype(np.float64), SCHEDULE.factor(step, STEPS), step + 1)
    return weight


class Adam:
    """Kingma & Ba 2015, algorithm 1."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2, self.m, self.v = beta1, beta2, np.zeros(()), np.zeros(())

    def __call__(self, gradient: np.ndarray, step: int) -> np.ndarray:
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        return (self.m / (1 - self.beta1**step)) / (np.sqrt(self.v / (1 - self.beta2**step)) + 1e-8)


RATE, DECAY = 3e-2, 0.2


def test_adamw() -> None:
    adam = Adam(0.8, 0.95)
    found = trained(Optimiser(rate=RATE, weight_decay=DECAY, decay="adamw", betas=(0.8, 0.95)), "first.weight")
    expected = by_hand("first.weight", lambda w, g, f, t: w - RATE * f * (DECAY * w + adam(g, t)))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_adam_with_l2() -> None:
    adam = Adam()
    found = trained(Optimiser(rate=RATE, weight_decay=DECAY, decay="l2"), "first.weight")
    expected = by_hand("first.weight", lambda w, g, f, t: w - RATE * f * adam(g + DECAY * w, t))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_decoupled_decay_does_not_depend_on_the_base_rate() -> None:
    adam = Adam()
    found = trained(Optimiser(rate=RATE, weight_decay=0.01, decay="decoupled"), "first.weight")
    expected = by_hand("first.weight", lambda w, g, f, t: w - f * 0.01 * w - RATE * f * adam(g, t))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_adamw_of_a_tenth_at_a_thousandth_is_decoupled_of_a_ten_thousandth() -> None:
    one = trained(Optimiser(rate=1e-3, weight_decay=0.1, decay="adamw"), "first.weight")
    other = trained(Optimiser(rate=1e-3, weight_decay=1e-4, decay="decoupled"), "first.weight")
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
    assert not np.allclose(one, trained(Optimiser(rate=1e-3, weight_decay=0.1, decay="decoupled"), "first.weight"))


@pytest.mark.parametrize("decay", ["l2", "adamw", "decoupled"])
def test_sgd_with_momentum(decay: str) -> None:
    momentum = np.zeros(())

    def update(w: np.ndarray, g: np.ndarray, factor: float, _: int) -> np.ndarray:
        nonlocal momentum
        momentum = 0.9 * momentum + g + (DECAY * w if decay == "l2" else 0)
        outside = {"l2": 0.0, "adamw": RATE * factor * DECAY, "decoupled": factor * DECAY}[decay]
        return w - outside * w - RATE * factor * momentum

    found = trained(Optimiser("sgd", rate=RATE, weight_decay=DECAY, decay=decay), "first.weight")  # type: ignore[arg-type]
    np.testing.assert_allclose(found, by_hand("first.weight", update), rtol=2e-5, atol=1e-6)


def test_biases_do_not_decay() -> None:
    adam = Adam()
    found = trained(Optimiser(rate=RATE, weight_decay=DECAY, decay="adamw"), "last.bias")
    np.testing.assert_allclose(found, by_hand("last.bias", lambda w, g, f, t: w - RATE * f * adam(g, t)), rtol=2e-5)


def test_what_decays_in_a_model() -> None:
    from vitrail.weights.zoo import create

    model = create("ViT-Nano/4", classes=3, image=(16, 16), pool="class")
    kept = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    for name, parameter in model.named_parameters():
        assert (name in kept) == (parameter.ndim < 2 or not name.endswith("weight")), name
    assert {name for name in kept if "norm" in name}
    assert {name for name in kept if "position" in name}
    assert "head.weight" not in " ".join(kept)


def test_each_layer_has_its_rate() -> None:
    from vitrail.weights.zoo import create

    model = create("ViT-Nano/4", classes=3, image=(16, 16))
    optimiser = Optimiser(rate=1.0, layer_decay=0.5).build(model)
    set_rate(optimiser, 1.0)
    depth = model.config.backbone.depth
    seen = 0
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            name = next(name for name, other in model.named_parameters() if other is parameter)
            assert group["lr"] == pytest.approx(0.5 ** (depth + 1 - model.layer_of(name))), name
            seen += 1
    assert seen == len(list(model.parameters()))


def test_layers_without_numbers_have_no_rates_of_their_own() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert {group["lr"] for group in Optimiser(rate=1.0).build(network).param_groups} == {1.0}
    with pytest.raises(UserError, match=r"--layer-decay 0\.75 .* Sequential has no layer_of"):
        Optimiser(rate=1.0, layer_decay=0.75).build(network)


def official(step: int, total: int, base: float, kind: str, warmup: int, end: float) -> float:
    """vit_jax/utils.py, create_learning_rate_schedule, in NumPy."""
    progress = np.clip((step - warmup) / float(total - warmup), 0.0, 1.0)
    rate = end + (base - end) * (1.0 - progress) if kind == "linear" else base * 0.5 * (1.0 + np.cos(np.pi * progress))
    return rate * np.minimum(1.0, step / warmup) if warmup else rate


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5, 30])
def test_the_schedule_is_the_official_one(kind: str, warmup: int) -> None:
    base, end, total = 3e-2, 1e-5, 100
    schedule = Schedule(warmup=warmup, schedule=kind, end=end / base)  # type: ignore[arg-type]
    found = [base * schedule.factor(step, total) for step in range(total + 1)]
    expected = [official(step, total, base, kind, warmup, end) for step in range(total + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_a_constant_schedule_keeps_to_its_rate_after_the_warm_up() -> None:
    schedule = Schedule(warmup=4, schedule="constant")
    assert [schedule.factor(step, 8) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert Schedule(warmup=8).factor(8, 8) == 1  # a warm-up as long as the run


def test_the_average_of_polyak() -> None:
    model = nn.Linear(3, 2)
    average, random = Average(model, 0.9), np.random.default_rng(3)
    expected = model.weight.detach().double().numpy()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(random.normal(size=(2, 3))))
        average.update(model)
        factor = min(0.9, (1 + step) / (10 + step))
        expected = factor * expected + (1 - factor) * model.weight.detach().double().numpy()
    np.testing.assert_allclose(average.weights["weight"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert average.weights["weight"].data_ptr() != model.weight.data_ptr()
