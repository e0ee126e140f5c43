"""The learners' gradient and step against plain torch in one process, over branching multi-turn rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plain import NAMES, Batch, Plain, advantages, furthest, sample_logprobs, token_logprobs
from ranks import Group, back_to_start, first_moment, gradient, gradient_with_checkpointing, on_ranks, weights

from raygent.actors.micro_batches import deal, micro_batches
from raygent.algorithms.batch import to_samples, weigh
from raygent.algorithms.trajectory import build
from raygent.config import Config
from raygent.records import Sample

BOTH = {"kl": 0.3, "kl_kind": "k3", "entropy": 0.05}
PLAIN = {"kl": 0.0, "entropy": 0.0}


def test_the_batch_is_what_it_is_meant_to_be(batch: Batch, group: Group) -> None:
    """Branches, unequal lengths, and unequal numbers of micro-batches."""
    config = group.fresh()
    samples = batch.samples(config, group)
    assert list(dict.fromkeys(sample.rollout_id for sample in samples)) == NAMES
    assert len(samples) > 8 and len({len(sample) for sample in samples}) > 6
    assert any(trajectory.branches > 1 for name in NAMES for trajectory in build(_rows(batch, name)))
    counts = [[place for batch in _mine(samples, rank, 150) for place in batch.places] for rank in range(2)]
    fillers = [places.count(-1) for places in counts]
    assert min(fillers) == 0 and max(fillers) > 0


def _rows(batch: Batch, name: str) -> list[dict[str, Any]]:
    return [vars(one) for one in batch.calls if one.rollout_id == name]


def _mine(samples: list[Sample], rank: int, tokens: int) -> list[Any]:
    return micro_batches(deal(list(enumerate(samples)), 2), rank, tokens)


@pytest.mark.parametrize("tokens", [150, 16384], ids=["many-micro-batches", "one-micro-batch"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("algorithm", [PLAIN, BOTH], ids=["surrogate", "kl-and-entropy"])
def test_gradient(group: Group, batch: Batch, algorithm: dict[str, Any], packed: bool, tokens: int) -> None:
    config = group.fresh(algorithm, {"micro_batch_tokens": tokens, "packed": packed})
    wanted = Plain(group, config).gradient(batch, NAMES)
    for found in on_ranks(group.learners, gradient, batch.samples(config, group)):
        assert furthest(found, wanted) < 1e-5


def test_gradient_of_a_rollout_split_into_single_calls(group: Group, batch: Batch) -> None:
    """Each call as a sample of its own, instead of paths: as many more samples, the same weights, the same gradient."""
    config = group.fresh(BOTH)
    gains = advantages(batch)
    split = [
        sample
        for one in batch.calls
        if one.rollout_id in NAMES
        for sample in to_samples(build([vars(one)])[0], one.rollout_id[0], gains[one.rollout_id])
    ]
    weigh(split, config)
    group.note_reference(split)
    assert len(split) > len(batch.samples(config, group))
    (found, _) = on_ranks(group.learners, gradient, split)
    assert furthest(found, Plain(group, config).gradient(batch, NAMES)) < 1e-5


def test_gradient_where_a_rank_has_nothing(group: Group, batch: Batch) -> None:
    config = group.fresh(BOTH)
    one = batch.trainable("b2")[0]
    (sample,) = to_samples(build([vars(one)])[0], "b", advantages(batch)["b2"])
    weigh([sample], config)
    group.note_reference([sample])
    alone = Batch(batch.rollouts, [one])
    (found, _) = on_ranks(group.learners, gradient, [sample])
    assert furthest(found, Plain(group, config).gradient(alone, ["b2"])) < 1e-5


def test_gradient_with_activations_recomputed(group: Group, batch: Batch) -> None:
    config = group.fresh(BOTH, {"micro_batch_tokens": 150})
    (found, layers, micro_batches), _ = on_ranks(
        group.learners, gradient_with_checkpointing, batch.samples(config, group)
    )
    assert layers == 2 * micro_batches > 2
    assert furthest(found, Plain(group, config).gradient(batch, NAMES)) < 1e-5


@pytest.mark.parametrize(
    ("epochs", "rate"), [(1, 1e-3), (2, 1e-4)]
)  # faster, and verl would cut a token's k3 off at 10
def test_two_mini_batches_are_two_steps_of_adamw(group: Group, batch: Batch, epochs: int, rate: float) -> None:
    """Each clipped, over its own rollouts, and in each epoch. What the optimiser was given and the weights it made, on both ranks
    alike."""
    config = group.fresh(
        BOTH | {"mini_batches": 2, "epochs": epochs}, {"micro_batch_tokens": 150, "learning_rate": rate}
    )
    plain, norms, losses = Plain(group, config), [], []
    start = plain.weights()
    for names in [NAMES[0::2], NAMES[1::2]] * epochs:
        losses.append(plain.policy_loss(batch, names))
        plain.gradient(batch, names)
        norms.append(plain.step())
    assert max(norms) > config.learner.clip_gradient
    wanted = plain.weights()

    told = group.learners.step(batch.samples(config, group), 0)
    assert told["gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    assert 0.05 < told["clip_fraction"] < 0.95
    for moments in on_ranks(group.learners, first_moment):
        assert furthest(moments, plain.first_moment()) < 1e-4  # the second step is from weights that differ by rounding
    for found in on_ranks(group.learners, weights):
        assert furthest(found, wanted) < 2e-5
        # AdamW divides each entry by its own size: the rounding of the smallest ones shows
        moved = {name: found[name] - start[name] for name in found}
        assert furthest(moved, {name: wanted[name] - start[name] for name in wanted}) < 1e-3


def test_mismatch_is_between_the_engine_and_the_weights_before_the_step(group: Group, batch: Batch) -> None:
    config = group.fresh(PLAIN | {"mini_batches": 1})
    model = Plain(group, config).model
    gaps = np.concatenate([
        np.abs(token_logprobs(model, one)[0].detach().numpy() - one.logprobs)[np.array(one.policy_versions) == 0]
        for name in NAMES
        for one in batch.trainable(name)
    ])  # fmt: skip
    told = group.learners.step(batch.samples(config, group), 0)
    assert told["mismatch_mean"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert told["mismatch_p99"] == pytest.approx(np.quantile(gaps, 0.99), abs=1e-5)
    assert told["mismatch_max"] == pytest.approx(gaps.max(), abs=1e-5)


def test_current_and_reference_are_measured(group: Group, batch: Batch) -> None:
    """Each masked token's log-probability, at the temperature it was sampled at, by two models that are not the same."""
    config = group.fresh()
    samples, plain = batch.samples(config, group), Plain(group, config)
    for what, model in (("current", plain.model), ("reference", plain.reference)):
        for sample, found in zip(samples, group.learners.measure(what, samples), strict=True):
            np.testing.assert_allclose(found[1:], sample_logprobs(model, sample), atol=1e-4)


