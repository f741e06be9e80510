"""Exact tests and thresholds against scipy's, and suspects on labels that were swapped."""

import numpy as np
import pytest
from scipy import stats

from vitrail.evaluation.chance import lower_bound, mcnemar, threshold
from vitrail.evaluation.suspects import suspects


@pytest.mark.parametrize(("gained", "lost", "same"), [(8, 2, 30), (0, 0, 5), (5, 5, 0), (1, 0, 3), (60, 20, 400)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int, same: int) -> None:
    first = np.array([False] * gained + [True] * lost + [True] * same)
    second = np.array([True] * gained + [False] * lost + [True] * same)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("hits", "count"), [(59, 59), (58, 59), (0, 10), (3, 10), (970, 1000)])
def test_lower_bound_is_clopper_and_pearsons(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count, alternative="greater").proportion_ci(0.95, "exact").low
    assert lower_bound(hits, count) == pytest.approx(expected, abs=1e-6)


def test_threshold_is_the_lowest_that_keeps_the_promise() -> None:
    random = np.random.default_rng(0)
    confidence = np.round(random.uniform(0.2, 1.0, 400), 2)  # rounded, so that there are ties
    right = random.uniform(size=400) < confidence**0.3
    found = threshold(confidence, right, 0.9)

    def low(least: float) -> float:
        trusted = right[confidence >= least]
        return float(stats.binomtest(int(trusted.sum()), trusted.size).proportion_ci(0.9, "exact").low)

    keeping = [least for least in np.unique(confidence) if low(least) >= 0.9]
    assert found.confidence == min(keeping)
    assert found.trusted == (confidence >= found.confidence).sum()
    assert found.low == pytest.approx(low(found.confidence), abs=1e-6)
    assert found.accuracy == right[confidence >= found.confidence].mean()


def test_fifty_nine_right_answers_prove_95_percent_and_fifty_eight_do_not() -> None:
    sure = np.full(59, 0.9)
    assert threshold(sure, np.ones(59, bool), 0.95).trusted == 59
    none = threshold(sure[:58], np.ones(58, bool), 0.95)
    assert none.trusted == 0
    assert none.confidence > 1
    assert threshold(np.zeros(0), np.zeros(0, bool), 0.95).of == 0


def test_swapped_labels_come_first_and_are_counted() -> None:
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 500)
    logits = random.normal(0, 1, (500, 5)) + 5 * np.eye(5)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    given, swapped = true.copy(), random.choice(500, 25, replace=False)
    given[swapped] = (given[swapped] + 1) % 5
    found = suspects(probabilities, given)
    assert sorted(suspect.index for suspect in found) == list(range(500))
    assert len({suspect.index for suspect in found[:50]} & set(swapped.tolist())) >= 24
    likely = {suspect.index for suspect in found if suspect.likely}
    assert len(likely & set(swapped.tolist())) >= 20
    assert len(likely) <= 40
    first = found[0]
    assert first.given == given[first.index]
    assert first.probability == pytest.approx(probabilities[first.index, first.other])


def test_a_class_that_the_model_is_shy_of_is_not_suspected_whole() -> None:
    """The second class gets 40 % at most; a rule without each class's own mean would call all of it wrong."""
    labels = np.repeat([0, 1], 50)
    probabilities = np.where(labels[:, None] == [0, 1], [0.95, 0.4], [0.6, 0.05])
    random = np.random.default_rng(0)
    probabilities[50:] += random.uniform(-0.02, 0.02, (50, 1)) * [1, -1]
    found = suspects(probabilities, labels)
    assert sum(suspect.likely for suspect in found) == 0
    # Without any picture of a class, nothing short of certainty speaks for it.
    assert not any(suspect.likely for suspect in suspects(np.full((4, 3), [0.2, 0.1, 0.7]), np.array([0, 1, 0, 1])))
