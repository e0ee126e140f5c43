"""Dr.GRPO: GRPO without what favours some rollouts over others: no division by the group's spread, and each token counts the
same whatever its rollout's length. Advantage r - mean; Liu et al. 2025, https://arxiv.org/abs/2503.20783.
"""

from raygent.algorithms.grpo import CREDITS_TURNS, advantages, loss  # noqa: F401

DEFAULTS = {"normalise_std": False, "aggregation": "constant"}
