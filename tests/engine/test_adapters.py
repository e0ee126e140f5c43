"""Policies of agents' own, as LoRA adapters: engine and learner agree on each, and what is not trained stays as it is."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from attempts import SECRET, TEMPERATURE, Attempt, engine_config, start_store
from conversations import rollout
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from raygent.actors.checkpoint import Checkpoint
from raygent.actors.engine_handle import EngineFailed
from raygent.actors.learner import LearnerGroup
from raygent.algorithms.batch import make_samples, weigh
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app
from raygent.config import Config
from raygent.records import SCHEMAS, Sample, to_batch

AGENTS = ["writer", "rewriter", "judge"]  # the last has no policy


@pytest.fixture(scope="module")
def settings(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("adapters")
    config = engine_config("adapters", folder, make_tiny_model(folder / "model"), kv_cache_memory_bytes=64 * 2**20)
    base = config.model_dump(by_alias=True)
    base["run"] |= {"keep_checkpoints": 100}
    base["agent"] |= {"policies": {"w": ["writer"], "r": ["rewriter"]}, "train": ["writer"]}
    base["learner"] |= {"lora": {"rank": 4, "alpha": 16.0}, "learning_rate": 5e-3, "weight_decay": 0.1}
    return Config.model_validate(base)


@pytest.fixture(scope="module")
def store(settings: Config) -> Any:
    return start_store("adapters-store", Path(settings.run.directory))


@pytest.fixture(scope="module")
def engine(settings: Config, store: Any) -> Any:
    yield start_app(settings, SECRET, "adapters-store", NAMESPACE, None, settings.model.path)
    delete_app(settings)


@pytest.fixture(scope="module")
def learners(settings: Config) -> Any:
    group = LearnerGroup(settings)
    group.start(None)
    yield group
    group.stop()


def sample(engine: Any, store: Any, config: Config) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Two rollouts in which all agents talk at once: the samples of a step, and the calls."""
    attempts = [Attempt(engine, store, "train", 600.0) for _ in range(2)]

    def talk(one: Attempt, agent: str) -> None:
        asked: dict[str, Any] = {"temperature": 0.0} if agent == "judge" else {}
        one.openai.chat.completions.create(
            model=agent, messages=[{"role": "user", "content": f"Say a word, {agent}."}], max_tokens=60, **asked
        )

    threads = [threading.Thread(target=talk, args=(one, agent)) for one in attempts for agent in AGENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = [call for one in attempts for call in one.calls()]
    rollouts = [rollout(one.id, "group", reward) for one, reward in zip(attempts, (1.0, 0.0), strict=True)]
    rows = {"rollouts": rollouts, "calls": calls, "rewards": []}
    tables = {name: pa.Table.from_batches([to_batch(SCHEMAS[name], records)]) for name, records in rows.items()}
    return make_samples(tables, config)[0], calls


def gap(learners: LearnerGroup, samples: list[Sample]) -> float:
    pairs = zip(samples, learners.measure("current", samples), strict=True)
    return float(np.concatenate([np.abs(one.logprobs - ours)[one.loss_mask] for one, ours in pairs]).mean())


def adapters(checkpoint: Checkpoint) -> dict[str, dict[str, np.ndarray]]:
    return {name: load_file(checkpoint.path / "adapters" / name / "adapter_model.safetensors") for name in ("w", "r")}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_one_of_two_policies_is_trained(settings: Config, store: Any, engine: Any, learners: LearnerGroup) -> None:
    assert engine.status()[0]["version"] == -1
    told = learners.push(engine, 1)
    both = settings.model_copy(deep=True)
    both.agent.train = ["*"]  # what the engine and the learners make of each policy is seen in both

    before = learners.save(0, 1)
    samples, calls = sample(engine, store, settings)
    assert {call["agent"]: call["policy"] for call in calls} == {"writer": "w", "rewriter": "r", "judge": "base"}
    assert {one.agent for one in samples} == {"writer"}
    # Those that are not trained sample as they ask.
    asked = {"writer": TEMPERATURE, "rewriter": 1.0, "judge": 0.0}
    assert {call["agent"]: call["temperature"] for call in calls} == pytest.approx(asked)
    assert {call["agent"]: call["trainable"] for call in calls} == {"writer": True, "rewriter": True, "judge": False}
    for step in range(3):
        metrics = learners.step(samples, step)
        learners.push(engine, 2 + step)
    assert metrics["gradient_norm"] > 0

    after = learners.save(3, 4)
    assert same(adapters(before)["r"], adapters(after)["r"])
    assert not any(
        one.tobytes() == other.tobytes()
        for one, other in zip(adapters(before)["w"].values(), adapters(after)["w"].values(), strict=True)
    )
    full = (Path(settings.model.path) / "model.safetensors").stat().st_size
    assert 0 < told["push_bytes"] < full / 2, "more than the adapters travelled"

    # The engine samples each agent from its policy, and agrees with the learners on both.
    later, calls = sample(engine, store, both)
    assert {one.agent for one in later} == {"writer", "rewriter"}
    assert {version for call in calls for version in call["policy_versions"]} == {4}
    assert gap(learners, later) < 1e-4
    first = [one for one in samples if one.agent == "writer"]
    assert gap(learners, first) > 1e-3, "the steps moved nothing: the test would show nothing"


def gradients(learners: LearnerGroup, samples: list[Sample]) -> dict[str, dict[str, np.ndarray]]:
    """By policy that `samples` train, the whole gradient of each of its matrices; no weight changes."""

    def of_rank(learner: Any) -> dict[str, dict[str, np.ndarray]]:
        from deepspeed.utils import safe_get_full_grad

        from raygent.actors.adapters import named_parameters

        learner._set_learning_rates(samples, 0.0)
        learner.backward(samples, {})
        found = {
            policy: {
                name: safe_get_full_grad(parameter).float().numpy().copy()
                for name, parameter in named_parameters(learner.engine.module, policy)
            }
            for policy in sorted({learner.config.policy_of(one.agent) for one in samples})  # a collective
        }
        learner.engine.step()
        return found

    return ray.get([rank.__ray_call__.remote(of_rank) for rank in learners.ranks])[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_policy_has_the_gradient_it_would_have_alone(settings, store, engine, learners, stage) -> None:
    both = settings.model_copy(deep=True)
    both.agent.train = ["*"]
    samples, _ = sample(engine, store, both)
    if stage == 3:
        both.run.name, both.learner.zero_stage = "adapters3", 3
        learners = LearnerGroup(both)
        learners.start(None)
    together = gradients(learners, samples)
    for policy, agent in (("w", "writer"), ("r", "rewriter")):
        mine = [replace(one) for one in samples if one.agent == agent]
        weigh(mine, both)
        alone = gradients(learners, mine)[policy]
        assert max(float(np.abs(tensor).max()) for tensor in alone.values()) > 1e-4
        for key, tensor in alone.items():
            np.testing.assert_allclose(together[policy][key], tensor, atol=1e-6)
    again = gradients(learners, samples)  # what the steps before left must not be in it
    for policy, tensors in together.items():
        for key, tensor in tensors.items():
            np.testing.assert_allclose(again[policy][key], tensor, atol=1e-6)
    if stage == 3:
        learners.stop()


def test_a_checkpoint_goes_on_and_is_what_peft_loads(settings, store, engine, learners) -> None:
    both = settings.model_copy(deep=True)
    both.agent.train = ["*"]
    checkpoint = learners.save(20, 20)
    learners.restart(checkpoint)
    assert all(same(adapters(checkpoint)[name], adapters(learners.save(21, 20))[name]) for name in ("w", "r"))
    learners.push(engine, 20)
    samples, _ = sample(engine, store, both)
    assert gap(learners, samples) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(settings.model.path)
    model = PeftModel.from_pretrained(model, checkpoint.path / "adapters" / "w", adapter_name="w")
    one = next(one for one in samples if one.agent == "writer")
    with torch.no_grad():
        logits = model(torch.tensor(one.token_ids[None].astype(np.int64))).logits[0, :-1]
    temperatures = torch.tensor(one.temperature[1:, None])
    logprobs = (logits / temperatures).log_softmax(-1)[range(len(one) - 1), one.token_ids[1:]].numpy()
    np.testing.assert_allclose(logprobs[one.loss_mask[1:]], one.logprobs[one.loss_mask], atol=1e-3)


def test_an_adapter_that_vllm_refuses_is_told_at_once(settings, store, engine, learners) -> None:
    """And the next push of right ones makes up for it."""
    version = engine.status()[0]["version"] + 1
    good = learners.save(30, 30).path / "adapters" / "w"
    files = {file.name: file.read_bytes() for file in good.iterdir()}
    too_large = json.loads(files["adapter_config.json"]) | {"r": 64}
    engine.begin_update(version)
    with pytest.raises(EngineFailed, match=r"load_adapters: .*rank 64 is greater"):
        engine.load_adapters({"w": files | {"adapter_config.json": json.dumps(too_large).encode()}})
    learners.push(engine, version)
    assert engine.status()[0]["version"] == version
    samples, _ = sample(engine, store, settings)
    assert gap(learners, samples) < 1e-4
