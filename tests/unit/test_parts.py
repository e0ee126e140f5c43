"""What the driver asks of the parts, where it can be told without them."""

import os
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from conversations import config, rollout, tables
from ray.exceptions import RayError

from raygent.actors import weight_transfer
from raygent.actors.engine_handle import EngineFailed, EngineHandle, EngineUnavailable
from raygent.actors.learner import LearnerLost
from raygent.cluster.parts import MOST_RESTARTS, GateError, Parts
from raygent.config import ConfigError
from raygent.records import Sample


@pytest.fixture
def parts(tmp_path):
    made = Parts(config(run={"directory": str(tmp_path)}))
    made.version = 2
    return made


def test_an_evaluation_leaves_the_runs_configuration(tmp_path):
    asked = {"run": {"directory": str(tmp_path)}, "prompts": {"writer": "w.txt"}, "algorithm": {"name": "apo"}}
    begun = Parts(config(**asked), learn=False)
    before = (begun.directory / "config.toml").read_bytes()
    Parts(config(**asked | {"engine": {"temperature": 0.5}}), learn=False, evaluates=True)
    assert (begun.directory / "config.toml").read_bytes() == before
    Parts(config(**asked | {"engine": {"temperature": 0.5}}), learn=False)
    assert (begun.directory / "config.toml").read_bytes() != before


def sample(versions: list[int], logprobs: list[float]) -> Sample:
    known = np.array(logprobs, np.float32)
    mask, versions_of = np.ones(len(known), bool), np.array(versions, np.int32)
    return Sample("r", "g", "main", versions_of, mask, known, known * 0, versions_of, known * 0 + 1)


def test_the_gate_compares_tokens_of_the_current_weights_alone(parts):
    zeros = {"current": lambda samples: [np.zeros(len(one), np.float32) for one in samples]}
    parts.learners = SimpleNamespace(measure=lambda what, samples: zeros[what](samples))
    parts.gate([sample([1, 1], [-9.0, -9.0])])
    assert not parts.gated
    with pytest.raises(GateError, match=r"differ by 0\.5 in mean over 2 tokens"):
        parts.gate([sample([1, 2], [-9.0, -1.0]), sample([2], [0.0])])
    parts.gate([sample([1, 2], [-9.0, 0.0])])
    assert parts.gated


def test_without_learners_a_replaced_replica_adopts_what_it_loaded(parts):
    adopted: list[int] = []
    parts.learners = None
    parts.engine = SimpleNamespace(status=lambda: [{"version": 2}, {"version": -1}], adopt=adopted.append)
    parts.heal()
    assert adopted == [2]


@pytest.mark.parametrize(("lost", "mode", "ends"), [(3, "train", True), (2, "train", False), (3, "eval", False)])
def test_an_outage_ends_the_run_with_its_steps_kept(parts, monkeypatch, lost, mode, ends):
    """Rather than use up step after step without a rollout to learn from."""
    rows = [rollout(str(n), "g", 1.0, "lost" if n < lost else "succeeded") for n in range(4)]
    saved, asked = [], []
    parts.step, parts.learners, parts.checkpoint = 7, SimpleNamespace(), lambda: saved.append(parts.step)
    monkeypatch.setattr(ray, "get", lambda ref: ref)

    def take(*what):
        asked.append(what)
        return tables(rows, [])

    parts.store = SimpleNamespace(wait=SimpleNamespace(remote=lambda *_: 0), take=SimpleNamespace(remote=take))
    if ends:
        with pytest.raises(ConfigError, match=r"infrastructure lost 3 of the 4 rollouts of step 8, each 3 times"):
            parts.collect(7, mode)
    else:
        assert len(parts.collect(7, mode)["rollouts"]) == 4
    assert saved == [7] * ends and asked == [(7, mode, False, mode == "eval")]


