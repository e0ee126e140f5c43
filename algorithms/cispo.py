"""CISPO: REINFORCE with a clipped importance weight that has no gradient, so that no token's gradient is lost to clipping.

Advantages are GRPO's. There is no bound below; MiniMax 2025, https://arxiv.org/abs/2506.13585. The bound of 5 is the one that
Khatri et al. 2025, https://arxiv.org/abs/2510.13786, found to matter little between 4 and 8.
"""

from raygent.algorithms.grpo import CREDITS_TURNS, advantages, loss  # noqa: F401

DEFAULTS = {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token"}
