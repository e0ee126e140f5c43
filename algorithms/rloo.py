"""RLOO: the baseline of a rollout is the mean reward of the others of its task, in which it has no part itself.

Advantage r - mean of the others; Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes, estimate
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    return estimate("rloo", episodes, settings)
