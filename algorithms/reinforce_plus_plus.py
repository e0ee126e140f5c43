"""REINFORCE++: no groups and no critic: each token's return, normalised over the batch (mean 0, spread 1).

Hu et al. 2025, https://arxiv.org/abs/2501.03262.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes, estimate
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm

COMPARES_GROUPS = False
CREDITS_TURNS = True
DEFAULTS = {"aggregation": "token"}


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    return estimate("reinforce_plus_plus", episodes, settings)
