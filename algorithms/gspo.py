"""GSPO: GRPO whose importance ratio is that of the whole sequence, the geometric mean over its tokens, and so is its clipping.
A sequence is a path of the trajectory. Zheng et al. 2025, https://arxiv.org/abs/2507.18071.
"""

from raygent.algorithms.grpo import CREDITS_TURNS, advantages, loss  # noqa: F401

DEFAULTS = {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
