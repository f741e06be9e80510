"""The mean of a few runs with its interval: Student's, for nobody makes thirty runs."""

import math
from collections.abc import Sequence

import numpy as np


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean of independent runs and its 95 % interval; None for the interval of a single one."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, None, None
    half = student_95(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def student_95(freedom: int) -> float:
    """The 97.5 % point of Student's distribution: 12.71 for 1 degree of freedom, 4.30 for 2, near 1.96 for many.

    With t = sqrt(freedom) tan(a) the density becomes that of cos(a) ** (freedom - 1), which is summed on a fine grid.
    """
    angle = (np.arange(1_000_000) + 0.5) * (math.pi / 2e6)
    share = np.cumsum(np.cos(angle) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(float(np.interp(0.95 * share[-1], share, angle + math.pi / 4e6)))
