"""GRPO: a rollout is as good as it is better than the other rollouts of its task.

Advantage (r - mean) / (std + 1e-6) over the group; Shao et al. 2024, https://arxiv.org/abs/2402.03300.
With `credit = "turn"` the rewards of turns count from where they were given, as in its process supervision (section 4.1.3).
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes, estimate
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.algorithms.turns import normalised_returns
from raygent.config import Algorithm

CREDITS_TURNS = True


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    if settings.credit == "turn":
        return normalised_returns(episodes, settings)
    return estimate("grpo", episodes, settings)
