"""ReMax: the baseline of a task is the reward of one more rollout of it that takes the likeliest token everywhere.

Advantage r - r(greedy); Li et al. 2023, https://arxiv.org/abs/2310.10505.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes, estimate
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm

COMPARES_GROUPS = False
NEEDS_GREEDY = True


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    return estimate("remax", episodes, settings)
