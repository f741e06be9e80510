"""The training loop: gradients in parts, clipping, losses that are not finite, memory that runs out, saving and stopping."""

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.runs import RunFolder
from vitrail.core.types import Batch, Labels, Loss, Objective, Preprocess, Progress, Row
from vitrail.data.augment import Augmentation
from vitrail.data.loader import Order
from vitrail.objectives.supervised import Supervised, class_weights, sigmoid_cross_entropy, softmax_cross_entropy
from vitrail.training.log import Metrics
from vitrail.training.loop import fit
from vitrail.training.memory import out_of_memory, split, what_fits
from vitrail.training.optim import Optimiser, Schedule
from vitrail.training.pace import Outcome, Pace
from vitrail.weights.zoo import create

CPU = torch.device("cpu")
PREPROCESS = Preprocess(size=(8, 8))


class Pictures:
    """Batches of random pixels whose brightness tells the class; the last rows may only fill up."""

    def __init__(self, steps: int = 6, batch: int = 8, short: int = 0) -> None:
        self.order = Order(64, batch, steps * batch - short, seed=1)
        random = np.random.default_rng(0)
        self.labels = torch.from_numpy(random.integers(0, 2, 64))
        self.pixels = torch.from_numpy(random.integers(0, 128, (64, 3, 8, 8), np.uint8) + 127 * 0)
        self.pixels += (100 * self.labels).to(torch.uint8)[:, None, None, None]

    def __len__(self) -> int:
        return self.order.steps

    def at(self, step: int) -> Batch:
        index = torch.tensor([index for _, index in self.order.keys(step)])
        return Batch((self.pixels[index],), Labels(self.labels[index].clamp(min=0)), index >= 0, index)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        yield from map(self.at, range(start, len(self)))


def small(dropout: float = 0.0) -> nn.Module:
    return create("ViT-Nano/4", classes=2, preprocess=PREPROCESS, pool="mean", depth=1, dropout=dropout)


def supervised(model: nn.Module) -> Objective:
    return Supervised(model, 2, PREPROCESS, Augmentation())


def train(
    model: nn.Module, loader: Any = None, task: Callable[[nn.Module], Objective] = supervised, **more: Any
) -> Outcome:
    pace = Pace(log_every=1, **more.pop("pace", {}))
    settings = {"optimiser": Optimiser(rate=1e-3), "schedule": Schedule(warmup=0), "pace": pace, "device": CPU, **more}
    return fit(model, task, loader or Pictures(), **settings)


class Watched(Supervised):
    """Also keeps the gradients of each step."""

    seen: list[list[Tensor]]

    def after_backward(self, progress: Progress) -> None:
        parameters = self.model.parameters()
        self.seen.append([parameter.grad.clone() for parameter in parameters])  # type: ignore[union-attr]


def gradients(accumulate: int, loader: Pictures, **more: Any) -> list[list[Tensor]]:
    seen: list[list[Tensor]] = []

    def task(model: nn.Module) -> Objective:
        objective = Watched(model, 2, PREPROCESS, Augmentation())
        objective.seen = seen
        return objective

    train(small(), loader, task, pace={"accumulate": accumulate}, **more)
    return seen


@pytest.mark.parametrize("parts", [2, 3, 5, 8, 20])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(parts: int) -> None:
    # The last batch has five rows that only fill up, so that its parts weigh differently.
    loader = Pictures(steps=2, short=5)
    for whole, in_parts in zip(gradients(1, loader), gradients(parts, loader), strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_valid_rows() -> None:
    loader, model = Pictures(steps=1, short=3), small()
    batch = loader.at(0)
    assert batch.targets is not None
    F = torch.nn.functional
    F.cross_entropy(model(batch.views[0][:5]), batch.targets.values[:5]).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(gradients(1, loader)[0], expected, rtol=1e-5, atol=1e-6)


def test_splitting_keeps_each_row_once() -> None:
    batch = Pictures().at(0)
    for parts in range(1, 12):
        pieces = split(batch, parts)
        assert len(pieces) <= parts
        assert torch.equal(torch.cat([piece.index for piece in pieces]), batch.index)
        assert torch.equal(torch.cat([piece.views[0] for piece in pieces]), batch.views[0])


def test_gradients_are_clipped_to_their_global_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    settings = Optimiser("sgd", rate=1.0, momentum=0.0, weight_decay=0.0, decay="l2", clip=0.25)

    def task(model: nn.Module) -> Objective:
        return Supervised(model, 2, PREPROCESS, Augmentation())

    train(model, Pictures(steps=1), task, optimiser=settings)
    moved = [(old - new).detach() for old, new in zip(before, model.parameters(), strict=True)]
    assert math.sqrt(sum(float(step.square().sum()) for step in moved)) == pytest.approx(0.25, rel=1e-4)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    weights = class_weights(torch.tensor([0, 2]), 3, 0.3)
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]))
    z, w = logits.double().numpy(), weights.double().numpy()
    softmax = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(softmax_cross_entropy(logits, weights), -(w * np.log(softmax)).sum(1), rtol=1e-6)
    sigmoid = 1 / (1 + np.exp(-z))
    expected = -(w * np.log(sigmoid) + (1 - w) * np.log(1 - sigmoid)).sum(1)
    np.testing.assert_allclose(sigmoid_cross_entropy(logits, weights), expected, rtol=1e-6)


