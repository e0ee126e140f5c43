"""Each token's recorded logprob is that of a plain forward pass under the weights of its recorded version, and no other's."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from policies import FITS, Policies
from transformers import AutoConfig, AutoModelForCausalLM

from raygent.actors import weight_transfer
from raygent.actors.engine_handle import EngineFailed, EngineUnavailable
from raygent.actors.weight_transfer import Bucket, push_cpu

ENDLESS = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
LENGTH = 400


@pytest.fixture(scope="module")
def policies(engine, model):
    policies = Policies(engine, model)
    yield policies
    version, _ = policies.make()
    push_cpu(AutoModelForCausalLM.from_pretrained(model), 0, 0, engine, version)


@pytest.fixture
def small_buckets(monkeypatch):
    """About a bucket a parameter."""
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 10_000)


def one_call(attempt, **asked):
    """A short call of a new attempt, as recorded."""
    one = attempt()
    one.openai.completions.create(model="policy", prompt="what is it", **{"max_tokens": 30} | asked)
    (call,) = one.calls()
    return call


class Running:
    """Requests of one attempt, running: streamed ones, whose progress shows, and others."""

    def __init__(self, one, streamed, others=()):
        self.one, self.chunks = one, [0] * len(streamed)
        asks = [asked | {"stream": True} for asked in streamed] + list(others)
        self.threads = [threading.Thread(target=self._ask, args=entry) for entry in enumerate(asks)]
        for thread in self.threads:
            thread.start()

    def _ask(self, place, asked):
        messages = [{"role": "user", "content": f"request {place}"}]
        reply = self.one.openai.chat.completions.create(model="policy", messages=messages, **asked)
        for _ in reply if asked.get("stream") else ():
            self.chunks[place] += 1

    def wait_for(self, chunks):
        """Until each streamed request has sent that many more."""
        wanted = [count + chunks for count in self.chunks]
        deadline = time.monotonic() + 60
        while any(count < want for count, want in zip(self.chunks, wanted, strict=True)):
            assert time.monotonic() < deadline and self.threads[0].is_alive()
            time.sleep(0.01)

    def calls(self):
        for thread in self.threads:
            thread.join(120)
        return self.one.calls()


def test_updates_in_the_middle_of_generation(attempt, policies, record_property):
    # Two requests with choices that end before an update while others of the same request go on after it.
    running = Running(
        attempt(), [ENDLESS | {"max_tokens": LENGTH}] * 7, [{"n": 3, "max_tokens": LENGTH, "stop": ["a", "e", "o"]}] * 2
    )
    versions_held = [policies.held()]
    for _ in range(2):
        running.wait_for(40)
        versions_held.append(policies.push()[0])
    calls = running.calls()
    assert len(calls) == 7 + 2 * 3
    own, other, at_borders, long_ones = [], [], [], 0
    for call in calls:
        versions = np.array(call["policy_versions"])
        assert (np.diff(versions) >= 0).all()
        gaps = {version: policies.gaps(call, version) for version in versions_held}
        for version, gap in gaps.items():
            own += list(gap[versions == version])
            other += list(gap[versions != version])
        for place in np.flatnonzero(np.diff(versions)):
            at_borders += [gaps[versions[place + 1]][place], gaps[versions[place]][place + 1]]
        counts = [int((versions == version).sum()) for version in gaps]
        long_ones += len(versions) == LENGTH and min(counts) >= 20
    assert long_ones == 7
    shares = {
        "largest gap under the own version": max(own),
        "mean gap under another": float(np.mean(other)),
        "share that fits another": float(np.mean(np.array(other) <= FITS)),
        "median gap of the tokens at a border under the other side": float(np.median(at_borders)),
        "share of those that fits": float(np.mean(np.array(at_borders) <= FITS)),
    }
    for name, value in shares.items():
        print(f"{name}: {value:.2e}")
        record_property(name, value)
    assert max(own) <= FITS
    assert np.mean(other) > 0.5
    assert np.mean(np.array(other) <= FITS) < 0.02
    assert np.mean(np.array(at_borders) <= FITS) < 0.1


def test_the_same_version_again_moves_no_bytes(attempt, policies, engine):
    before = policies.held()
    running = Running(attempt(), [ENDLESS])
    running.wait_for(10)
    version, first = policies.push()
    again = push_cpu(policies.models[version], 0, 0, engine, version)
    size = sum(4 * parameter.numel() for parameter in policies.models[version].parameters())
    assert (first["push_bytes"], again["push_bytes"]) == (size, 0)
    (call,) = running.calls()
    assert set(call["policy_versions"]) == {before, version}
    assert policies.fits(call)


def test_a_tied_head_is_not_stale(attempt, policies):
    """A new request, without a cached prefix of the old weights, right after an update."""
    assert AutoConfig.from_pretrained(policies.folder).tie_word_embeddings
    for _ in range(2):
        before = policies.held()
        one_call(attempt)
        version, _ = policies.push()
        call = one_call(attempt)
        assert set(call["policy_versions"]) == {version}
        assert policies.gaps(call, version).max() <= FITS
        assert policies.gaps(call, before).max() > 0.5


def test_gloo_carries_weights_as_well(attempt, policies, engine, small_buckets):
    before = policies.held()
    running = Running(attempt(), [ENDLESS])
    running.wait_for(10)
    version, pushed = policies.push(force_gloo=True)
    assert pushed["push_bytes"] == sum(4 * parameter.numel() for parameter in policies.models[version].parameters())
    (call,) = running.calls()
    assert set(call["policy_versions"]) == {before, version}
    assert policies.fits(call)
    assert policies.fits(one_call(attempt))


class BreaksOff:
    """The engines, of which a pusher loses hold at a step of an update: by its number or its name."""

    def __init__(self, engine, at):
        self.engine, self.at, self.steps = engine, at, 0

    def begin_update(self, version):
        return self.engine.begin_update(version)

    def weights(self, step, payload):
        if self.at in (self.steps, step):
            raise EngineUnavailable("the pusher is gone")
        self.steps += 1
        self.engine.weights(step, payload)

    def finish_update(self, version):
        if self.at == "finish_update":
            raise EngineUnavailable("the pusher is gone")
        self.engine.finish_update(version)


@pytest.mark.parametrize("at", [0, 1, 2, 5, "finish", "finish_update"])
def test_a_push_that_broke_off_is_made_up_for_by_the_next(attempt, policies, engine, small_buckets, at):
    """Also in the middle of a layer of which vLLM packs several of the learner's parameters into one."""
    running = Running(attempt(), [ENDLESS] * 2)
    running.wait_for(10)
    before = policies.held()
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="the pusher is gone"):
            policies.push(BreaksOff(engine, at))
    assert policies.held() == before
    version, _ = policies.push()
    for call in running.calls():
        assert set(call["policy_versions"]) == {before, version}
        assert policies.fits(call)
    assert policies.fits(one_call(attempt))


