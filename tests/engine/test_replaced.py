"""Replicas and engines killed with SIGKILL: what comes back serves no old weights, and what was left goes on."""

import os
import signal
import time

import httpx
import openai
import psutil
import pytest
from attempts import SECRET, Attempt, engine_config
from policies import Policies

from raygent.actors.engine_handle import EngineUnavailable
from raygent.actors.weight_transfer import push_cpu
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REPLACED_S = 400


@pytest.fixture(scope="module")
def two(store, model, tmp_path_factory):
    """An engine of two replicas."""
    config = engine_config("replaced", tmp_path_factory.mktemp("run"), model, replicas=2)
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
    killed = time.monotonic()
    with pytest.raises((openai.APIError, httpx.TransportError)):
        for _ in stream:
            pass
    assert time.monotonic() - killed < 10
    assert ask(one) in (0, 500, 503)

    wait_for_replicas(two, set(before))
    version = max(policies.models)
    assert ask(Attempt(two, store, "train", 600.0)) == 503
    push(policies, version)
    other = Attempt(two, store, "train", 600.0)
    assert [ask(other) for _ in range(8)] == [200] * 8
    assert all(policies.fits(call) for call in other.calls())