def test_it_learns_and_says_so(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    outcome = train(small(), Pictures(steps=60), logs=[metrics], optimiser=Optimiser(rate=3e-3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=0.2)
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.2
    assert lines[-1]["epoch"] == pytest.approx(60 * 8 / 64)
    assert (outcome.step, outcome.total, outcome.interrupted) == (60, 60, None)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    values, saved = iter([10.0, 30.0, 20.0, 30.0]), []
    folder = RunFolder(tmp_path)
    outcome = train(
        small(),
        Pictures(steps=8),
        evaluate=lambda model: [Row("validation/accuracy", np.float64(next(values)))],
        pace={"evaluate_every": 2},
        folder=folder,
        save_model=lambda model, path: saved.append(path.name),
    )
    assert (outcome.best, outcome.best_step) == (30.0, 4)
    assert saved == ["model.safetensors", "model.safetensors", "last.safetensors"]
    assert folder.load_state()["best"] == [30.0, 4]
    folder.close()


def test_the_average_is_evaluated_and_the_weights_train_on(tmp_path: Path) -> None:
    evaluated: list[Tensor] = []

    def look(model: nn.Module) -> list[Row]:
        evaluated.append(next(model.parameters()).detach().clone())
        return [Row("validation/accuracy", 0.0)]

    plain, averaged = small(), small()
    folder = RunFolder(tmp_path)
    train(plain)
    train(
        averaged, evaluate=look, pace={"evaluate_every": 3}, optimiser=Optimiser(rate=1e-3, polyak=0.9), folder=folder
    )
    state = folder.load_state()
    torch.testing.assert_close(state["model"], plain.state_dict(), rtol=0, atol=0)
    assert not torch.equal(evaluated[-1], next(plain.parameters()))
    torch.testing.assert_close(evaluated[-1], next(averaged.parameters()).detach(), rtol=0, atol=0)
    torch.testing.assert_close(state["average"][1], averaged.state_dict(), rtol=0, atol=0)
    folder.close()


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run(clip: float, tmp_path: Path) -> None:
    class Spoilt(Supervised):
        def __call__(self, batch: Batch, seed: int) -> Loss:
            loss = super().__call__(batch, seed)
            return Loss(loss.total * math.nan) if 5 in batch.index else loss

    def task(model: nn.Module) -> Objective:
        return Spoilt(model, 2, PREPROCESS, Augmentation())

    loader = Pictures(steps=8)
    bad = next(step for step in range(8) if 5 in loader.at(step).index)
    assert bad > 0
    folder, model = RunFolder(tmp_path), small()
    with pytest.raises(
        UserError, match=rf"The loss was not finite at step {bad} of 8; its batch is in .*divergence\.pt"
    ):
        train(model, loader, task, folder=folder, optimiser=Optimiser(rate=1e-3, clip=clip))
    state = folder.load_state()
    assert state["step"] == bad
    assert all(value.isfinite().all() for value in state["model"].values())
    record = torch.load(tmp_path / "divergence.pt", weights_only=True)
    assert record["step"] == bad
    assert torch.equal(record["index"], loader.at(bad).index)
    assert torch.equal(record["views"][0], loader.at(bad).views[0])
    folder.close()


@pytest.mark.parametrize("settings", [Optimiser(rate=1e38, clip=0.0), Optimiser("sgd", rate=1e38, clip=0.0)])
def test_weights_that_are_not_finite_are_never_kept(settings: Optimiser, tmp_path: Path) -> None:
    folder, kept = RunFolder(tmp_path), []
    with pytest.raises(UserError, match="The loss was not finite at step"):
        train(
            small(),
            folder=folder,
            optimiser=settings,
            evaluate=lambda model: [Row("validation/accuracy", 1.0)],
            save_model=lambda model, path: kept.append(all(bool(p.isfinite().all()) for p in model.parameters())),
            pace={"save_minutes": 0.0, "evaluate_every": 1},
        )
    assert all(kept)
    if folder.resumable:
        assert all(value.isfinite().all() for value in folder.load_state()["model"].values())
    folder.close()


def test_data_that_fail_keep_what_was_learned(tmp_path: Path) -> None:
    class Failing(Pictures):
        def batches(self, start: int = 0) -> Iterator[Batch]:
            yield from (self.at(step) for step in range(start, 4))
            raise UserError("A data worker died.")

    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="A data worker died"):
        train(small(), Failing(), folder=folder)
    assert folder.load_state()["step"] == 4
    folder.close()


def test_it_goes_on_from_a_state(tmp_path: Path) -> None:
    whole, rest = small(0.1), small(0.1)
    optimiser = Optimiser(rate=1e-3, polyak=0.9)
    train(whole, optimiser=optimiser)

    class Stopping(Supervised):
        def after_step(self, progress: Progress) -> None:
            if progress.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    def task(model: nn.Module) -> Objective:
        return Stopping(model, 2, PREPROCESS, Augmentation())

    folder = RunFolder(tmp_path)
    outcome = train(small(0.1), task=task, folder=folder, optimiser=optimiser)
    assert (outcome.step, outcome.interrupted) == (3, signal.SIGTERM)
    torch.manual_seed(99)  # whatever happened in between
    outcome = train(rest, state=folder.load_state(), optimiser=optimiser)
    assert (outcome.step, outcome.interrupted) == (6, None)
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"--resume: the checkpoint is of a run of 6 steps and these settings make 7"):
        train(small(), Pictures(steps=7), state=folder.load_state())
    with pytest.raises(UserError, match="--resume: the checkpoint holds another model"):
        train(nn.Linear(2, 2), state=folder.load_state())
    folder.close()