def test_nothing_to_learn_changes_nothing(group: Group) -> None:
    group.fresh(BOTH)
    before = on_ranks(group.learners, weights)
    told = group.learners.step([], 0)
    assert told["gradient_norm"] == told["loss"] == 0 and "mismatch_max" not in told
    for found, kept in zip(on_ranks(group.learners, weights), before, strict=True):
        assert furthest(found, kept) == 0


def test_learning_rate_warms_up_and_decays(group: Group) -> None:
    group.fresh(learner={"decay": "linear", "warmup_steps": 4, "learning_rate": 1e-3})
    told = [group.learners.step([], step)["learning_rate"] for step in (0, 1, 5, 9)]
    assert told == pytest.approx([0.25e-3, 0.5 * 0.9e-3, 0.5e-3, 0.1e-3])


def test_the_rate_begins_once_the_critic_has_learnt_alone(group: Group) -> None:
    base = group.fresh(learner={"decay": "linear", "warmup_steps": 2, "learning_rate": 1e-3}).model_dump(by_alias=True)
    base |= {"algorithm": {"name": "ppo"}, "critic": base["critic"] | {"warmup_steps": 5}}
    on_ranks(group.learners, back_to_start, str(group.kept), Config.model_validate(base))
    told = [group.learners.step([], step)["learning_rate"] for step in (4, 5, 6, 9)]
    assert told == pytest.approx([0.5e-3, 0.5e-3, 0.8e-3, 0.2e-3])


def test_an_update_that_is_not_finite_is_left_out(group: Group, batch: Batch) -> None:
    """And the one behind it is as if there had been none before."""
    samples = batch.samples(group.fresh({"kl": 0.0}), group)
    first = group.learners.step(samples, 0)
    after = on_ranks(group.learners, weights)[0]
    samples = batch.samples(group.fresh({"kl": 0.0}), group)
    before = on_ranks(group.learners, weights)
    broken = batch.samples(group.learners.config, group)
    broken[0].advantages[broken[0].loss_mask] = np.nan
    told = group.learners.step(broken, 0)
    assert told["updates_skipped"] == 1 and told["gradient_norm"] == 0 and "loss" not in told
    for found, kept in zip(on_ranks(group.learners, weights), before, strict=True):
        assert furthest(found, kept) == 0
    again = group.learners.step(samples, 0)
    assert again["updates_skipped"] == first["updates_skipped"] == 0
    assert furthest(on_ranks(group.learners, weights)[0], after) < 1e-6
