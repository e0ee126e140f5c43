"""Checkpoints: going on from one is the same as never having stopped, and what it exports is the policy."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
from plain import NAMES, Batch, Plain, furthest, make_batch, token_logprobs
from ranks import (
    OWN_TEMPLATE,
    Arrays,
    Group,
    die_in_a_collective,
    first_moment,
    gradient,
    move_reference,
    on_ranks,
    optimiser_settings,
    start_group,
    weights,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygent.actors.checkpoint import Checkpoint, latest_checkpoint
from raygent.actors.learner import LearnerLost


def same_bits(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_an_exported_checkpoint_is_the_policy(group: Group, batch: Batch) -> None:
    config = group.fresh({"kl": 0.0})
    samples = batch.samples(config, group)
    group.learners.step(samples, 0)
    checkpoint = group.learners.save(3, 7)
    assert checkpoint == Checkpoint(group.learners.directory / "checkpoints" / "step-000003", 3, 7)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    held = on_ranks(group.learners, weights)[0]
    assert same_bits({name: tensor.detach().numpy() for name, tensor in model.named_parameters()}, held)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(checkpoint.path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118
    assert tied == (group.stage != 0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    assert tokenizer.decode([70, 71]) == AutoTokenizer.from_pretrained(group.model).decode([70, 71])
    assert tokenizer.chat_template == OWN_TEMPLATE  # served elsewhere, it is asked as it was trained
    assert json.loads((checkpoint.path / "generation_config.json").read_text())["eos_token_id"] == 2

    call = max(batch.trainable("a1"), key=lambda one: len(one.response_token_ids))
    known = dict(zip(call.logprobs, token_logprobs(model, call)[0].tolist(), strict=True))
    found = group.learners.measure("current", samples)
    seen = 0
    for sample, values in zip(samples, found, strict=True):
        assert values.shape == sample.token_ids.shape
        for place in np.flatnonzero(sample.loss_mask):
            if sample.rollout_id == "a1" and (wanted := known.get(float(sample.logprobs[place]))) is not None:
                assert values[place] == pytest.approx(wanted, abs=1e-5)
                seen += 1
    assert seen == len(call.response_token_ids)


def test_only_the_newest_checkpoints_stay(group: Group) -> None:
    group.fresh()
    root = group.learners.directory / "checkpoints"
    (root / ".step-000009.partial" / "optimiser").mkdir(parents=True)  # a process was killed here
    for step in (3, 4, 5):
        group.learners.save(step, step)
    assert sorted(path.name for path in root.iterdir()) == ["step-000004", "step-000005"]
    assert latest_checkpoint(group.learners.directory) == Checkpoint(root / "step-000005", 5, 5)
    assert latest_checkpoint(Path("/nowhere")) is None


def test_going_on_from_a_checkpoint_is_as_if_never_stopped(group: Group, batch: Batch) -> None:
    """To the bit, with AdamW's moments, after a rank was killed in between."""
    if group.stage == 0:
        pytest.skip("test_bfloat16 goes on under ZeRO-0")
    learners = group.learners
    samples = batch.samples(group.fresh(), group)
    learners.step(samples, 0)
    checkpoint = learners.save(8, 0)
    saved = on_ranks(learners, weights)[0]
    told = learners.step(samples, 1)
    went_on, moments = on_ranks(learners, weights)[0], on_ranks(learners, first_moment)[0]
    assert not same_bits(saved, went_on)

    os.kill(ray.get(learners.ranks[1].pid.remote()), signal.SIGKILL)
    with pytest.raises(LearnerLost):
        learners.step(samples, 2)
    assert latest_checkpoint(learners.directory) == checkpoint
    learners.restart(checkpoint)
    on_ranks(learners, move_reference)
    for held in on_ranks(learners, weights):
        assert same_bits(held, saved)
    again = learners.step(samples, 1)
    for held in on_ranks(learners, weights):
        assert same_bits(held, went_on)
    assert same_bits(on_ranks(learners, first_moment)[0], moments)
    assert {name for name in told if told[name] != again[name]} == {"learn_tokens_per_s"}
    restarted = learners.config.learner
    restarted.betas, restarted.weight_decay = (0.5, 0.6), 0.2
    learners.restart(checkpoint)
    assert on_ranks(learners, optimiser_settings) == [[((0.5, 0.6), 0.2)]] * 2
    restarted.betas, restarted.weight_decay = (0.9, 0.95), 0.1
    learners.restart(checkpoint)
    on_ranks(learners, move_reference)
    ledger = [json.loads(line) for line in (learners.directory / "learner.jsonl").read_text().splitlines()]
    assert ledger[-4:] == [{"start": 8}, {"step": 1, "rollouts": NAMES}, {"start": 8}, {"start": 8}]


def test_a_rank_that_dies_within_a_collective_is_the_groups_loss(group: Group) -> None:
    """Not the other rank's error, which may come first."""
    if group.stage != 2:
        pytest.skip("of one stage")
    with pytest.raises(LearnerLost, match="a learner rank died in __ray_call__"):
        group.learners._all("__ray_call__", die_in_a_collective)
    group.learners.restart(None)
    on_ranks(group.learners, move_reference)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16(cluster: None, tmp_path: Path, stage: int) -> None:
    """A gradient as far from float32's as plain torch's, and to the bit as if never stopped: the float32 weights behind are
    in the checkpoint."""
    group = start_group(tmp_path, stage, tie=stage != 0, dtype="bfloat16")
    batch = make_batch(group.model)
    config = group.fresh({"kl": 0.0}, {"micro_batch_tokens": 150})
    samples = batch.samples(config, group)
    found, _ = on_ranks(group.learners, gradient, samples)
    # plain torch in bfloat16 is 0.28 (head not tied) and 0.30 (tied) off
    assert furthest(found, Plain(group, config).gradient(batch, NAMES)) < 0.4
    samples = batch.samples(group.fresh(), group)
    assert group.learners.step(samples, 0)["gradient_norm"] > 0
    checkpoint = group.learners.save(1, 1)
    group.learners.step(samples, 1)
    went_on = on_ranks(group.learners, weights)[0]
    group.learners.restart(checkpoint)
    on_ranks(group.learners, move_reference)
    group.learners.step(samples, 1)
    again = on_ranks(group.learners, weights)[0]
    group.learners.stop()
    assert same_bits(again, went_on)
