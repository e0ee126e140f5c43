"""SFT on what won: the policy's own rollouts (rejection sampling), those of another run (`data.rollouts`), or chats (`data.chats`).

A winner has at least the reward `threshold`, or, where there is none, the best reward of its task's rollouts if they differ.
The loss is the cross-entropy of the recorded tokens. Best of n: Dong et al. 2023, https://arxiv.org/abs/2304.06767; by a
threshold: Yuan et al. 2023, https://arxiv.org/abs/2308.01825.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm

COMPARES_GROUPS = False
OFF_POLICY = True
DEFAULTS = {"loss": "gpg", "aggregation": "token"}  # gpg is REINFORCE's: with an advantage of 1 the cross-entropy


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    """1 on the tokens of winners, nan on others."""
    scores = episodes.scores
    if settings.threshold is not None:
        wins = scores >= settings.threshold
    else:
        wins = np.zeros(len(scores), bool)
        for group in np.unique(episodes.groups):
            rows = np.flatnonzero(episodes.groups == group)
            wins[rows] = (scores[rows] == scores[rows].max()) & (scores[rows].max() > scores[rows].min())
    return np.where(wins[:, None], 1.0, np.nan) * np.ones(episodes.mask.shape, np.float32)


def check(settings: Algorithm) -> None:
    if settings.loss != "gpg":
        raise ValueError(f'algorithm.loss: {settings.loss} is no cross-entropy; of sft it is "gpg"')
    if not settings.drop_flat_groups:
        raise ValueError(
            "algorithm.drop_flat_groups: false would let sft count the tokens of those who lost; leave it out"
        )
    if settings.threshold is None and settings.group_size < 2:
        raise ValueError(
            "algorithm.threshold: missing; with group_size = 1 nothing tells who wins but the reward to be had at least"
        )
