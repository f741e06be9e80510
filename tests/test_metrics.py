"""Every number against a plain derivation of its own, picture by picture, at batch sizes that do not divide."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from vitrail.core.errors import UserError
from vitrail.core.types import Row
from vitrail.evaluation.metrics import CountMismatch, Tally, merge, spoken, tally, wilson
from vitrail.inference.predict import Prediction

COUNT, CLASSES = 203, 7


def made(count: int = COUNT, classes: int = CLASSES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (fp32, some of them equal) right about half the time, and classes; the last has no picture."""
    random = np.random.default_rng(seed)
    target = random.integers(0, classes - 1, count)
    logits = random.normal(size=(count, classes)).round(1)
    logits[np.arange(count), target] += 1.2
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target)


def batches(
    logits: torch.Tensor, target: torch.Tensor, size: int, order: np.ndarray | None = None
) -> Iterator[Prediction]:
    rows = torch.arange(len(logits)) if order is None else torch.tensor(order)
    for part in rows.split(size):
        yield Prediction(logits[part], target[part], part)


def assert_same(one: Tally, other: Tally) -> None:
    for name in ("index", "true", "predicted", "rank"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    # Row by row the same up to the last bit, whatever the shape of the batch's softmax.
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-14)


@pytest.mark.parametrize("size", [1, 7, 64, 202, 203, 1000])
def test_numbers_are_those_of_a_plain_loop(size: int) -> None:
    logits, target = made()
    found = tally(batches(logits, target, size, np.random.default_rng(size).permutation(COUNT)), CLASSES)
    x, y = logits.double().numpy(), target.numpy()

    hits, hits5, losses, confusion = 0, 0, [], np.zeros((CLASSES, CLASSES), np.int64)
    for row, true in zip(x, y, strict=True):
        order = sorted(range(CLASSES), key=lambda c, row=row: (-row[c], c))
        hits += order[0] == true
        hits5 += true in order[:5]
        losses.append(math.log(sum(math.exp(v) for v in row)) - row[true])
        confusion[true, order[0]] += 1

    assert found.count == COUNT
    assert found.accuracy == hits / COUNT
    assert found.top(5) == hits5 / COUNT
    assert found.mean_loss == pytest.approx(math.fsum(losses) / COUNT, rel=1e-12)
    np.testing.assert_array_equal(found.confusion, confusion)
    recalls = [confusion[c, c] / confusion[c].sum() for c in range(CLASSES) if confusion[c].sum()]
    assert len(recalls) == CLASSES - 1
    assert found.macro == pytest.approx(sum(recalls) / len(recalls), rel=1e-12)
    for c, result in enumerate(found.per_class):
        hit, of, claimed = confusion[c, c], confusion[c].sum(), confusion[:, c].sum()
        assert (result.label, result.count) == (c, of)
        assert result.recall == (hit / of if of else None)
        assert result.precision == (hit / claimed if claimed else None)
        if of and claimed and hit:
            precision, recall = hit / claimed, hit / of
            assert result.f1 == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-12)
    assert found.per_class[-1].recall is None


def test_numbers_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, target = made(seed=3)
    found = tally(batches(logits, target, 10), CLASSES)
    probabilities = torch.softmax(logits.double(), 1).numpy()
    names = list(range(CLASSES))
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(
        found.true, found.predicted, labels=names, zero_division=0
    )
    np.testing.assert_array_equal([c.count for c in found.per_class], support)
    np.testing.assert_allclose([c.precision or 0 for c in found.per_class], precision)
    np.testing.assert_allclose([c.recall or 0 for c in found.per_class], recall)
    np.testing.assert_allclose([c.f1 or 0 for c in found.per_class], f1)
    np.testing.assert_array_equal(found.confusion, sklearn.confusion_matrix(found.true, found.predicted, labels=names))
    assert found.mean_loss == pytest.approx(sklearn.log_loss(target, probabilities, labels=names))


def test_calibration_is_that_of_a_plain_loop() -> None:
    logits, target = made(500, seed=1)
    found = tally(batches(logits, target, 33), CLASSES)
    probabilities = torch.softmax(logits.double(), 1).numpy()
    error, counts = 0.0, []
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [
            (row.max(), row.argmax() == true)
            for row, true in zip(probabilities, target.numpy(), strict=True)
            if low < row.max() <= high
        ]
        counts.append(len(inside))
        if inside:
            confidence, right = np.mean([a for a, _ in inside]), np.mean([b for _, b in inside])
            error += len(inside) / 500 * abs(confidence - right)
    assert [b.count for b in found.calibration()] == counts
    assert sum(counts) == 500
    assert found.calibration_error == pytest.approx(error, rel=1e-10)


def test_bins_hold_their_upper_end() -> None:
    found = tally([Prediction(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]))], 2)
    assert found.confidence.tolist() == [0.5]
    assert [b.count for b in found.calibration(2)] == [1, 0]


