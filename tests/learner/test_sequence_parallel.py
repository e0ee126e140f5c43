"""Ranks that share each sequence find what one rank alone does: two groups of two, under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from plain import NAMES, Batch, Plain, furthest, make_batch, sample_logprobs
from ranks import Group, gradient, on_ranks, start_group, weights

from raygent.actors.critic import Critic
from raygent.actors.learner import LearnerGroup
from raygent.config import Config

BOTH = {"kl": 0.3, "kl_kind": "k3", "entropy": 0.05}


@pytest.fixture(scope="module")
def shared(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    group = start_group(tmp_path_factory.mktemp("shared"), 3, tie=False, ranks=4, sequence_parallel=2)
    yield group
    group.learners.stop()


@pytest.fixture(scope="module")
def of_shared(shared: Group) -> Batch:
    return make_batch(shared.model)


def test_the_gradient_is_that_of_plain_torch(shared: Group, of_shared: Batch) -> None:
    config = shared.fresh(BOTH)
    samples = of_shared.samples(config, shared)
    assert len({len(sample) % 2 for sample in samples}) == 2  # some are filled up, some are not
    wanted = Plain(shared, config).gradient(of_shared, NAMES)
    for found in on_ranks(shared.learners, gradient, samples):
        assert furthest(found, wanted) < 1e-5


def test_a_step_tells_what_it_was_and_makes_the_same_weights(shared: Group, of_shared: Batch) -> None:
    config = shared.fresh(BOTH)
    plain = Plain(shared, config)
    loss = plain.policy_loss(of_shared, NAMES)
    plain.gradient(of_shared, NAMES)
    norm = plain.step()
    told = shared.learners.step(of_shared.samples(config, shared), 0)
    assert told["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert told["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    for found in on_ranks(shared.learners, weights):
        assert furthest(found, plain.weights()) < 2e-5


@pytest.mark.parametrize("what", ["current", "reference"])
def test_what_is_measured(shared: Group, of_shared: Batch, what: str) -> None:
    config = shared.fresh()
    samples, plain = of_shared.samples(config, shared), Plain(shared, config)
    model = plain.model if what == "current" else plain.reference
    for sample, found in zip(samples, shared.learners.measure(what, samples), strict=True):
        np.testing.assert_allclose(found[1:], sample_logprobs(model, sample), atol=1e-4)


def test_the_critic_too(shared: Group, of_shared: Batch) -> None:
    """Its values of a sequence that two ranks share are those that one rank finds."""
    samples, found = of_shared.samples(shared.fresh(), shared), []
    for sample in samples:
        sample.values = np.zeros_like(sample.logprobs)
        sample.returns = sample.loss_mask.astype(np.float32)
    for size in (1, 2):
        whole = shared.learners.config.model_dump(by_alias=True)
        whole["algorithm"] |= {"name": "ppo", "kl": 0.0}
        whole["learner"] |= {"sequence_parallel": size, "ranks": size}
        config = Config.model_validate(whole).of_critic
        assert config is not None
        critic = LearnerGroup(config, Critic)
        critic.start(None)
        told = critic.step(samples, 0)
        found.append((told, critic.measure("values", samples)))
        critic.stop()
    (one, alone), (two, together) = found
    assert two == pytest.approx(one, rel=1e-4) and any(values.any() for values in alone)
    for mine, ours in zip(alone, together, strict=True):
        np.testing.assert_allclose(ours, mine, atol=1e-5)
