"""Branching multi-turn rollouts, and what plain torch in one process makes of them: the reference for the learners.

It shares no code with the project: it goes from call to call, each its own unpadded sequence, and knows nothing of
trajectories, samples, micro-batches or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversations import branching, rollout, tables
from ranks import Arrays, Group
from transformers import AutoModelForCausalLM

from raygent.algorithms.batch import make_samples
from raygent.config import Config
from raygent.records import Call, Sample

NAMES = ["a0", "a1", "a2", "b1", "b2"]  # the rollouts that are trained


@dataclass
class Batch:
    """Six rollouts of two groups, the first of the second group with no call that may be trained."""

    rollouts: list[dict[str, Any]]
    calls: list[Call]

    def samples(self, config: Config, group: Group) -> list[Sample]:
        return make_samples(tables(self.rollouts, self.calls), config, None, group.learners.measure)[0]

    def trainable(self, rollout_id: str) -> list[Call]:
        return [one for one in self.calls if one.rollout_id == rollout_id and one.trainable]


def token_logprobs(model: Any, one: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token of the response, and the entropy of the distribution each was drawn from."""
    tokens = torch.tensor([one.prompt_token_ids + one.response_token_ids])
    scores = model(tokens).logits[0, len(one.prompt_token_ids) - 1 : -1] / one.temperature
    shifted = scores - scores.max(-1, keepdim=True).values
    probabilities = shifted.exp() / shifted.exp().sum(-1, keepdim=True)
    chosen = probabilities[range(len(one.response_token_ids)), one.response_token_ids]
    return chosen.log(), -(probabilities * probabilities.log()).sum(-1)


@torch.no_grad()
def sample_logprobs(model: Any, sample: Sample) -> np.ndarray:
    """Of each token but the first, at the temperature it was sampled at; 0 where it is not trained."""
    tokens = torch.tensor(sample.token_ids).long()
    scores = model(tokens[None]).logits[0, :-1] / torch.tensor(sample.temperature)[1:, None]
    return scores.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].numpy() * sample.loss_mask[1:]


def make_batch(model_path: Path) -> Batch:
    """Call logprobs near to those of the model, so that the ratios lie within the clip and beyond it."""
    rng = np.random.default_rng(7)
    rewards = {"a0": 1.0, "a1": 0.0, "a2": 0.0, "b0": 0.5, "b1": -1.0, "b2": 2.0}
    calls = [one for name in rewards for one in branching(rng, name, 261, int(rng.integers(1, 6)), 14)]
    for one in calls:
        one.trainable = one.trainable and one.rollout_id != "b0"
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for one in calls:
            found = token_logprobs(model, one)[0].numpy()
            one.logprobs = np.minimum(found + rng.normal(0, 0.3, len(found)), -1e-4).astype(np.float32).tolist()
    return Batch([rollout(name, name[0], value) for name, value in rewards.items()], calls)


def advantages(batch: Batch) -> dict[str, float]:
    found = {}
    for group in "ab":
        members = {row["rollout_id"]: row["reward"] for row in batch.rollouts if row["group_id"] == group}
        mean, std = np.mean(list(members.values())), np.std(list(members.values()), ddof=1)
        found |= {name: (value - mean) / (std + 1e-6) for name, value in members.items()}
    return found


def plain_loss(model: Any, reference: Any, batch: Batch, names: list[str], config: Config) -> torch.Tensor:
    """Mean over the rollouts in `names` of the mean over their trainable tokens of surrogate, KL and entropy."""
    algorithm, gains = config.algorithm, advantages(batch)
    whole = torch.zeros(())
    for name in names:
        tokens = sum(len(one.response_token_ids) for one in batch.trainable(name))
        for one in batch.trainable(name):
            now, entropy = token_logprobs(model, one)
            ratio = (now - torch.tensor(one.logprobs)).exp()
            unclipped = gains[name] * ratio
            surrogate = torch.minimum(
                unclipped, gains[name] * ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
            )
            if gains[name] < 0:
                surrogate = surrogate.clamp(min=3 * gains[name])
            with torch.no_grad():
                difference = token_logprobs(reference, one)[0]
            difference = difference - now
            kl = difference.exp() - 1 - difference
            terms = -surrogate + algorithm.kl * kl - algorithm.entropy * entropy
            whole = whole + terms.sum() / (tokens * len(names))
    return whole


class Plain:
    """The reference: a model, its KL reference and torch's AdamW in this process."""

    def __init__(self, group: Group, config: Config) -> None:
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(group.model)
        self.reference = AutoModelForCausalLM.from_pretrained(group.model)
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                parameter.copy_(torch.tensor(group.reference[name]))
        settings = config.learner
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )

    def gradient(self, batch: Batch, names: list[str]) -> Arrays:
        self.optimiser.zero_grad()
        plain_loss(self.model, self.reference, batch, names, self.config).backward()
        return {name: parameter.grad.numpy().copy() for name, parameter in self.model.named_parameters()}

    def policy_loss(self, batch: Batch, names: list[str]) -> float:
        alone = self.config.model_copy(deep=True)
        alone.algorithm.kl = alone.algorithm.entropy = 0.0
        return float(plain_loss(self.model, self.reference, batch, names, alone).detach())

    def step(self) -> float:
        """Clip, and AdamW's step. Returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.learner.clip_gradient)
        self.optimiser.step()
        return float(norm)

    def weights(self) -> Arrays:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.model.named_parameters()}

    def first_moment(self) -> Arrays:
        named = self.model.named_parameters()
        return {name: self.optimiser.state[parameter]["exp_avg"].numpy() for name, parameter in named}


def furthest(found: Arrays, wanted: Arrays) -> float:
    """The largest relative difference |found - wanted| / |wanted| of any parameter, in the 2-norm."""
    assert found.keys() == wanted.keys()
    return max(float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])) for name in wanted)
