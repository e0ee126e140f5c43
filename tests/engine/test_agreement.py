"""Engine and learner agree on what sampled tokens cost, before training and after: float32, many turns, many at once."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
import pytest
import ray
from attempts import REPLIES, SECRET, TOOLS, engine_config, numbers, start_store
from tiny_model import make_tiny_model, teach
from transformers import AutoModelForCausalLM

from raygent.actors.engine_handle import EngineHandle
from raygent.actors.gateway import mint_key
from raygent.actors.learner import LearnerGroup
from raygent.actors.weight_transfer import push_cpu
from raygent.algorithms.batch import make_samples
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app
from raygent.config import Config
from raygent.records import Rollout, Sample, Seal

AT_ONCE, GROUP, TURNS, TEMPERATURE = 32, 4, 5, 0.7  # so many that a sample has well over 2,000 tokens


@dataclass
class Side:
    """An engine, its store, and learners that begin with the weights it serves."""

    engine: EngineHandle
    store: Any
    learners: LearnerGroup
    config: Config

    def sample(self) -> list[Sample]:
        """AT_ONCE conversations at once; the samples a step would train on."""
        step, rng = next(numbers), np.random.default_rng(0)
        names = [f"talk-{step}-{place}" for place in range(AT_ONCE)]
        # Mode eval: the temperature is the one the agent asks for.
        asked = [Rollout(name, name, f"{step}-{at // GROUP}", "eval", step, 0, "") for at, name in enumerate(names)]
        ray.get(self.store.add_rollouts.remote(asked))
        assert len(ray.get(self.store.lease.remote("worker", AT_ONCE))) == AT_ONCE
        threads = [threading.Thread(target=self._talk, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        closed = self.engine.close_attempts([(name, 1) for name in names])
        for name in names:
            made = {source: told["calls"] for source, told in closed[name, 1].items()}
            assert sum(made.values()) == TURNS
            seal = Seal(name, 1, "worker", "succeeded", float(rng.random()), made)
            assert ray.get(self.store.seal.remote(seal)) == "won"
        samples, _ = make_samples(ray.get(self.store.take.remote(step, "eval")), self.config)
        return samples

    def _talk(self, name: str) -> None:
        key = mint_key(SECRET, name, 1, "eval", time.time() + 600)
        base_url = f"{self.engine.base_url}/a/{key}/v1"
        messages: list[Any] = []
        with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=300) as client:
            for _ in range(TURNS):
                messages.append({"role": "user", "content": "say"})
                reply = client.chat.completions.create(
                    model="policy", messages=messages, max_tokens=60, temperature=TEMPERATURE
                )
                messages.append({"role": "assistant", "content": reply.choices[0].message.content})

    def gaps(self, samples: list[Sample]) -> np.ndarray:
        """|engine - learner| logprob of each sampled token."""
        learned = self.learners.measure("current", samples)
        pairs = zip(samples, learned, strict=True)
        return np.concatenate([np.abs(sample.logprobs - ours)[sample.loss_mask] for sample, ours in pairs])


@pytest.fixture(params=["tied", pytest.param("untied", marks=pytest.mark.slow)])
def side(request, cluster, tmp_path):
    """With the head tied to the embeddings on the engine all tests share, else on one of its own."""
    tied = request.param == "tied"
    if tied:
        engine, model, store = map(request.getfixturevalue, ("engine", "model", "store"))
    else:
        model = teach(make_tiny_model(tmp_path / "model", tie=False), REPLIES, TOOLS)
        store = start_store("untied-store", tmp_path)
        own = engine_config("untied", tmp_path, model)
        engine = start_app(own, SECRET, "untied-store", NAMESPACE, 0, str(model))
    assert AutoModelForCausalLM.from_pretrained(model).config.tie_word_embeddings == tied
    config = engine_config("agreement", tmp_path, model)
    config.learner.ranks, config.learner.zero_stage, config.learner.learning_rate = 2, 2, 3e-3
    learners = LearnerGroup(config)
    learners.start(None)
    yield Side(engine, store, learners, config)
    learners.stop()
    if tied:  # what the other tests expect
        held = engine.status()[0]["version"]
        push_cpu(AutoModelForCausalLM.from_pretrained(model), 0, 0, engine, held + 1)
    else:
        delete_app(own)


def test_before_training_and_after_three_updates(side: Side, record_property):
    version = side.engine.status()[0]["version"]
    before = side.sample()
    check(side, before, version, "before training", record_property)
    for step in range(3):
        side.learners.step(before, step)
    version += 1
    side.learners.push(side.engine, version)
    assert side.gaps(before).mean() > 1e-2, "the updates moved nothing: the test would show nothing"
    check(side, side.sample(), version, "after 3 updates", record_property)


def check(side: Side, samples: list[Sample], version: int, when: str, record_property) -> None:
    gaps = side.gaps(samples)
    told = f"mean {gaps.mean():.1e}, p99 {np.quantile(gaps, 0.99):.1e}, max {gaps.max():.1e}"
    print(f"|engine - learner| logprob, {when}, {len(gaps)} tokens: {told}")
    record_property(when, told)
    assert len(gaps) >= 2000
    assert max(turns_of(sample) for sample in samples) > 1
    assert {int(v) for sample in samples for v in sample.policy_versions[sample.loss_mask]} == {version}
    assert {float(t) for sample in samples for t in np.unique(sample.temperature[sample.loss_mask])} == {
        float(np.float32(TEMPERATURE))
    }
    assert gaps.mean() <= 1e-3


def turns_of(sample: Sample) -> int:
    """Stretches of trained tokens."""
    return int((np.diff(np.concatenate([[0], sample.loss_mask.astype(int)])) == 1).sum())