def test_a_push_by_gloo_without_its_receiver_is_the_engines_failing(monkeypatch):
    monkeypatch.setattr(weight_transfer, "GLOO_TIMEOUT", timedelta(seconds=1))
    engine, bucket = SimpleNamespace(weights=lambda *_: None), weight_transfer.Bucket(["w"], ["uint8"], [[8]])
    with pytest.raises(EngineUnavailable):
        weight_transfer._send_gloo(engine, bucket, torch.zeros(8, dtype=torch.uint8), 1, None)


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_spent_its_limit_ends_with_a_checkpoint_of_what_it_learnt(tmp_path, step):
    prices = {"price_input": 1.0, "max_cost": 2.0}
    vendor = {"agents": ["judge"], "base_url": "http://h/v1", "model": "big"} | prices
    parts = Parts(config(run={"directory": str(tmp_path)}, upstream={"vendor": vendor}))
    saved: list[int] = []
    parts.step, parts.learners, parts.checkpoint = step, SimpleNamespace(), lambda: saved.append(parts.step)
    told = {"cost": 1.5, "served": 3, "mistake": "", "budget": 0.5}
    parts.engine = SimpleNamespace(status=lambda: [{"source": "a", "upstreams": {"vendor": told}}])
    parts.check_upstreams()
    told["cost"] = 2.5
    with pytest.raises(ConfigError, match=r"upstream\.vendor\.max_cost: the run has spent 2\.5 of 2 dollars"):
        parts.check_upstreams()
    assert saved == ([step] if step else [])
    again = Parts(parts.config)
    with pytest.raises(ConfigError, match="max_cost"):
        again.__enter__()  # before anything starts


def limited(tmp_path, replicas=2):
    """Parts with a store and engines that are told of alone; `told` by replica, `asked` what they were asked for."""
    vendor = {"agents": ["judge"], "base_url": "http://h/v1", "model": "big", "price_input": 1.0, "max_cost": 8.0}
    parts = Parts(
        config(run={"directory": str(tmp_path)}, engine={"replicas": replicas}, upstream={"vendor": vendor}),
        learn=False,
    )
    told = {name: {"cost": 0.0, "served": 1, "mistake": "", "budget": 0.0} for name in ("a", "b")}
    asked, stored = [], {}

    def status():
        return [{"source": name, "upstreams": {"vendor": dict(one)}} for name, one in told.items()]

    def recall():
        asked.append("recall")
        for one in told.values():
            one["budget"] = 0.0
        return status()

    def grant(budgets):
        asked.append(budgets["vendor"])
        for one in told.values():
            one["budget"] += budgets["vendor"]

    parts.engine = SimpleNamespace(status=status, recall_budgets=recall, grant_budgets=grant)
    parts.store = SimpleNamespace(costs=SimpleNamespace(remote=lambda: {"vendor": stored}))
    parts.step, parts.learners = 0, None
    return parts, told, asked, stored


def spend(told, name, dollars):
    told[name]["cost"] += dollars
    told[name]["budget"] -= dollars


def test_max_cost_is_dealt_out_to_the_replicas(tmp_path, monkeypatch):
    monkeypatch.setattr("raygent.cluster.parts.ray", SimpleNamespace(get=lambda value: value))
    parts, told, asked, stored = limited(tmp_path)
    parts.check_upstreams()
    assert asked == ["recall", 4.0]
    spend(told, "a", 3.0)
    parts.check_upstreams()
    assert asked == ["recall", 4.0]  # there is enough
    spend(told, "a", 1.0)
    parts.check_upstreams()
    assert asked[2:] == ["recall", 2.0]
    spend(told, "b", 1.0)
    del told["b"]  # killed: the driver knows of nothing that it spent, the store does
    stored["b"] = 1.0
    spend(told, "a", 2.0)
    parts.check_upstreams()
    assert asked[4:] == ["recall"]  # b may be spending yet
    told["c"] = {"cost": 0.0, "served": 0, "mistake": "", "budget": 0.0}
    parts.check_upstreams()
    assert asked[5:] == ["recall", 0.5]
    spend(told, "c", 1.5)
    with pytest.raises(ConfigError, match=r"has spent 8\.5 of 8 dollars"):
        parts.check_upstreams()


# errors of the engine


