"""GPG: plain policy gradient with the group's mean as baseline: no ratio, no clipping, no division by the spread.

Its correction for groups without gradient, alpha = B / (B - M), is made by leaving them out: the weights of the others sum
to 1 without them. Chu et al. 2025, https://arxiv.org/abs/2504.02546.
"""

from raygent.algorithms.grpo import CREDITS_TURNS, advantages, loss  # noqa: F401

DEFAULTS = {"loss": "gpg", "normalise_std": False}
