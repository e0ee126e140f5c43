"""Credit by turn: what an agent did is worth what it got from then on."""

from __future__ import annotations

import numpy as np

from raygent.algorithms.episodes import Episodes, token_rewards
from raygent.config import Algorithm


def normalised_returns(episodes: Episodes, settings: Algorithm) -> np.ndarray:
    """GRPO's process supervision (https://arxiv.org/abs/2402.03300, section 4.1.3): every reward of a group, of whichever turn, is
    normalised by the mean and the spread of them all; a token's advantage is the sum of those from its turn on, each
    `discount` times less a turn. Where rollouts are rewarded at their end alone it is plain GRPO.

    Returns float32 [N, T].
    """
    found = np.zeros(episodes.rewards.shape, np.float32)
    by_turn = [_rewards_by_turn(episodes, row) for row in range(len(found))]
    for group in np.unique(episodes.groups):
        rows = np.flatnonzero(episodes.groups == group)
        every = np.concatenate([by_turn[row] for row in rows])
        given = every[~np.isnan(every)]
        spread = given.std(ddof=1) + 1e-6 if settings.normalise_std and len(given) > 1 else 1.0
        for row in rows:
            normal = np.nan_to_num((by_turn[row] - given.mean()) / spread)
            found[row] = discounted(normal, settings.discount)[episodes.turns[row]] * episodes.mask[row]
    return found


def gae(episodes: Episodes, settings: Algorithm) -> tuple[np.ndarray, np.ndarray]:
    """GAE (https://arxiv.org/abs/1506.02438) over turns: a turn's reward is all that its tokens got, its value the critic's before
    its first token. Returns the advantages and what the critic has to learn, float32 [N, T], each turn's on all its tokens.
    """
    assert episodes.values is not None
    rewards = token_rewards(episodes, settings)
    advantages, returns = np.zeros(rewards.shape, np.float32), np.zeros(rewards.shape, np.float32)
    for row in np.flatnonzero(episodes.lengths):
        turns = episodes.turns[row, : episodes.lengths[row]]
        numbers, firsts = np.unique(turns, return_index=True)
        values = episodes.values[row, firsts].astype(np.float64)
        got = np.array([rewards[row, : len(turns)][turns == number].sum() for number in numbers])
        deltas = got + settings.discount * np.append(values[1:], 0.0) - values
        of_turns = discounted(deltas, settings.discount * settings.gae_lambda)
        places = np.searchsorted(numbers, turns)
        advantages[row, : len(turns)] = of_turns[places]
        returns[row, : len(turns)] = (of_turns + values)[places]
    return advantages, returns


def discounted(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Each turn's return: the rewards from it on, each `discount` times less a turn. Float64 of the same length."""
    returns = np.zeros(len(rewards))
    running = 0.0
    for turn in reversed(range(len(rewards))):
        running = rewards[turn] + discount * running
        returns[turn] = running
    return returns


def _rewards_by_turn(episodes: Episodes, row: int) -> np.ndarray:
    """What each turn of the row got, nan where it got nothing. An empty row has one turn."""
    turns, rewards = np.maximum(episodes.turns[row], 0), episodes.rewards[row]
    found = np.full(turns.max() + 1, np.nan)
    given = ~np.isnan(rewards)
    found[turns[given]] = rewards[given]
    return found
