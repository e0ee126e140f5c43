"""DAPO: GRPO for long reasoning. A wider clip above, so that rare tokens may become likely; the mean over the batch's tokens;
groups without signal are replaced (`refills`); and, with `overlong_tokens`, rollouts are punished for length before they
are cut off. Yu et al. 2025, https://arxiv.org/abs/2503.14476.
"""

from raygent.algorithms.grpo import CREDITS_TURNS, advantages, loss  # noqa: F401

DEFAULTS = {"clip_high": 0.28, "aggregation": "token", "refills": 3}
