"""The critic's gradient against plain torch in one process, and that it learns what it is given; packed, its optimiser offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conversations import branching, config, rollout, tables
from plain import furthest
from ranks import gradient, on_ranks, weights
from tiny_model import make_tiny_model
from transformers import AutoModelForTokenClassification

from raygent.actors.checkpoint import latest_checkpoint
from raygent.actors.critic import Critic
from raygent.actors.learner import LearnerGroup
from raygent.algorithms.batch import make_samples
from raygent.config import ConfigError
from raygent.records import Sample


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("critic")
    return config(
        run={"directory": str(folder / "runs"), "name": "test", "steps": 10},
        model={"path": str(make_tiny_model(folder / "model"))},
        algorithm={"name": "ppo"},
        learner={"ranks": 1, "micro_batch_tokens": 100, "packed": True, "offload_optimiser": True},
        critic={"ranks": 2, "learning_rate": 1e-2, "clip": 0.2},
    )


@pytest.fixture(scope="module")
def critic(cluster: None, settings: Any) -> Iterator[LearnerGroup]:
    group = LearnerGroup(settings.of_critic, Critic)
    group.start(None)
    yield group
    group.stop()


def samples_of(settings: Any, critic: LearnerGroup) -> list[Sample]:
    """Of branching rollouts; what the critic has to learn goes with the rollout."""
    rng, rollouts, calls = np.random.default_rng(5), [], []
    for number in range(6):
        rollouts.append(rollout(f"r{number}", f"g{number % 3}", float(number)))
        calls += branching(rng, f"r{number}", 261, 3, 10)
    return make_samples(tables(rollouts, calls), settings, None, critic.measure)[0]


def test_it_begins_at_zero_and_learns_the_returns(settings: Any, critic: LearnerGroup) -> None:
    samples = samples_of(settings, critic)
    assert len(samples) > 6
    assert all((values == 0).all() for values in critic.measure("values", samples))
    for sample in samples:
        assert sample.values is not None and sample.returns is not None
        number = float(sample.rollout_id[1])
        np.testing.assert_allclose(
            sample.returns[sample.loss_mask], number
        )  # gae_lambda = 1: all that is still to be had
        assert (sample.values == 0).all()

    # The gradient of a critic that has learnt something, against a model of its own without ranks or padding.
    told = [critic.step(samples, step) for step in range(3)]
    assert told[0]["returns"] > 0 and told[0]["explained_variance"] <= 0.01
    old = critic.measure("values", samples)
    assert max(np.abs(values).max() for values in old) > 1e-3
    model = plain(critic)
    loss = torch.zeros(())
    for sample in samples:
        now = model(torch.tensor(sample.token_ids)[None].long()).logits[0, :-1, 0]
        mask = torch.tensor(sample.loss_mask[1:])
        wanted, before = (torch.tensor(values[1:]) for values in (sample.returns, sample.values))
        clipped = torch.maximum(torch.minimum(now, before + 0.2), before - 0.2)
        error = torch.maximum((now - wanted) ** 2, (clipped - wanted) ** 2)
        loss = loss + 0.5 * sample.weight * error[mask].sum()
    loss.backward()
    wanted = {
        name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    for found in on_ranks(critic, gradient, samples):
        assert furthest({name: value for name, value in found.items() if name in wanted}, wanted) < 1e-5

    for step in range(4, 40):
        fresh = samples_of(settings, critic)
        last = critic.step(fresh, step)
    assert last["loss"] < 0.25 * told[0]["loss"] and last["explained_variance"] > 0.7


def plain(critic: LearnerGroup) -> Any:
    held = on_ranks(critic, weights)[0]
    model = AutoModelForTokenClassification.from_pretrained(critic.config.model.path, num_labels=1).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in held.items()})
    return model


def test_a_checkpoint_holds_it(settings: Any, critic: LearnerGroup) -> None:
    learners = LearnerGroup(settings)
    learners.start(None)
    try:
        learners.save(3, 7, critic)
        checkpoint = latest_checkpoint(settings.run_directory)
        assert checkpoint is not None
        samples = samples_of(settings, critic)
        before = critic.measure("values", samples)
        critic.restart(checkpoint.of_critic())
        for one, other in zip(before, critic.measure("values", samples), strict=True):
            np.testing.assert_array_equal(one, other)
        learners.save(4, 8)
        alone = latest_checkpoint(settings.run_directory)
        assert alone is not None and alone.step == 4
        with pytest.raises(ConfigError, match="holds no critic"):
            alone.of_critic()
    finally:
        learners.stop()


@pytest.mark.parametrize("what", ["returns", "values"])  # of the latter the loss alone is not finite
def test_what_is_not_finite_is_left_out_and_told(settings: Any, critic: LearnerGroup, what: str) -> None:
    samples = samples_of(settings, critic)
    before = critic.measure("values", samples)
    broken = samples_of(settings, critic)
    getattr(broken[0], what)[broken[0].loss_mask] = np.nan
    assert critic.step(broken, 0) == {"loss": 0.0, "gradient_norm": 0.0, "updates_skipped": 1.0}
    for found, kept in zip(critic.measure("values", samples), before, strict=True):
        np.testing.assert_array_equal(found, kept)
