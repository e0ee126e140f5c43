"""On-policy distillation: the policy samples, and each token is worth how much likelier the teacher finds it than the policy did.

Advantage log p_teacher - log p_policy: of what is sampled its mean is minus the reverse KL, token by token. No reward is needed.
Agarwal et al. 2023, https://arxiv.org/abs/2306.13649; Gu et al. 2023, https://arxiv.org/abs/2306.08543.
"""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes
from raygent.algorithms.loss import policy_loss as loss  # noqa: F401
from raygent.config import Algorithm

COMPARES_GROUPS = False
MEASURES = ("reference",)
DEFAULTS = {"aggregation": "token", "group_size": 1}


def advantages(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    assert episodes.reference is not None
    return (episodes.reference - episodes.logprobs) * episodes.mask


def check(settings: Algorithm) -> None:
    if settings.teacher is None:
        raise ValueError(
            'algorithm.teacher: missing; write teacher = "a Hugging Face id or a folder" of the same tokenizer, or the '
            "base_url of an endpoint"
        )
    if settings.kl:
        raise ValueError("algorithm.kl: distill has the teacher for a reference, not the first weights; leave it out")