@pytest.fixture
def asked(cluster, monkeypatch):
    """What a handle makes of what replicas, real actors, answer: asked("refuses dies") of two. Serve alone is left out."""

    @ray.remote(num_cpus=0)
    class Replica:
        def answers(self):
            return 1

        def refuses(self):
            raise ValueError("in the middle of it\nthe adapter has rank 16")

        def breaks_off(self):
            raise EngineUnavailable("the weights have not arrived")

        def dies(self):
            os._exit(1)

    class Broadcast:
        def broadcast(self, methods):
            self.waiting = [getattr(Replica.remote(), method).remote() for method in methods.split()]
            return self

        def results(self, timeout_s, return_exceptions=False):
            found = []
            for one in self.waiting:
                try:
                    found.append(ray.get(one))
                except RayError as error:
                    if not return_exceptions:
                        raise
                    found.append(error)
            return found

    monkeypatch.setattr("raygent.actors.engine_handle.serve.get_deployment_handle", lambda *_: Broadcast())
    return EngineHandle("app", "http://h").broadcast


def test_what_a_replica_raises_is_not_a_replica_that_is_gone(asked):
    assert asked("answers answers") == [1, 1]
    with pytest.raises(EngineFailed, match=r"refuses answers: the adapter has rank 16$"):
        asked("refuses answers")
    for methods in ("dies", "refuses dies", "refuses breaks_off", "answers breaks_off"):
        with pytest.raises(EngineUnavailable):
            asked(methods)


@pytest.fixture
def pushing(parts, monkeypatch):
    """Parts whose learners' push raises what `errors` has, one after the other; `sources` are there."""
    monkeypatch.setattr("raygent.cluster.parts.time.sleep", lambda _: None)
    errors, sources, pushed = [], {"a", "b"}, []

    def push(engine, version):
        pushed.append(version)
        if errors and (error := errors.pop(0)):
            if isinstance(error, EngineFailed) and "another" in str(error):
                sources.symmetric_difference_update({"b", "c"})  # killed and replaced
            raise error
        return {"push_bytes": 1.0}

    parts.learners = SimpleNamespace(push=push)
    parts.engine = SimpleNamespace(status=lambda: [{"source": one, "version": 1} for one in sources])
    return parts, errors, pushed


def test_a_push_waits_for_a_replica_that_is_gone(pushing):
    parts, errors, pushed = pushing
    errors += [EngineUnavailable("gone"), EngineFailed("update: another receiver closed the connection")]
    assert parts.push() == {"push_bytes": 1.0} and pushed == [2, 2, 2]


@pytest.mark.parametrize("push", [Parts.push, Parts.heal])
def test_a_push_that_a_replica_refuses_is_not_made_again(pushing, push):
    parts, errors, pushed = pushing
    errors.append(EngineFailed("ray::Replica\n  File ...\nValueError: rank 16 is greater than 8"))
    with pytest.raises(EngineFailed, match=r"^ValueError: rank 16 is greater than 8$"):
        push(parts)
    assert len(pushed) == 1


@pytest.mark.parametrize(("deaths", "starts"), [(0, 1), (2, 3), (MOST_RESTARTS + 1, MOST_RESTARTS)])
def test_learners_that_die_as_they_start_are_started_once_more(parts, monkeypatch, deaths, starts):
    """Within the bound of all restarts from one checkpoint."""
    left, pushed = [LearnerLost("a rank died in start")] * deaths, []

    def restart(checkpoint):
        started.append(checkpoint)
        if left:
            raise left.pop()

    started: list[None] = []
    parts.learners, parts.critic, parts.reference = SimpleNamespace(restart=restart), None, None
    parts.store = SimpleNamespace(rewind=SimpleNamespace(remote=lambda step: step))
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    monkeypatch.setattr(parts, "push", lambda: pushed.append(parts.step))
    if deaths > MOST_RESTARTS:
        with pytest.raises(RuntimeError, match=f"the learners died {MOST_RESTARTS} times between step 0"):
            parts.restart_learners()
    else:
        parts.restart_learners()
    assert len(started) == starts and len(pushed) == (deaths <= MOST_RESTARTS)
