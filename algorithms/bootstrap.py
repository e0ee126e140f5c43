"""The paired bootstrap: is the gain on the same tasks more than luck of the draw of tasks?"""

from __future__ import annotations

import numpy as np


def paired_gain(
    before: dict[str, float], after: dict[str, float], draws: int = 10_000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of after - before over the tasks in both, and its 95 % percentile interval (Efron & Tibshirani 1993, ch. 13).

    before, after: mean reward of each task id. Tasks are drawn with replacement, each with both its rewards.
    """
    tasks = sorted(before.keys() & after.keys())
    if not tasks:
        return float("nan"), (float("nan"), float("nan"))
    gains = np.array([after[task] - before[task] for task in tasks])
    drawn = np.random.default_rng(seed).integers(0, len(gains), (draws, len(gains)))
    low, high = np.quantile(gains[drawn].mean(1), [0.025, 0.975])
    return float(gains.mean()), (float(low), float(high))


def mean_interval(rewards: list[float], draws: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean."""
    values = np.asarray(rewards)
    drawn = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)
