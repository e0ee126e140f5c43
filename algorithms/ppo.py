"""PPO with a critic: a token is worth how much better it went on than the critic had expected.

GAE over the tokens that an agent sampled in a rollout, in their order, whatever stands between them; advantages have mean 0 and
spread 1 over the batch. Schulman et al. 2017, https://arxiv.org/abs/1707.06347, and 2015, https://arxiv.org/abs/1506.02438.
With `credit = "turn"` the steps are the turns: see turns.gae.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms import turns
from raygent.algorithms.episodes import Episodes, estimate, estimated_returns
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm

COMPARES_GROUPS = False
CREDITS_TURNS = True
MEASURES = ("values",)
DEFAULTS = {"aggregation": "token"}


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    if settings.credit == "turn":
        found, _ = turns.gae(episodes, settings)
        mine = found[episodes.mask]
        return ((found - mine.mean()) / np.sqrt(mine.var(ddof=1) + 1e-8) * episodes.mask).astype(np.float32)
    return estimate("gae", episodes, settings)


def returns(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    return (
        turns.gae(episodes, settings)[1] if settings.credit == "turn" else estimated_returns("gae", episodes, settings)
    )
