"""GRPO: a rollout is as good as it is better than the other rollouts of its task.

Advantage (r - mean) / (std + 1e-6) over the group, by verl's estimator; Shao et al. 2024, https://arxiv.org/abs/2402.03300.
Without the division by std it is Dr.GRPO's, Liu et al. 2025, https://arxiv.org/abs/2503.20783.
"""

from __future__ import annotations

import numpy as np


def advantages(rewards: np.ndarray, groups: list[str], normalise_std: bool) -> np.ndarray:
    """One advantage for each reward.

    rewards: float [N], one a (rollout, agent); groups: N names, equal for those to be compared. Returns float32 [N].
    A group of one has nothing to be compared with: its advantage would be its reward, so it is an error.
    """
    import torch
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    _, sizes = np.unique(groups, return_counts=True)
    if (sizes < 2).any():
        raise ValueError("a GRPO group needs two rollouts to compare")
    column = torch.tensor(rewards, dtype=torch.float64)[:, None]
    found, _ = compute_grpo_outcome_advantage(
        column, torch.ones_like(column), np.asarray(groups, object), norm_adv_by_std_in_grpo=normalise_std
    )
    return found[:, 0].numpy().astype(np.float32)
