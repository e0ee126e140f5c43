"""OPO: the baseline that makes the gradient's variance least, where its norm grows with length: the group's mean reward, weighed
by the number of tokens. Exactly on policy. Hao et al. 2025, https://arxiv.org/abs/2505.23585.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes, estimate
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    return estimate("opo", episodes, settings)
