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
    return float(gains.mean()), _interval(gains, draws, seed)


def mean_interval(rewards: list[float], draws: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean."""
    return _interval(np.asarray(rewards), draws, seed)


def _interval(values: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    dice = np.random.default_rng(seed)
    means = [
        values[dice.integers(0, len(values), len(values))].mean() for _ in range(draws)
    ]  # all at once are too much memory
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