def test_a_sure_and_right_model_is_calibrated() -> None:
    logits, target = 1000 * torch.eye(4), torch.arange(4)
    found = tally(batches(logits, target, 4), 4)
    assert found.accuracy == 1
    assert found.calibration_error == 0
    assert found.calibration()[-1].count == 4
    assert found.worst(3) == ()


def test_equal_logits_go_to_the_lowest_class() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 4)
    found = tally(batches(logits, torch.arange(4), 4), 4)
    assert found.predicted.tolist() == [0, 0, 0, 0]
    assert found.rank.tolist() == [0, 1, 2, 3]


def test_the_worst_mistakes_come_first() -> None:
    logits, target = made(seed=5)
    found = tally(batches(logits, target, 50, np.random.default_rng(0).permutation(COUNT)), CLASSES)
    probabilities = torch.softmax(logits.double(), 1).numpy()
    wrong = [i for i in range(COUNT) if probabilities[i].argmax() != target[i]]
    wrong.sort(key=lambda i: (-round(probabilities[i].max(), 12), i))
    worst = found.worst(9)
    assert [m.index for m in worst] == wrong[:9]
    for m in worst:
        assert m.true == target[m.index] != m.predicted
        assert m.probability == pytest.approx(probabilities[m.index, m.predicted], rel=1e-12)
        assert m.probability_of_true == pytest.approx(probabilities[m.index, m.true], rel=1e-12)
    assert len(found.worst(10_000)) == len(wrong)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_merge_to_what_one_finds(processes: int) -> None:
    logits, target = made()
    whole = tally(batches(logits, target, 32), CLASSES)
    shares = [
        tally(batches(logits, target, 13, np.arange(rank, COUNT, processes)), CLASSES) for rank in range(processes)
    ]
    assert_same(merge(shares), whole)
    assert_same(merge([*shares, tally([], CLASSES)]), whole)


def test_a_picture_counted_twice_or_never_is_found() -> None:
    logits, target = made()
    found = tally(batches(logits, target, 32), CLASSES)
    assert found.rows(expected_count=COUNT)
    with pytest.raises(CountMismatch, match="203 pictures were evaluated where the data has 204"):
        found.rows(expected_count=204)
    with pytest.raises(CountMismatch, match="picture 8 was evaluated more than once"):
        merge([found, tally([Prediction(logits[:1], target[:1], torch.tensor([8]))], CLASSES)])
    with pytest.raises(CountMismatch, match="no pictures"):
        tally([], CLASSES).rows()


def test_rows_carry_intervals_and_counts() -> None:
    logits, target = made()
    found = tally(batches(logits, target, 32), CLASSES)
    rows = {row.name: row for row in found.rows()}
    assert list(rows) == ["top-1", "top-5", "macro accuracy", "negative log-likelihood", "calibration error"]
    top = rows["top-1"]
    assert top.value == 100 * found.accuracy
    assert top.low is not None
    assert top.high is not None
    assert top.low < top.value < top.high
    assert {row.count for row in rows.values()} == {COUNT}
    loss = rows["negative log-likelihood"]
    assert loss.high is not None
    assert loss.high - loss.value == pytest.approx(1.959964 * np.std(found.loss, ddof=1) / COUNT**0.5, rel=1e-6)
    assert loss.unit == ""
    few = tally([Prediction(torch.eye(3)[:1], torch.tensor([0]), torch.tensor([0]))], 3)
    assert [row.name for row in few.rows()] == [
        "top-1",
        "macro accuracy",
        "negative log-likelihood",
        "calibration error",
    ]
    assert few.top(5) == 1
    assert few.rows()[2] == Row("negative log-likelihood", few.mean_loss, count=1, unit="")


@pytest.mark.parametrize(("hits", "count"), [(1704, 2000), (0, 10), (10, 10), (1, 3), (1, 1), (9_999, 10_000)])
def test_wilson_is_that_of_scipy(hits: int, count: int) -> None:
    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == (pytest.approx(interval.low, abs=1e-12), pytest.approx(interval.high, abs=1e-12))


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_the_picture(value: float) -> None:
    logits, target = made()
    logits[17, 2] = value
    with pytest.raises(UserError, match=r"^picture 17: the model's answer is not finite"):
        tally(batches(logits, target, 10), CLASSES)


def test_a_label_out_of_range_names_the_picture() -> None:
    logits, target = made()
    target[30] = -1
    with pytest.raises(UserError, match="picture 30 has the label -1"):
        tally(batches(logits, target, 10), CLASSES)


def test_rows_are_spoken_with_interval_and_count() -> None:
    assert spoken(Row("top-1", 85.2, 83.576, 86.689, 2000)) == "85.20 % [83.58, 86.69] of 2,000"
    assert spoken(Row("negative log-likelihood", 0.41236, unit="")) == "0.4124"