def test_the_callers_randomness_and_signals_are_left_alone() -> None:
    torch.manual_seed(7)
    state, handlers = torch.get_rng_state(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train(small(0.1))
    assert torch.equal(torch.get_rng_state(), state)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]


def test_it_runs_outside_of_the_main_thread() -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(train(small(), Pictures(steps=2))))
    thread.start()
    thread.join()
    assert outcomes[0].step == 2


class Hungry(Supervised):
    """Asks for memory that no machine has, in torch's own words, for more than `most` rows."""

    most = 3

    def __call__(self, batch: Batch, seed: int) -> Loss:
        if batch.valid.shape[0] > self.most:
            torch.empty(1 << 60)
        return super().__call__(batch, seed)


@pytest.mark.parametrize(
    ("most", "accumulate", "said"),
    [
        (
            3,
            1,
            "A batch of 8 pictures does not fit into cpu memory; 2 at a time do: add --accumulate 4 .the same numbers, but "
            "for what is drawn at random. or give --batch 2; a run that has begun needs another --out for that.$",
        ),
        (4, 1, "4 at a time do: add --accumulate 2 "),
        (1, 2, "1 at a time do: add --accumulate 8 "),
        (0, 1, "Even one picture of this size does not fit into cpu memory .* needs another --out for that.$"),
    ],
)
def test_out_of_memory_names_what_fits(most: int, accumulate: int, said: str) -> None:
    def task(model: nn.Module) -> Objective:
        objective = Hungry(model, 2, PREPROCESS, Augmentation())
        objective.most = most
        return objective

    with pytest.raises(UserError, match=said):
        train(small(), task=task, pace={"accumulate": accumulate})
    if most:
        parts = int(said.split("--accumulate ")[1].split(" ")[0])
        assert train(small(), task=task, pace={"accumulate": parts}).step == 6


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Wrong(Supervised):
        def __call__(self, batch: Batch, seed: int) -> Loss:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(small(), task=lambda model: Wrong(model, 2, PREPROCESS, Augmentation()))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("out of memory"))


def test_what_was_left_of_a_failed_attempt_is_let_go() -> None:
    kept: list[int] = []

    def attempt(part: Batch) -> None:
        if part.valid.shape[0] > 1:
            raise MemoryError

    assert "--accumulate 8 " in what_fits(Pictures().at(0), 1, attempt, CPU, lambda: kept.append(1))
    assert len(kept) == 3


def test_pictures_without_labels_are_refused() -> None:
    class Unlabelled(Pictures):
        def at(self, step: int) -> Batch:
            batch = super().at(step)
            return Batch(batch.views, None, batch.valid, batch.index)

    with pytest.raises(UserError, match="has no label"):
        train(small(), Unlabelled())
