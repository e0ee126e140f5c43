"""The frozen model that is compared with, where it is not a copy in each of the learners: the policy without its adapters, and a
group of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conversations import config, tables
from plain import Batch, make_batch, sample_logprobs
from ranks import on_ranks
from ray import cloudpickle
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from raygent.actors.learner import Learner, LearnerGroup
from raygent.actors.reference import Reference
from raygent.algorithms.batch import make_samples
from raygent.config import Config
from raygent.records import Sample

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks can't import it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("reference") / "model")


def settings(model: Path, folder: Path, **sections: object) -> Config:
    return config(
        run={"directory": str(folder), "name": "test"}, model={"path": str(model)}, algorithm={"kl": 0.3}, **sections
    )


def samples_of(batch: Batch, settings: Config, group: LearnerGroup) -> list[Sample]:
    return make_samples(tables(batch.rollouts, batch.calls), settings, None, group.measure)[0]


def all_adapters_are_trained(learner: Learner) -> bool:
    """By DeepSpeed's idea of it, which saves no others."""
    return all(
        parameter.requires_grad for name, parameter in learner.engine.module.named_parameters() if ".lora_" in name
    )


def is_of_the_first_weights(found: list[np.ndarray], samples: list[Sample], model: Path) -> bool:
    first = AutoModelForCausalLM.from_pretrained(model)
    return all(
        np.allclose(values[1:], sample_logprobs(first, sample), atol=1e-4)
        for values, sample in zip(found, samples, strict=True)
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_with_adapters_it_is_the_model_without_them(cluster: None, model: Path, tmp_path: Path, stage: int) -> None:
    one = settings(
        model,
        tmp_path,
        learner={"lora": {"rank": 4}, "zero_stage": stage, "learning_rate": 1e-1},
        agent={"run": "agent:run", "policies": {"idle": ["nobody"], "main": ["*"]}},
    )
    assert not one.with_reference and one.of_reference is None  # no second model is loaded
    learners = LearnerGroup(one)
    learners.start(None)
    try:
        samples = samples_of(make_batch(model), one, learners)
        told = [learners.step(samples, step) for step in range(2)]
        assert is_of_the_first_weights(learners.measure("reference", samples), samples, model)
        assert not is_of_the_first_weights(learners.measure("current", samples), samples, model)
        assert all(on_ranks(learners, all_adapters_are_trained))
        assert told[0]["kl_reference"] == pytest.approx(0, abs=1e-4) and abs(told[1]["kl_reference"]) > 1e-3
    finally:
        learners.stop()


def test_in_a_place_of_its_own(cluster: None, model: Path, tmp_path: Path) -> None:
    one = settings(model, tmp_path, learner={"ranks": 2}, reference={"ranks": 1})
    assert not one.with_reference and one.of_reference is not None
    assert [(name, learner.ranks) for name, learner in one.learners.items()] == [("learner", 2), ("reference", 1)]
    reference = LearnerGroup(one.of_reference, Reference)
    reference.restart(None)
    try:
        assert len(reference.ranks) == 1
        samples = samples_of(make_batch(model), one, reference)
        found = [sample.reference for sample in samples if sample.reference is not None]
        assert len(found) == len(samples) and is_of_the_first_weights(found, samples, model)
    finally:
        reference.stop()
