"""The one glue to verl's policy losses, and the terms added to them.

Every token carries its weight (records.Sample.weight) as verl's `rollout_is_weights`, and verl sums over tokens
(`token-sum`): so the weights alone decide what a token counts, and the sum of these losses over all micro-batches and
ranks is the loss of the batch. Nothing here knows of ranks: verl's `dp_size` stays 1, and the learner alone makes up for
the mean over ranks that DeepSpeed takes.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from raygent.config import Algorithm


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    algorithm: Algorithm,
) -> tuple[torch.Tensor, dict[str, float]]:
    """verl's policy loss of a micro-batch: a scalar to call backward on, and verl's own metrics.

    All tensors are [B, T]: current and sampling logprobs, advantages, mask (bool), weight of each token. The vanilla loss
    is PPO's clipped surrogate (https://arxiv.org/abs/1707.06347) with the dual clip at 3 (https://arxiv.org/abs/1912.09729).
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    return get_policy_loss_fn(algorithm.loss)(
        old_log_prob=old_logprobs,
        log_prob=logprobs,
        advantages=advantages,
        response_mask=mask.to(logprobs.dtype),
        loss_agg_mode="token-sum",
        config=_verl_config(algorithm),
        rollout_is_weights=weights,
    )


def kl_loss(
    logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor, kind: str
) -> torch.Tensor:
    """Weighted sum over tokens of the KL estimate to the reference; kinds: http://joschu.net/blog/kl-approx.html."""
    from verl.trainer.ppo.core_algos import kl_penalty

    floats = cast(torch.FloatTensor, logprobs), cast(torch.FloatTensor, reference)
    return (kl_penalty(*floats, kind) * mask * weights).sum()


def _verl_config(algorithm: Algorithm) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="fsdp",  # verl demands one; nothing of it is used
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=algorithm.clip_high,
        clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high,
        loss_agg_mode="token-sum",
    )
