"""A curriculum by measured difficulty: tasks are drawn in proportion to how much they may teach, the variance of their rewards.

For rewards of 0 and 1 that is the learnability p (1 - p) of the success rate p: Rutherford et al. 2024, "No Regrets",
https://arxiv.org/abs/2408.15099; for language models Foster et al. 2025, "Learning to Reason at the Frontier of Learnability",
https://arxiv.org/abs/2502.12272. There rollouts are spent on measuring alone; here those that were trained on tell it.
"""

from __future__ import annotations

import random

import numpy as np

Groups = dict[str, list[list[float]]]  # by task id the rewards of its groups, oldest first

DECAY = 0.5  # what a group counts of the task's next one: the policy it measured is gone
RECENT = 10  # groups of a task; older ones would count less than a thousandth
PRIOR = 2.0  # degrees of freedom that the mean over the tasks counts
UNIFORM = 0.2  # share of the draws that is alike for all tasks, solved and hopeless ones too


def expected_variances(ids: list[str], measured: Groups) -> np.ndarray:
    """The variance that each task's rewards are expected to have within a group: float64 [tasks].

    The unbiased variance within the task's groups, the newest first, shrunk to the mean of that over all tasks that were
    measured: (S + PRIOR mean) / (n + PRIOR), of S the sum of squared deviations and n the degrees of freedom, both times DECAY
    for each later group. A task never seen has the mean. Groups of one rollout tell nothing.
    """
    squares, freedom = np.zeros(len(ids)), np.zeros(len(ids))
    for place, task in enumerate(ids):
        for rewards in measured.get(task, [])[-RECENT:]:
            if len(rewards) > 1:
                middle = sum(rewards) / len(rewards)
                squares[place] = DECAY * squares[place] + sum((reward - middle) ** 2 for reward in rewards)
                freedom[place] = DECAY * freedom[place] + len(rewards) - 1
    seen = freedom > 0
    mean = float(np.mean(squares[seen] / freedom[seen])) if seen.any() else 0.0
    return (squares + PRIOR * mean) / (freedom + PRIOR)


def probabilities(variances: np.ndarray) -> np.ndarray:
    """Of drawing each task: in proportion to its variance, but for UNIFORM of the draws. Where none varies, all alike."""
    total = variances.sum()
    alike = np.full(len(variances), 1 / len(variances))
    return (1 - UNIFORM) * variances / total + UNIFORM * alike if total > 0 else alike


def draw(chance: random.Random, weights: np.ndarray, number: int) -> list[int]:
    """`number` places, one after the other in proportion to `weights` (all above 0) without replacement; where there are fewer,
    all of them again and again.

    By exponential clocks, of which the first to ring are drawn: the same as Gumbel-top-k, https://arxiv.org/abs/1903.06059.
    """
    rings = -np.log1p([-chance.random() for _ in weights]) / weights
    order = np.argsort(rings, kind="stable")
    return [int(order[place % len(order)]) for place in range(number)]