def test_an_update_that_raises_inside_the_engine_is_made_up_for(attempt, policies, engine, small_buckets):
    version, model = policies.make()
    engine.begin_update(version)
    engine.weights("start", {})
    for parameters in ([("model.embed_tokens.weight", torch.zeros(3, 64))], [("no.such.weight", torch.zeros(3))]):
        bucket = Bucket([parameters[0][0]], ["float32"], [list(parameters[0][1].shape)], "/no/such/file")
        with pytest.raises(EngineFailed, match="weights: "):
            engine.weights("update", vars(replace(bucket)))
    with pytest.raises(EngineUnavailable, match="have not arrived"):
        engine.finish_update(version)
    push_cpu(model, 0, 0, engine, version)
    assert policies.fits(one_call(attempt))


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight"),
        ({"vocab_size": 300}, "model.embed_tokens.weight"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_weights_of_another_model_are_refused_and_the_engine_goes_on(attempt, policies, engine, changed, wrong):
    running = Running(attempt(), [ENDLESS])
    running.wait_for(10)
    before = policies.held()
    version, other = policies.make(**changed)
    with pytest.raises(ValueError, match=wrong):
        push_cpu(other, 0, 0, engine, version)
    assert policies.held() == before
    (call,) = running.calls()
    assert set(call["policy_versions"]) == {before}
    assert policies.fits(call)


def test_another_models_weights_do_not_wake_an_engine_that_is_half_updated(attempt, policies, engine, small_buckets):
    with pytest.raises(EngineUnavailable):
        policies.push(BreaksOff(engine, 5))
    version, other = policies.make(num_hidden_layers=3)
    with pytest.raises(ValueError, match="do not fit"):
        push_cpu(other, 0, 0, engine, version)
    running = Running(attempt(), [{"max_tokens": 20}])
    time.sleep(1)
    assert running.chunks == [0]
    version, _ = policies.push()
    (call,) = running.calls()
    assert set(call["policy_versions"]) == {version}
    assert policies.fits(call)
