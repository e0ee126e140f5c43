"""The way of a call to the store, and what a config makes of sampling parameters. A real store, no engine."""

import asyncio
import os
import signal
import time

import msgspec
import pytest
import ray
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from raygent.actors.capture import CallRecorder, NotRecorded, SamplingRules
from raygent.actors.replay_store import ReplayStore
from raygent.records import Call, Rollout, Seal


@pytest.fixture
def start_store(cluster, tmp_path):
    def start(restarts=-1):
        actor = ray.remote(ReplayStore)
        options = {"max_restarts": restarts, "max_task_retries": restarts, "max_concurrency": 1000, "num_cpus": 0}
        store = actor.options(**options).remote(str(tmp_path / "store"), 3600.0, 3)
        rollouts = [Rollout(f"r{place}", "t", f"r{place}", "train", 0, place, "input") for place in range(8)]
        ray.get(store.add_rollouts.remote(rollouts))
        assert len(ray.get(store.lease.remote("worker", 8))) == 8
        started.append(store)
        return store

    started: list = []
    yield start
    for store in started:
        ray.kill(store)


def pid_of(store):
    return ray.get(store.__ray_call__.remote(lambda _: os.getpid()))


def call(rollout, sequence=0, **changed):
    now = time.time()
    names = (rollout, 1, "source", sequence, f"request-{rollout}-{sequence}", 0, "agent", "policy", "chat", "{}")
    sampled = ([1, 2], [3], [-0.5], [0], "{}", 1.0, "stop", True, "", 0, now, now)
    made = Call(*names, *sampled)
    vars(made).update(changed)
    return made


async def seal(store, rollout, calls):
    return await store.seal.remote(Seal(rollout, 1, "worker", "succeeded", 0.0, {"source": calls}))


async def test_calls_of_many_attempts_arrive(start_store):
    store = start_store()
    recorder = CallRecorder(store)
    await asyncio.gather(*(recorder.append([call(f"r{n % 8}", n // 8)]) for n in range(400)))
    assert [await seal(store, f"r{n}", 50) for n in range(8)] == ["won"] * 8


async def test_a_refused_call_fails_alone(start_store):
    """In one message with the calls of others, before and after it."""
    store = start_store()
    recorder = CallRecorder(store)
    await seal(store, "r0", 0)
    appends = [recorder.append([call(f"r{n}", sequence)]) for sequence in range(3) for n in range(8)]
    never_leased = recorder.append([call("unknown")])
    done = await asyncio.gather(*appends, never_leased, return_exceptions=True)
    assert [type(each) for each in done] == ([NotRecorded] + [type(None)] * 7) * 3 + [NotRecorded]
    assert "is sealed" in str(done[0]) and "never leased" in str(done[-1])
    assert [await seal(store, f"r{n}", 3) for n in range(1, 8)] == ["won"] * 7
    with pytest.raises(NotRecorded):
        await recorder.append([call("r0")])


async def test_a_call_that_is_no_record_fails_alone(start_store):
    store = start_store()
    recorder = CallRecorder(store)
    good, bad = recorder.append([call("r0")]), recorder.append([call("r1", logprobs=["no number"])])
    done = await asyncio.gather(good, bad, return_exceptions=True)
    assert done[0] is None and isinstance(done[1], Exception)
    await recorder.append([call("r1")])
    assert [await seal(store, f"r{n}", 1) for n in range(2)] == ["won"] * 2


async def test_a_call_whose_client_is_gone_arrives_all_the_same(start_store):
    store = start_store()
    recorder = CallRecorder(store)
    tasks = [asyncio.create_task(recorder.append([call(f"r{n}")])) for n in range(8)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.wait(tasks)
    await recorder.append([call("r1", 1)])  # a later message: what was sent before is there
    assert [await seal(store, f"r{n}", 1 + (n == 1)) for n in range(8)] == ["won"] * 8


async def test_a_store_that_restarts_loses_no_call(start_store):
    store = start_store()
    recorder = CallRecorder(store)
    await recorder.append([call("r0")])
    os.kill(pid_of(store), signal.SIGKILL)
    await asyncio.gather(*(recorder.append([call(f"r{n}", 1)]) for n in range(8)))
    await recorder.append([call("r1", 2)])
    await recorder.append([call("r1")])
    assert await seal(store, "r1", 3) == "won"


async def test_a_store_that_is_gone_fails_every_call_and_wedges_nothing(start_store):
    store = start_store(restarts=0)
    recorder = CallRecorder(store)
    await recorder.append([call("r0")])
    ray.kill(store)
    for _ in range(2):
        appends = [recorder.append([call(f"r{n}", 1)]) for n in range(8)]
        done = await asyncio.wait_for(asyncio.gather(*appends, return_exceptions=True), 30)
        assert [type(each) for each in done] == [NotRecorded] * 8


OWN = {"temperature": 0.2, "top_p": 0.5, "top_k": 2, "min_p": 0.1, "seed": 3}
ODD = {
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "structured_outputs": StructuredOutputsParams(json={"type": "object"}),
    "logit_bias": {5: 1.0},
    "allowed_token_ids": [5],
    "bad_words": ["no"],
    "thinking_token_budget": 5,
    "trace_decode_token_ids": [5],
}


def test_train_mode_is_the_plain_policy_at_the_configs_temperature():
    asked = SamplingParams(**OWN, stop=["end"], max_tokens=50)
    params, why = SamplingRules(0.7, "refuse", 20).apply(asked, "train")
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.7, 1.0, 0, 0.0, None)
    assert (params.logprobs, params.max_tokens, params.stop, why) == (0, 20, ["end"], "")
    assert asked.temperature == 0.2 and asked.logprobs is None  # the client's own are left alone


@pytest.mark.parametrize("mode", ["train", "greedy", "eval"])
@pytest.mark.parametrize(
    "asked", [SamplingParams(min_tokens=300, max_tokens=500), SamplingParams(min_tokens=300, max_tokens=None)]
)
def test_what_goes_to_the_engine_is_what_vllm_takes(asked, mode):
    """Its core reads the parameters anew, and ends the thread that takes requests where they do not go together."""
    params, _ = SamplingRules(1.0, "mask", 20).apply(asked, mode)
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert (read.min_tokens, read.max_tokens) == (20, 20) and asked.min_tokens == 300


def test_train_mode_is_not_greedy():
    greedy = SamplingParams(temperature=0)
    params, _ = SamplingRules(1.0, "mask", None).apply(greedy, "train")
    assert params.temperature == 1.0 and params.sampling_type.name == "RANDOM"


@pytest.mark.parametrize("odd", ODD)
def test_what_changes_the_distribution_is_masked_or_refused(odd):
    asked = SamplingParams(**{odd: ODD[odd]})
    params, why = SamplingRules(1.0, "mask", None).apply(asked, "train")
    assert why == odd and getattr(params, odd) == ODD[odd]
    with pytest.raises(VLLMValidationError, match=odd):
        SamplingRules(1.0, "refuse", None).apply(asked, "train")


@pytest.mark.parametrize("odd", [None, *ODD])
def test_eval_mode_is_the_agents_own(odd):
    own = OWN | ({odd: ODD[odd]} if odd else {})
    params, why = SamplingRules(1.0, "refuse", None).apply(SamplingParams(**own, logprobs=5), "eval")
    assert {name: getattr(params, name) for name in own} == own
    assert (params.logprobs, why) == (5, "")
