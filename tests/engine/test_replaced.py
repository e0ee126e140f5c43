"""An engine of two replicas: each attempt has one of them. Replicas and engines killed with SIGKILL: what comes back serves no
old weights, and what was left goes on."""

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pyarrow as pa
import pytest
import ray
from attempts import SECRET, Attempt, engine_config
from policies import Policies

from raygent.actors.engine_handle import EngineHandle, EngineUnavailable
from raygent.actors.rollout_worker import make_worker
from raygent.actors.weight_transfer import push_cpu
from raygent.algorithms.trajectory import build
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app
from raygent.records import Rollout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REPLACED_S = 400
AGENT_S = 3600.0  # no attempt ends by that


@pytest.fixture(scope="module")
def two(store, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = engine_config("replaced", folder, model, replicas=2, continuation="exact", silent_s=30.0)
    config.agent.timeout_s = AGENT_S
    yield start_app(config, SECRET, "engine-tests-store", NAMESPACE, 0, str(model))
    delete_app(config)


@pytest.fixture(scope="module")
def policies(two, model):
    return Policies(two, model)


def status(engine):
    """Of each replica, by source; nothing while they are not to be had."""
    try:
        return {replica["source"]: replica for replica in engine.status()}
    except EngineUnavailable:
        return {}


def wait_for_replicas(engine, gone, number=2):
    deadline = time.monotonic() + REPLACED_S
    while len(found := status(engine)) < number or gone & set(found):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def push(policies, version):
    """As a driver has to: again while replicas are on their way out."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return push_cpu(policies.models[version], 0, 0, policies.engine, version)["push_bytes"]
        except EngineUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def ask(one, **more):
    """The status of one call."""
    body = {"messages": [{"role": "user", "content": "say"}], "max_tokens": 5} | more
    try:
        return httpx.post(f"{one.base_url}/v1/chat/completions", json=body, timeout=60).status_code
    except httpx.TransportError:
        return 0


def engine_core(pid):
    (core,) = [child for child in psutil.Process(pid).children(True) if "EngineCore" in " ".join(child.cmdline())]
    return core


AGENT = """
import asyncio
from openai import AsyncOpenAI, OpenAIError

async def say(client, messages):  # for ever, where nobody answers
    while True:
        try:
            return await client.chat.completions.create(model="policy", messages=messages, max_tokens=5)
        except OpenAIError:
            await asyncio.sleep(1)

async def answer(task, model):
    client, messages = AsyncOpenAI(base_url=model.base_url, api_key=model.api_key, max_retries=0, timeout=3600), []
    for _ in range(4):
        messages.append({"role": "user", "content": task})
        # cut off within a character, so that the text sent back has other tokens than were sampled
        reply = await say(client, messages)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    return 1.0
"""
ROLLOUTS = 40
steps = itertools.count(10_000)  # none that an Attempt has


def rolled_out(two: EngineHandle, store: Any, folder: Path, meanwhile: Callable[[], None]) -> dict[str, pa.Table]:
    """ROLLOUTS of AGENT by a worker, as the store has them; `meanwhile` runs once both replicas are at work."""
    (folder / "agent.py").write_text(AGENT)
    config = engine_config("replaced", folder, folder)
    config.path, step = str(folder / "raygent.toml"), next(steps)
    config.workers.rollouts_each, config.workers.cpus = 8, 0.1
    config.agent.timeout_s = AGENT_S
    before = {source: replica["sampled_tokens"] for source, replica in status(two).items()}
    names = [f"rolled-{step}-{number}" for number in range(ROLLOUTS)]
    ray.get(store.add_rollouts.remote([Rollout(name, "task", name, "train", step, 0, "say") for name in names]))
    worker = make_worker(config, store, two, SECRET, "worker-of-two")
    working = worker.run.remote()
    while not all(replica["sampled_tokens"] > before[source] for source, replica in status(two).items()):
        assert ray.get(store.wait.remote(step, "train", 0.0))
    meanwhile()
    while ray.get(store.wait.remote(step, "train", 60.0)):
        pass
    ray.get(worker.stop.remote())
    assert ray.get(working) == "stopped"
    ray.kill(worker)
    found = ray.get(store.take.remote(step, "train"))
    assert found["rollouts"]["status"].to_pylist() == ["succeeded"] * ROLLOUTS
    return found


def by_rollout(found: dict[str, pa.Table]) -> list[list[dict[str, Any]]]:
    calls = found["calls"].to_pylist()
    return [list(group) for _, group in itertools.groupby(calls, lambda call: call["rollout_id"])]


def test_each_attempt_has_one_of_the_replicas(two, policies, store, tmp_path):
    conversations = by_rollout(rolled_out(two, store, tmp_path, lambda: None))
    served = Counter()
    for calls in conversations:
        (source,) = {call["source"] for call in calls}
        served[source] += 1
        (trajectory,) = build(calls)
        assert len(calls) == 4 and trajectory.branches == 0
        assert all(call["own_tokens"] for call in calls[1:])
    assert set(served) == set(status(two)) and min(served.values()) >= ROLLOUTS / 4


def test_attempts_of_a_replica_that_dies_are_made_again(two, policies, store, tmp_path):
    killed, kept = status(two).values()
    found = rolled_out(two, store, tmp_path, lambda: os.kill(killed["pid"], signal.SIGKILL))
    again = [row["rollout_id"] for row in found["rollouts"].to_pylist() if row["attempts"] > 1]
    assert again and set(found["attempts"]["outcome"].to_pylist()) == {"succeeded"}
    for calls in by_rollout(found):
        (source,) = {call["source"] for call in calls}
        assert source == kept["source"] or calls[0]["rollout_id"] not in again
    wait_for_replicas(two, {killed["source"]})
    push(policies, policies.version)


def test_a_replica_that_was_killed_comes_back_without_weights(two, policies, store):
    size = sum(4 * parameter.numel() for parameter in policies.models[0].parameters())
    version, _ = policies.make()
    assert push(policies, version) == 2 * size
    before = status(two)
    killed, kept = before.values()
    core = engine_core(killed["pid"])
    os.kill(killed["pid"], signal.SIGKILL)

    one = Attempt(two, store, "train", 600.0)
    deadline = time.monotonic() + 60
    while ask(one) != 200:  # the other goes on
        assert time.monotonic() < deadline
    core.wait(10)  # its engine has ended with it

    found = wait_for_replicas(two, {killed["source"]})
    (new,) = set(found) - {kept["source"]}
    assert (found[kept["source"]]["version"], found[new]["version"]) == (version, -1)
    other = Attempt(two, store, "train", 600.0)
    statuses = [ask(other) for _ in range(10)]
    assert set(statuses) == {200, 503}

    assert push(policies, version) == size  # the new one alone lacks it
    assert {replica["version"] for replica in status(two).values()} == {version}
    third = Attempt(two, store, "train", 600.0)
    assert [ask(third) for _ in range(10)] == [200] * 10
    calls = third.calls()
    assert {call["source"] for call in calls} == {new, kept["source"]}
    for call in calls + one.calls() + other.calls():
        assert set(call["policy_versions"]) == {version}
        assert policies.fits(call)


class KillsOne:
    """The engines, one of which is killed in the middle of an update."""

    def __init__(self, engine, pid):
        self.engine, self.pid = engine, pid

    def begin_update(self, version):
        return self.engine.begin_update(version)

    def weights(self, step, payload):
        if step == "update":
            os.kill(self.pid, signal.SIGKILL)
        self.engine.weights(step, payload)

    def finish_update(self, version):
        self.engine.finish_update(version)


def test_a_replica_killed_in_the_middle_of_an_update(two, policies, store):
    killed, kept = status(two).values()
    version, model = policies.make()
    with pytest.raises(EngineUnavailable):
        push_cpu(model, 0, 0, KillsOne(two, killed["pid"]), version)
    push(policies, version)
    assert status(two)[kept["source"]]["version"] == version
    found = wait_for_replicas(two, {killed["source"]})
    assert sorted(replica["version"] for replica in found.values()) == [-1, version]
    push(policies, version)
    one = Attempt(two, store, "train", 600.0)
    assert [ask(one) for _ in range(8)] == [200] * 8
    assert all(policies.fits(call) for call in one.calls())


def test_a_killed_engine_core_fails_its_calls_at_once_and_is_replaced(two, policies, store):
    before = status(two)
    one = Attempt(two, store, "train", 600.0)
    stream = one.openai.chat.completions.create(
        model="policy",
        messages=[{"role": "user", "content": "say"}],
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    for replica in before.values():
        os.kill(engine_core(replica["pid"]).pid, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx.TransportError)):
        for _ in stream:
            pass
    assert ask(one) in (0, 500, 503)

    wait_for_replicas(two, set(before))
    version = max(policies.models)
    assert ask(Attempt(two, store, "train", 600.0)) == 503
    push(policies, version)
    other = Attempt(two, store, "train", 600.0)
    assert [ask(other) for _ in range(8)] == [200] * 8
    assert all(policies.fits(call) for call in other.calls())


def test_an_engine_core_that_hangs_is_replaced_and_its_attempts_are_made_again(two, policies, store, tmp_path):
    hung, kept = status(two).values()
    core = engine_core(hung["pid"])
    found = rolled_out(two, store, tmp_path, core.suspend)
    again = {row["rollout_id"] for row in found["rollouts"].to_pylist() if row["attempts"] > 1}
    assert again and set(found["attempts"]["outcome"].to_pylist()) == {"succeeded"}
    for calls in by_rollout(found):
        (source,) = {call["source"] for call in calls}
        assert source == kept["source"] or calls[0]["rollout_id"] not in again
    core.wait(10)  # nothing of it is left
    wait_for_replicas(two, {hung["source"]})
    push(policies, policies.version)
