"""Probes against independent sources: big_vision's own few-shot accuracies, scikit-learn, plain NumPy."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vitrail.core.device import mix
from vitrail.core.errors import UserError
from vitrail.evaluation import linear as linear_module
from vitrail.evaluation.linear import Design, fit_sharpness
from vitrail.evaluation.probes import (
    cross_validated,
    few_shot,
    few_shot_pictures,
    folds,
    linear,
    logistic,
    nearest_neighbours,
    ridge,
    sgd,
    short_classes,
)

FIXTURE = Path(__file__).parent / "fixtures" / "fewshot.npz"


def clusters(
    count: int = 240, width: int = 20, classes: int = 4, apart: float = 0.8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noisy classes, in features of very different size and place."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    size, place = 10.0 ** np.linspace(-2, 2, width), np.linspace(-50, 50, width)
    x = (random.normal(size=(count, width)) + centres[labels]) * size + place
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def standard(train: Tensor, x: Tensor) -> np.ndarray:
    """With the training pictures' mean and deviation."""
    known = train.double().numpy()
    return (x.double().numpy() - known.mean(0)) / known.std(0)


class TestFewShot:
    @pytest.mark.parametrize("shots", [1, 5, 10, 25])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_accuracies_are_big_visions(self, shots: int, seed: int) -> None:
        file = np.load(FIXTURE)
        data = [torch.from_numpy(file[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
        assert few_shot(*data, shots, seed) == pytest.approx(float(file[f"acc_{shots}shot_seed{seed}"]), abs=1e-6)

    def test_more_pictures_than_numbers_and_fewer_agree(self) -> None:
        """The two closed forms, on a problem that either could solve: a feature of zeros changes which is taken."""
        x, y = clusters(200, 20)
        test, truth = clusters(100, 20, seed=1)
        wide = [torch.cat([part, torch.zeros(part.shape[0], 100)], 1) for part in (x, test)]
        assert few_shot(x, y, test, truth, 25, 0) == few_shot(wide[0], y, wide[1], truth, 25, 0)

    def test_small_classes_give_what_they_have(self) -> None:
        labels = torch.tensor([0] * 9 + [1] * 2 + [3] * 30)
        chosen = few_shot_pictures(labels, 4, 5, 0)
        assert labels[chosen].bincount().tolist() == [5, 2, 0, 5]
        assert short_classes(labels, 5) == 1
        assert short_classes(labels, 10) == 2
        more = few_shot_pictures(labels, 4, 8, 0)
        assert set(chosen.tolist()) <= set(more.tolist())


class TestLinear:
    @pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
    @pytest.mark.parametrize("width", [20, 300])
    def test_logistic_is_scikit_learns(self, penalty: float, width: int) -> None:
        """With more numbers than pictures too, where we solve in the span of the pictures."""
        x, y = clusters(200, width, apart=0.4)
        head = logistic(x, y, 4, penalty)
        theirs = LogisticRegression(C=1 / (penalty * 200), tol=1e-10, max_iter=10_000).fit(standard(x, x), y.numpy())
        test, _ = clusters(50, width, seed=1)
        wanted = theirs.predict_proba(standard(x, test))
        assert np.allclose(head(test).softmax(1).numpy(), wanted, atol=2e-4)

    @pytest.mark.parametrize("width", [20, 300])
    def test_ridge_is_the_normal_equations(self, width: int) -> None:
        x, y = clusters(200, width)
        weights = torch.linspace(0.1, 3, 200)
        head = ridge(x, y, 4, 0.3, weights)
        w = weights.double().numpy() / weights.double().mean().item()
        mean = w @ x.double().numpy() / 200
        deviation = np.sqrt(w @ (x.double().numpy() - mean) ** 2 / 200)
        z = np.column_stack([(x.double().numpy() - mean) / deviation, np.ones(200)])
        free = np.diag([0.3 * 200] * width + [0])
        solution = np.linalg.solve(z.T @ (w[:, None] * z) + free, z.T @ (w[:, None] * np.eye(4)[y]))
        # In double, for single precision rounds by as much where AVX-512 multiplies.
        found = x.double() @ head.weight.double().T + head.bias.double()
        assert np.allclose(found.numpy(), z @ solution, atol=1e-4)

    def test_constant_features_and_missing_classes(self) -> None:
        x, y = clusters(100, 6, classes=2)
        x = torch.cat([x, torch.full((100, 1), 7.3)], 1)
        y = torch.where(y == 1, 2, 0)
        for head in (ridge(x, y, 4, 0.1), logistic(x, y, 4, 0.1)):
            assert bool(torch.isfinite(head.weight).all())
            assert head(x).softmax(1)[:, [1, 3]].max() < 0.3
            assert float((head(x).argmax(1) == y).float().mean()) > 0.8
        assert logistic(x, y, 4, 0.1)(x).softmax(1)[:, [1, 3]].max() < 1e-6

    def test_a_start_changes_the_way_and_not_the_end(self) -> None:
        x, y = clusters(150, 200, apart=0.3)
        cold = logistic(x, y, 4, 1e-3)
        warm = logistic(x, y, 4, 1e-3, start=logistic(x, y, 4, 1e-2))
        assert torch.allclose(cold(x), warm(x), atol=1e-2)

    def test_the_penalty_is_chosen_on_held_out_pictures_and_all_are_used(self) -> None:
        x, y = clusters(150, 200, apart=0.2)
        chosen = linear(x, y, 4)
        held = folds(y, 5, 0) == 0
        best = max(accuracy for _, accuracy in chosen.tried)
        assert dict(chosen.tried)[chosen.head.penalty] == best
        again = logistic(x[~held], y[~held], 4, chosen.head.penalty)
        assert float((again(x[held]).argmax(1) == y[held]).float().mean()) == pytest.approx(
            best, abs=1 / int(held.sum())
        )
        assert torch.allclose(chosen.head.weight, logistic(x, y, 4, chosen.head.penalty).weight)

    def test_what_cannot_be_told_apart(self) -> None:
        x, y = clusters(20)
        with pytest.raises(UserError, match="all of one class"):
            linear(x, torch.zeros(20, dtype=torch.long), 2)
        with pytest.raises(UserError, match="1 pictures have no label"):
            linear(x, torch.where(torch.arange(20) == 3, -1, y), 2)


class TestFolds:
    def test_each_class_is_spread_evenly(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 13 + [2] * 3 + [3])
        part = folds(labels, 5, 0)
        table = np.zeros((4, 5), int)
        np.add.at(table, (labels.numpy(), part.numpy()), 1)
        assert table[0].tolist() == [10] * 5
        assert sorted(table[1]) == [2, 2, 3, 3, 3]
        assert sorted(table[2]) == [0, 0, 1, 1, 1]
        assert table.sum(0).max() - table.sum(0).min() <= 1
        assert torch.equal(part, folds(labels, 5, 0))
        assert not torch.equal(part, folds(labels, 5, 1))

    def test_equal_pictures_stay_together(self) -> None:
        labels = torch.arange(60) % 3
        groups = torch.arange(60) // 2
        part = folds(labels, 5, 0, groups)
        assert bool((part[0::2] == part[1::2]).all())
        assert part.unique().shape[0] == 5


class TestCrossValidated:
    def test_out_of_fold_means_out_of_fold(self) -> None:
        """Features that say nothing: whoever had seen the labels would be better than chance."""
        accuracies, losses = [], []
        for seed in range(5):
            random = torch.Generator().manual_seed(seed)
            x, y = torch.randn(150, 60, generator=random), torch.randint(3, (150,), generator=random)
            found = cross_validated(x, y, 3)
            accuracies.append(found.accuracy)
            losses.append(float(-found.probabilities[torch.arange(150), y].log().mean()))
        assert np.mean(accuracies) < 0.42
        assert np.mean(losses) == pytest.approx(np.log(3), abs=0.03)

    def test_equal_pictures_give_nothing_away(self) -> None:
        random = torch.Generator().manual_seed(0)
        x, y = torch.randn(100, 300, generator=random), torch.randint(2, (100,), generator=random)
        x, y, groups = x.repeat(3, 1), y.repeat(3), torch.arange(100).repeat(3)
        assert cross_validated(x, y, 2).accuracy > 0.95
        assert cross_validated(x, y, 2, groups=groups).accuracy < 0.65

    def test_the_head_and_what_was_tried(self) -> None:
        x, y = clusters(200, 30, apart=0.5)
        found = cross_validated(x, y, 4)
        assert len(found.tried) == 21
        assert max(accuracy for _, _, accuracy in found.tried) - found.accuracy < 0.03
        assert (found.head.kind, found.head.penalty, found.accuracy) in found.tried
        assert found.accuracy == float((found.probabilities.argmax(1) == y).double().mean())
        test, truth = clusters(2000, 30, apart=0.5, seed=5)
        assert float((found.head(test).argmax(1) == truth).float().mean()) == pytest.approx(found.accuracy, abs=0.08)
        again = cross_validated(x, y, 4)
        assert torch.equal(found.probabilities, again.probabilities)
        assert torch.equal(found.head.weight, again.head.weight)

    @pytest.mark.parametrize("kind", ["ridge", "logistic"])
    def test_probabilities_are_honest(self, kind: str) -> None:
        x, y = clusters(400, 30, apart=0.4)
        found = cross_validated(x, y, 4, kinds=(kind,))  # type: ignore[arg-type]
        assert float(found.probabilities.max(1).values.mean()) == pytest.approx(found.accuracy, abs=0.05)
        test, truth = clusters(4000, 30, apart=0.4, seed=5)
        chances, said = found.head(test).softmax(1).max(1)
        assert float(chances.mean()) == pytest.approx(float((said == truth).float().mean()), abs=0.06)

    def test_few_pictures_and_small_classes(self) -> None:
        x, y = clusters(12, 30, classes=2)
        y = torch.cat([y[:11], torch.tensor([2])])
        found = cross_validated(x, y, 4)
        assert found.probabilities.shape == (12, 4)
        assert bool(torch.isfinite(found.probabilities).all())
        two = cross_validated(x[:2], torch.tensor([0, 1]), 2)
        assert two.accuracy == 0.0
        with pytest.raises(UserError, match="All pictures are equal"):
            cross_validated(x, y, 4, groups=torch.zeros(12, dtype=torch.long))

    def test_it_is_quick(self) -> None:
        """Processor seconds, so that other work on the machine does not count; about 2 where this was written."""
        x, y = clusters(600, 384, classes=10, apart=0.3)
        before = time.process_time()
        cross_validated(x, y, 10)
        assert time.process_time() - before < 20

    def test_sharpness_is_the_best_multiplier(self) -> None:
        random = torch.Generator().manual_seed(0)
        scores = torch.randn(5000, 3, generator=random)
        labels = torch.distributions.Categorical(logits=3.0 * scores).sample()
        assert fit_sharpness(scores, labels) == pytest.approx(3.0, rel=0.1)
        right = scores.argmax(1)
        assert fit_sharpness(scores, right) < 1000


def test_many_penalties_from_one_decomposition() -> None:
    x, y = clusters(100, 40)
    design = Design(x)
    for penalty in linear_module.PENALTIES["ridge"]:
        assert torch.allclose(design.ridge(y, 4, penalty).weight, ridge(x, y, 4, penalty).weight)


def test_neighbours_vote_as_in_plain_numpy() -> None:
    x, y = clusters(230, 12, classes=5, apart=0.3)
    test, _ = clusters(70, 12, classes=5, seed=1)
    test, x = (test - x.mean(0)) / x.std(0), (x - x.mean(0)) / x.std(0)
    found = nearest_neighbours(x, y, test, 5)
    assert list(found) == [10, 20, 100, 200]
    known, asked = x.numpy().astype(float), test.numpy().astype(float)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    for count, predicted in found.items():
        for row, vector in enumerate(asked):
            similarity = known @ vector
            near = np.argsort(-similarity)[:count]
            votes = [np.exp(similarity[near] / 0.07)[y.numpy()[near] == label].sum() for label in range(5)]
            assert int(predicted[row]) == int(np.argmax(votes))
    assert len({tuple(p.tolist()) for p in found.values()}) > 1
    assert list(nearest_neighbours(x[:15], y[:15], test, 5)) == [10]


class TestSgd:
    def test_a_step_is_the_rule(self) -> None:
        """Two full batches in NumPy: BatchNorm without scale, LARS for the matrix alone, momentum, the pace."""
        x, y = clusters(32, 6)
        head = sgd(x, y, 4, seed=3, rate=4.0, epochs=2, warmup=1)
        random = torch.Generator().manual_seed(mix("sgd probe", 3))
        weight, bias = 0.01 * torch.randn(4, 6, generator=random).double().numpy(), np.zeros(4)
        z = x.double().numpy()
        mean, variance = z.mean(0), z.var(0)
        z, targets = (z - mean) / np.sqrt(variance + 1e-6), np.eye(4)[y.numpy()]
        momentum = [np.zeros_like(weight), np.zeros_like(bias)]
        for rate in (0.0, 4.0 * 32 / 256):
            logits = z @ weight.T + bias
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            slopes = [(p - targets).T @ z / 32, (p - targets).mean(0)]
            slopes[0] = slopes[0] * 0.001 * np.linalg.norm(weight) / np.linalg.norm(slopes[0])
            momentum = [0.9 * m + slope for m, slope in zip(momentum, slopes, strict=True)]
            weight, bias = weight - rate * momentum[0], bias - rate * momentum[1]
        # BatchNorm's running statistics after two equal batches.
        running_mean, running_variance = 0.19 * mean, 0.81 + 0.19 * variance * 32 / 31
        folded = weight / np.sqrt(running_variance + 1e-6)
        assert np.allclose(head.weight.numpy(), folded, rtol=1e-4, atol=1e-7)
        assert np.allclose(head.bias.numpy(), bias - folded @ running_mean, rtol=1e-4, atol=1e-6)

    def test_it_learns_and_repeats(self) -> None:
        x, y = clusters(400, 20)
        head = sgd(x, y, 4, rate=10.0)
        test, truth = clusters(400, 20, seed=1)
        assert float((head(test).argmax(1) == truth).float().mean()) > 0.9
        assert torch.equal(head.weight, sgd(x, y, 4, rate=10.0).weight)
