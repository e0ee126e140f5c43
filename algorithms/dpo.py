"""DPO on pairs: of each task's rollouts the best against the worst, told by the policy's own odds against the reference's.

Loss -log sigmoid(beta x margin), margin = log(p/p_ref)(best) - log(p/p_ref)(worst), each of a whole rollout; the reference is the
first weights. Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7. With several agents each has its pairs, of its own
tokens, and with R rollouts in pairs each pair counts 2 / R, so with one agent the loss is the mean over pairs. The gradient is
that of the tokens' log-probabilities times +-beta x sigmoid(-beta x margin), which stand here as advantages: exact where one
optimiser step follows the measurement, hence one mini-batch and one epoch.
"""

from __future__ import annotations

import json

import numpy as np

from raygent.algorithms.episodes import Episodes
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm

OFF_POLICY = True
MEASURES = ("current", "reference")
# Every token counts 1 / rollouts, and 2 make a pair.
DEFAULTS = {"loss": "gpg", "aggregation": "constant", "horizon": 1}
RIGHT = DEFAULTS | {"mini_batches": 1, "epochs": 1, "drop_flat_groups": True}


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    """nan on rollouts that are in no pair. The sum over tokens of advantage x log-probability, divided by the rollouts in
    pairs, has the gradient of the mean over pairs of -loss."""
    assert episodes.current is not None and episodes.reference is not None
    gains = (episodes.current - episodes.reference).sum(1, dtype=np.float64)
    found = np.full(episodes.mask.shape, np.nan, np.float32)
    for best, worst in pairs(episodes):
        margin = settings.beta * (gains[best] - gains[worst])
        found[best] = 2 * settings.beta / (1 + np.exp(margin))
        found[worst] = -found[best]
    return found


def pairs(episodes: Episodes) -> list[tuple[int, int]]:
    """Of each group the rows of the best and the worst rollout that have tokens, where their rewards differ."""
    found = []
    for group in np.unique(episodes.groups):
        rows = np.flatnonzero((episodes.groups == group) & (episodes.lengths > 0))
        if not len(rows):
            continue
        scores = episodes.scores[rows]
        best, worst = rows[scores.argmax()], rows[scores.argmin()]
        if episodes.scores[best] > episodes.scores[worst]:
            found.append((int(best), int(worst)))
    return found


def check(settings: Algorithm) -> None:
    for key, right in RIGHT.items():
        if getattr(settings, key) != right:
            raise ValueError(
                f"algorithm.{key}: {getattr(settings, key)} is not sound for dpo, whose loss is of whole pairs; "
                f"set algorithm.{key}={json.dumps(right)}"
            )
