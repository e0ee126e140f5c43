"""What the agents of a batch did, as one table that algorithms compute advantages from, and the one glue to verl's estimators."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from raygent.config import Algorithm

WHITENED = (
    "gae",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
)  # verl's estimators that normalise over the batch


@dataclass
class Episodes:
    """N rows, one for what an agent did in a rollout; T columns, the tokens it sampled that may be trained, in the order of its
    calls, whatever branches they stand on. Shorter rows are padded on the right. A row without a token takes part in
    comparisons: its rollout got a reward.

    `groups` names the rows that are compared with each other: the rollouts of a task, agent by agent.
    """

    rewards: (
        np.ndarray
    )  # float64 [N, T]: a turn's at its last token, the rollout's at its last (0 in an empty row), else nan
    mask: np.ndarray  # bool [N, T], where there is a token
    turns: np.ndarray  # int32 [N, T], the number of the call that sampled the token, from 0; -1 where there is none
    groups: np.ndarray  # str objects [N]
    baselines: np.ndarray  # float64 [N], the reward of the task's greedy rollout; nan where none was asked for
    # Float32 [N, T], 0 where there is no token. The log-probabilities of the tokens under the policy that sampled them, and
    # what the algorithm's MEASURES ask for: under the weights of now, under the reference (the first weights; of distill, the
    # teacher), and the critic's value of what stands before each token.
    logprobs: np.ndarray
    current: np.ndarray | None = None
    reference: np.ndarray | None = None
    values: np.ndarray | None = None

    @property
    def scores(self) -> np.ndarray:
        """Each row's whole reward, float64 [N]."""
        return np.nansum(self.rewards, 1)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [N]."""
        return self.mask.sum(1)


def token_rewards(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    """What each token got, float64 [N, T]; with `kl_in = "reward"` less the KL to the reference there, by its estimator
    `kl_kind` of what was sampled (http://joschu.net/blog/kl-approx.html)."""
    rewards = np.nan_to_num(episodes.rewards)
    if episodes.reference is None or settings.kl_in == "loss":
        return rewards
    import torch
    from verl.trainer.ppo.core_algos import kl_penalty

    sampled, reference = torch.FloatTensor(episodes.logprobs), torch.FloatTensor(episodes.reference)
    penalty = kl_penalty(sampled, reference, settings.kl_kind).numpy()
    return rewards - settings.kl * penalty * episodes.mask


def estimate(name: str, episodes: Episodes, settings: Algorithm) -> np.ndarray:
    """The advantages of verl's estimator of that name, float32 [N, T]."""
    return _estimate(name, episodes, settings)[0]


def estimated_returns(name: str, episodes: Episodes, settings: Algorithm) -> np.ndarray:
    """The returns of verl's estimator of that name, float32 [N, T]."""
    return _estimate(name, episodes, settings)[1]


def _estimate(name: str, episodes: Episodes, settings: Algorithm) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    if name in WHITENED and episodes.mask.sum() < 2:  # verl will not normalise a single token
        left_out = np.full(episodes.mask.shape, np.nan, np.float32)
        return left_out, left_out
    estimator = get_adv_estimator_fn(name)
    given: dict[str, Any] = {
        "token_level_rewards": torch.tensor(token_rewards(episodes, settings)),
        "response_mask": torch.tensor(episodes.mask, dtype=torch.float64),
        "index": episodes.groups,
        "reward_baselines": torch.tensor(episodes.baselines),
        "values": None if episodes.values is None else torch.tensor(episodes.values),
        "gamma": settings.discount,
        "lam": settings.gae_lambda,
        "norm_adv_by_std_in_grpo": settings.normalise_std,
        "config": AlgoConfig(gamma=settings.discount, norm_adv_by_std_in_grpo=settings.normalise_std),
    }
    taken = inspect.signature(estimator).parameters
    advantages, returns = estimator(**{key: value for key, value in given.items() if key in taken})
    return advantages.numpy().astype(np.float32), returns.numpy().astype(np.float32)
