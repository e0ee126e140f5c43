"""What the store says and keeps, call by call, against real files; test_store_recovery.py kills it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from stores import call, calls, crash, open_store, rollout, rows_on_disk, run_attempt, taken

from raygent.actors import replay_store
from raygent.actors.replay_store import AttemptSealed, ReplayStore
from raygent.actors.segments import STATE
from raygent.records import CALLS, REWARDS, SPANS, UPSTREAM, Reward, Rollout, Seal, Span, to_batch, to_json


def keys(leases) -> list[tuple[str, int]]:
    return [(lease.rollout.rollout_id, lease.attempt) for lease in leases]


async def now_and_reopened(store: ReplayStore, folder: Path):
    """The store as it is, after a roll, after a crash, and after it was closed: what is asserted must hold in each."""
    yield store
    await store.roll()
    yield store
    crash(store)
    store = open_store(folder)
    yield store
    await store.close()
    yield open_store(folder)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writes fail, some of them half done."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_every_record_has_its_schema():
    assert set(asdict(call("r", 1, 0))) == set(CALLS.names)
    assert set(asdict(Span("r", 1, "w", 0, "log", "x", "{}", 0.0, 0.0))) == set(SPANS.names)
    assert set(asdict(Reward("r", 1, "w", 0, 0.0))) == set(REWARDS.names)


# the queue


async def test_a_rollout_runs_is_sealed_and_taken(tmp_path):
    store = open_store(tmp_path)
    assert await store.add_rollouts([rollout(n) for n in range(4)]) == 4
    assert await store.add_rollouts([rollout(n) for n in range(5)]) == 1
    leases = await store.lease("w", 3)
    assert keys(leases) == [("r0", 1), ("r2", 1), ("r4", 1)]  # by step, then index
    assert leases[0].rollout == rollout(0)
    assert await run_attempt(store, leases[0]) == "won"
    assert await run_attempt(store, leases[1], outcome="timeout", reward=-1.0) == "won"
    assert await run_attempt(store, leases[2], outcome="engine_lost", reward=None) == "failed"
    assert await store.wait(0, "train", 0.05) == 3
    tables = await taken(store)
    assert [(row["rollout_id"], row["status"], row["outcome"], row["reward"]) for row in tables["rollouts"]] == [
        ("r0", "succeeded", "succeeded", 1.0),
        ("r2", "failed", "timeout", -1.0),
    ]
    assert [(row["rollout_id"], row["sequence"], row["response_token_ids"]) for row in tables["calls"]] == [
        ("r0", 0, [3, 0]), ("r0", 1, [3, 1]), ("r2", 0, [3, 0]), ("r2", 1, [3, 1]),
    ]  # fmt: skip
    assert keys(await store.lease("w", 9)) == [("r4", 2), ("r1", 1), ("r3", 1)]


async def test_the_queue_gives_eval_first_then_older_steps(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0, 1), rollout(1, 1), rollout(2, 0), rollout(3, 5, "eval")])
    crash(store)
    store = open_store(tmp_path)
    assert keys(await store.lease("w", 3)) == [("r3", 1), ("r2", 1), ("r0", 1)]


async def test_wait_returns_when_the_last_rollout_ends(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(1), rollout(2, 1)])
    waiting = asyncio.create_task(store.wait(0, "train", 60))
    for lease in await store.lease("w", 2):
        assert not waiting.done()
        await run_attempt(store, lease)
    assert await asyncio.wait_for(waiting, 5) == 0
    assert await store.wait(1, "train", 0.01) == 1
    assert [row["status"] for row in (await taken(store))["rollouts"]] == ["succeeded"] * 2


async def test_a_lost_lease_is_tried_again_and_a_late_attempt_is_kept_and_never_handed_out(tmp_path):
    store = open_store(tmp_path, lease_s=0.05)
    await store.add_rollouts([rollout(0)])
    await store.lease("slow", 1)
    await asyncio.sleep(0.1)
    (second,) = await store.lease("quick", 1)
    assert second.attempt == 2
    assert await store.heartbeat("slow", [("r0", 1)]) == [("r0", 1)]
    await store.append("calls", calls("r0", 1, 0))  # it has not heard of it yet
    assert await run_attempt(store, second) == "won"
    await store.append("calls", calls("r0", 1, 0, 1))
    assert await store.seal(Seal("r0", 1, "slow", "succeeded", 0.5, {"engine": 2})) == "late"
    async for now in now_and_reopened(store, tmp_path):
        tables = await taken(now)
        assert {row["attempt"] for row in tables["calls"]} == {2} and tables["rollouts"][0]["reward"] == 1.0
        assert await now.seal(Seal("r0", 1, "slow", "succeeded", 0.5, {"engine": 2})) == "late"
    columns = ("attempt", "outcome", "won", "late", "calls")
    assert [[row[name] for name in columns] for row in rows_on_disk(tmp_path, "attempts")] == [
        [1, "succeeded", False, True, 2],
        [2, "succeeded", True, False, 2],
    ]
    assert [row["attempt"] for row in rows_on_disk(tmp_path, "calls")] == [1, 1, 2, 2]


async def test_heartbeats_keep_a_lease_and_the_first_seal_wins_whoever_holds_it(tmp_path):
    store = open_store(tmp_path, lease_s=0.4)
    await store.add_rollouts([rollout(0), rollout(1)])
    first, other = await store.lease("slow", 2)
    for _ in range(6):
        await asyncio.sleep(0.1)
        assert await store.heartbeat("slow", [("r1", 1)]) == []
    assert keys(await store.lease("quick", 2)) == [("r0", 2)]
    assert await store.heartbeat("slow", [("r0", 2)]) == [("r0", 2)]  # the lease of another
    assert await run_attempt(store, first) == "won"
    assert await store.heartbeat("quick", [("r0", 2)]) == [("r0", 2)]
    assert await store.seal(Seal("r0", 2, "quick", "succeeded", 0.0)) == "late"
    assert await run_attempt(store, other) == "won"
    assert (await store.status())["attempts_late"] == 1


async def test_a_rollout_is_lost_after_its_attempts(tmp_path):
    store = open_store(tmp_path, max_attempts=2)
    await store.add_rollouts([rollout(0)])
    for answer in ("queued", "lost"):
        (lease,) = await store.lease("w", 1)
        assert await run_attempt(store, lease, outcome="engine_lost", reward=None) == "failed"
        assert (await store.status())[answer] == 1
    assert await store.lease("w", 1) == []
    tables = await taken(store)
    assert tables["rollouts"][0]["status"] == "lost" and not tables["calls"] and not tables["attempts"]
    assert await store.seal(Seal("r0", 1, "w", "succeeded", 1.0)) == "failed"  # what was sealed stays


async def test_cancel_drops_what_is_open_or_not_trained_and_its_workers_hear_of_it(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n) for n in range(4)])
    leases = {lease.rollout.rollout_id: lease for lease in await store.lease("w", 3)}
    await run_attempt(store, leases["r0"])
    await run_attempt(store, leases["r2"])
    await store.mark_trained(0, ["r0"])
    await store.append("calls", calls("r1", 1, 0))
    await store.cancel(["r0", "r1", "r2", "r3", "r3"])
    assert await store.heartbeat("w", [("r1", 1)]) == [("r1", 1)]
    await store.append("calls", calls("r1", 1, 1))
    assert await store.seal(Seal("r1", 1, "w", "succeeded", 1.0, {"engine": 2})) == "late"
    async for now in now_and_reopened(store, tmp_path):
        tables = await taken(now)
        assert {row["rollout_id"]: row["status"] for row in tables["rollouts"]} == {
            "r0": "succeeded", "r1": "dropped", "r2": "dropped", "r3": "dropped",
        }  # fmt: skip
        assert {row["rollout_id"] for row in tables["calls"]} == {"r0"}
        assert await now.lease("w", 9) == [] and await now.wait(0, "train", 1) == 0
    with pytest.raises(ValueError, match="ever added"):
        await store.cancel(["r9"])


async def test_rewind_frees_the_ids_of_later_steps_and_keeps_what_they_made(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n, step=n) for n in range(5)])
    leases = await store.lease("w", 4)
    for lease in leases[:3]:
        await run_attempt(store, lease)
    await store.append("calls", calls("r3", 1, 0))
    await store.mark_trained(0, ["r0"])
    await store.mark_trained(1, ["r1"])
    await store.rewind(1)
    await store.rewind(1)
    assert await store.heartbeat("w", [("r3", 1)]) == [("r3", 1)]
    async for now in now_and_reopened(store, tmp_path):
        of = [now.state.rollouts[f"r{n}"] for n in range(5)]
        assert [one.trained_step for one in of] == [0, -1, -1, -1, -1]
        assert [one.outcome for one in of] == ["succeeded"] * 2 + ["rewound"] * 3
        assert [len((await taken(now, step))["rollouts"]) for step in range(5)] == [1, 1, 0, 0, 0]
        assert not (await taken(now, 2))["calls"]
    store = now
    assert await store.add_rollouts([rollout(n, step=n) for n in range(4)]) == 2
    leases = await store.lease("w", 9)
    assert keys(leases) == [("r2", 2), ("r3", 2)]
    await store.append("calls", calls("r3", 1, 0, 1))  # the old attempt goes on, and ends first
    assert await store.seal(Seal("r3", 1, "w", "succeeded", 0.0, {"engine": 2})) == "late"
    for lease in leases:
        assert await run_attempt(store, lease, made=3) == "won"
    async for now in now_and_reopened(store, tmp_path):
        for step in (2, 3):
            tables = await taken(now, step)
            assert [(row["attempt"], row["sequence"]) for row in tables["calls"]] == [(2, 0), (2, 1), (2, 2)]
            assert tables["rollouts"][0]["reward"] == 1.0
    attempts = [(r["rollout_id"], r["attempt"], r["won"], r["late"]) for r in rows_on_disk(tmp_path, "attempts")]
    assert attempts[2:] == [
        ("r2", 1, False, True), ("r2", 2, True, False), ("r3", 1, False, True), ("r3", 2, True, False),
    ]  # fmt: skip
    await now.rewind(0)
    with pytest.raises(ValueError, match="another step"):
        await now.add_rollouts([rollout(2, step=7)])


async def test_rewards_before_a_step_are_those_of_ended_train_rollouts_by_group(tmp_path):
    store = open_store(tmp_path, max_attempts=1)
    of = {
        "r0": ("t", "g0"),
        "r1": ("t", "g0"),
        "r2": ("u", "g1"),
        "r3": ("u", "g1"),
        "r4": ("t", "g2"),
        "r5": ("t", "g3"),
    }
    steps = {"r0": 0, "r1": 0, "r2": 0, "r3": 0, "r4": 1, "r5": 2}
    asked = [
        Rollout(name, task, group, "train", steps[name], place, "in")
        for place, (name, (task, group)) in enumerate(of.items())
    ]
    asked += [Rollout(f"e-{mode}", "t", "e", mode, 0, 0, "in") for mode in ("eval", "greedy", "score")]
    await store.add_rollouts(asked)
    rewards = {"r0": 1.0, "r1": -0.5, "r2": 0.25, "r4": 0.0, "r5": 1.0}
    for lease in await store.lease("w", 99):
        name = lease.rollout.rollout_id
        if name in rewards:
            await run_attempt(store, lease, reward=rewards[name], outcome="timeout" if name == "r2" else "succeeded")
        elif name == "r3":
            await run_attempt(store, lease, reward=None, outcome="engine_lost")  # lost: it has no reward
    await store.cancel(["r1"])  # too stale to be trained, but measured
    async for now in now_and_reopened(store, tmp_path):
        assert await now.rewards_before(0) == {}
        assert await now.rewards_before(1) == {"t": [[-0.5, 1.0]], "u": [[0.25]]}
        assert await now.rewards_before(9) == {"t": [[-0.5, 1.0], [0.0], [1.0]], "u": [[0.25]]}
    await now.rewind(1)
    assert await now.rewards_before(9) == {"t": [[-0.5, 1.0], [0.0]], "u": [[0.25]]}


async def test_an_evaluation_drops_only_what_had_not_ended(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n, step=n) for n in range(5)])
    for lease in (await store.lease("w", 4))[:3]:
        await run_attempt(store, lease)
    await store.mark_trained(1, ["r1"])
    await store.rewind(0, keep=True)
    of = [store.state.rollouts[f"r{n}"] for n in range(5)]
    assert [one.outcome for one in of] == ["succeeded"] * 3 + ["rewound"] * 2
    assert [one.trained_step for one in of] == [-1, 1, -1, -1, -1]


@pytest.mark.parametrize("keep", [False, True])
async def test_rewind_drops_what_has_not_ended_for_who_goes_on_asks_again(tmp_path, keep):
    store = open_store(tmp_path)
    asked = [rollout(0), rollout(2), rollout(4)]
    await store.add_rollouts(asked)
    first, _ = await store.lease("w", 2)
    await run_attempt(store, first)
    await store.rewind(0, keep)
    assert await store.lease("w", 9) == []
    assert await store.wait(0, "train", 0) == 0
    assert await store.add_rollouts(asked[:2]) == 1
    assert keys(await store.lease("w", 9)) == [("r2", 2)]
    assert (await store.status())["succeeded"] == 1


async def test_a_rollout_of_another_task_is_done_again(tmp_path):
    """As where tasks_per_step, group_size or the data have changed when a run goes on: no group is of two tasks."""
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(1), rollout(2)])
    for lease in await store.lease("w", 9):
        await run_attempt(store, lease)
    await store.mark_trained(0, ["r2"])
    await store.close()
    now = open_store(tmp_path)
    others = [rollout(0), replace(rollout(1), task_id="other"), replace(rollout(2), task_id="other")]
    assert await now.add_rollouts(others) == 1
    (lease,) = await now.lease("w", 9)
    assert keys([lease]) == [("r1", 2)] and lease.rollout.task_id == "other"
    assert [row["task_id"] for row in (await taken(now, 0))["rollouts"]] == ["t0", "t2"]
    await run_attempt(now, lease, reward=0.25)
    assert [row["reward"] for row in (await taken(now, 0))["rollouts"]] == [1.0, 0.25, 1.0]


async def test_rewind_lets_what_was_lost_in_its_step_be_asked_again(tmp_path):
    store = open_store(tmp_path, max_attempts=1)
    asked = [rollout(0), rollout(2, step=1), rollout(4, step=1)]
    await store.add_rollouts(asked)
    for lease in await store.lease("w", 9):
        await run_attempt(store, lease, outcome="succeeded" if lease.rollout.index else "engine_lost")
    await store.roll()  # its texts are in Parquet alone now
    await store.rewind(1)
    await store.rewind(1)
    assert await store.add_rollouts(asked) == 2  # r0, of a step that is done, stays lost
    leases = await store.lease("w", 9)
    assert keys(leases) == [("r2", 2), ("r4", 2)] and leases[0].rollout == asked[1]
    assert [await run_attempt(store, lease) for lease in leases] == ["won", "won"]


async def test_take_tells_the_last_attempt_of_what_was_lost(tmp_path):
    store = open_store(tmp_path, max_attempts=2)
    await store.add_rollouts([rollout(0), rollout(2)])
    for number in (1, 2):
        for lease in await store.lease("w", 9):
            name, lost = lease.rollout.rollout_id, lease.rollout.rollout_id == "r2"
            if lost:
                seal = Seal(name, lease.attempt, "w", "upstream_lost", None, error=f"HTTP 500, {number}")
                assert await store.seal(seal) == "failed"
            else:
                assert await run_attempt(store, lease) == "won"
    async for now in now_and_reopened(store, tmp_path):
        tables = await taken(now)
        assert [(row["rollout_id"], row["status"]) for row in tables["rollouts"]] == [
            ("r0", "succeeded"),
            ("r2", "lost"),
        ]
        (last,) = tables["lost"]
        assert (last["attempt"], last["outcome"], last["error"]) == (2, "upstream_lost", "HTTP 500, 2")
        assert [row["rollout_id"] for row in tables["attempts"]] == ["r0"]


async def test_a_lease_that_nobody_held_since_the_store_restarted_costs_no_attempt(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(2)])
    await store.lease("w", 2)
    for held in (2, 3):
        crash(store)
        store = open_store(tmp_path, lease_s=0.05, max_attempts=1)
        await store.heartbeat("w", [("r2", 1)])
        await asyncio.sleep(0.1)
        assert keys(await store.lease("w", 9)) == [("r0", held)]
    told = {"attempts_store_restarted": 2, "attempts_lease_lost": 1, "lost": 1, "running": 1}
    assert told.items() <= (await store.status()).items()


async def test_status_counts_what_there_is(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n) for n in range(6)])
    first, second, third, _ = await store.lease("w", 4)
    await run_attempt(store, first)
    await run_attempt(store, second, outcome="timeout", reward=-1.0)
    await run_attempt(store, third, outcome="engine_lost", reward=None)
    await store.mark_trained(0, ["r0", "r2"])
    told = {"asked": 6, "queued": 3, "running": 1, "succeeded": 1, "failed": 1, "lost": 0, "dropped": 0, "trained": 2}
    told |= {"failed_timeout": 1, "attempts": 4, "retried": 1, "attempts_engine_lost": 1, "attempts_running": 1}
    assert told.items() <= (await store.status()).items() and (await store.status())["workers"] == 1
    async for now in now_and_reopened(store, tmp_path):
        assert told.items() <= (await now.status()).items()


# what is recorded


async def test_appends_and_seals_are_idempotent_and_a_gap_fails_the_attempt(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0)])
    await store.lease("w", 1)
    for _ in range(2):
        await store.append("calls", calls("r0", 1, 0, 2, 0))
    seal = Seal("r0", 1, "w", "succeeded", 1.0, {"engine": 3})
    assert await store.seal(seal) == "failed"
    assert await store.seal(replace(seal, outcome="timeout")) == "failed"
    (lease,) = await store.lease("w", 1)
    assert lease.attempt == 2
    assert await run_attempt(store, lease) == "won"
    assert await run_attempt(store, lease) == "won"
    tables = await taken(store)
    assert len(tables["calls"]) == 2 and tables["rollouts"][0]["attempts"] == 2
    await store.close()
    (incomplete, _) = rows_on_disk(tmp_path, "attempts")
    assert (incomplete["outcome"], incomplete["calls"]) == ("incomplete", 2)
    assert incomplete["error"] == "1 of 3 calls of engine are missing, the first is number 1"


async def test_what_is_sealed_takes_nothing_new_and_passes_over_what_it_has(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(1)])
    first, _ = await store.lease("w", 2)
    await run_attempt(store, first)
    async for now in now_and_reopened(store, tmp_path):
        await now.append("calls", calls("r0", 1, 1, 0))
        with pytest.raises(AttemptSealed, match="r0"):
            await now.append("calls", calls("r0", 1, 2))
        mixed = pa.concat_batches([calls("r0", 1, 2), calls("r1", 1, 0)])
        with pytest.raises(AttemptSealed):
            await now.append("calls", mixed)
        assert [(await taken(now))["attempts"][0][name] for name in ("calls", "rewards")] == [2, 1]
    assert len(rows_on_disk(tmp_path, "calls")) == 2
    assert await now.seal(Seal("r1", 1, "w", "succeeded", 1.0, {"engine": 1})) == "won"


async def test_what_makes_no_sense_is_refused(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0)])
    with pytest.raises(ValueError, match="never leased"):
        await store.append("calls", calls("r0", 1, 0))
    with pytest.raises(ValueError, match="never leased"):
        await store.seal(Seal("r0", 1, "w", "succeeded", 1.0))
    with pytest.raises(ValueError, match="ever added"):
        await store.seal(Seal("r1", 1, "w", "succeeded", 1.0))
    await store.lease("w", 1)
    with pytest.raises(ValueError, match="outcome"):
        await store.seal(Seal("r0", 1, "w", "great", 1.0))
    for table, batch in (("rollouts", calls("r0", 1, 0)), ("rewards", calls("r0", 1, 0))):
        with pytest.raises(ValueError, match="SCHEMAS"):
            await store.append(table, batch)
    size = store.log.size
    await store.append("calls", calls("r0", 1))
    assert store.log.size == size


async def test_records_of_several_sources_are_numbered_as_they_come(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0)])
    await store.lease("w", 1)
    await store.append("calls", calls("r0", 1, 1, source="b"))
    await store.append("calls", calls("r0", 1, 0, 1, source="a"))
    await store.append("calls", calls("r0", 1, 0, source="b"))
    assert await store.seal(Seal("r0", 1, "w", "succeeded", 1.0, {"a": 2, "b": 2})) == "won"
    async for now in now_and_reopened(store, tmp_path):
        found = [(row["sequence"], row["source"], row["source_sequence"]) for row in (await taken(now))["calls"]]
        assert found == [(0, "b", 1), (1, "a", 0), (2, "a", 1), (3, "b", 0)]


def test_numbers_that_json_lacks_are_told_as_otlp_does():
    value = {"loss": float("nan"), "most": [float("inf"), -float("inf")], "text": "NaN \ud800", "n": 10**30, "x": 0.1}
    assert json.loads(to_json(value), parse_constant=lambda name: pytest.fail(name)) == {
        "loss": "NaN", "most": ["Infinity", "-Infinity"], "text": "NaN \ud800", "n": 10**30, "x": 0.1,
    }  # fmt: skip


async def test_a_text_that_utf8_cannot_say_is_kept_as_json_writes_it(tmp_path):
    """A lone surrogate, as models and broken files make them."""
    store = open_store(tmp_path)
    task = {"q": "\ud800", "\udfff": "ä"}
    await store.add_rollouts([replace(rollout(0), task_id="t\ud800", input=task)])
    (lease,) = await store.lease("w", 1)
    assert lease.rollout.input == task
    attributes = to_json({"said": "\ud800", "deep": "\\\ud800"})
    assert json.loads(attributes) == {"said": "\ud800", "deep": "\\\ud800"}
    records = {
        "calls": to_batch(CALLS, [call("r0", 1, 0, text='"\ud800"')]),
        "spans": to_batch(SPANS, [Span("r0", 1, "w", 0, "note", "n\ud800", attributes, 0.0, 1.0)]),
    }
    assert await store.seal(Seal("r0", 1, "w", "agent_error", 0.0, {"engine": 1}, error="no \ud800"), records) == "won"
    async for now in now_and_reopened(store, tmp_path):
        tables = await taken(now)
        assert tables["rollouts"][0]["task_id"] == r"t\ud800" and json.loads(tables["rollouts"][0]["input"]) == task
        assert tables["attempts"][0]["error"] == r"no \ud800" and tables["calls"][0]["request"] == r'"\ud800"'
    (span,) = rows_on_disk(tmp_path, "spans")
    assert (span["name"], span["attributes"]) == (r"n\ud800", attributes)


@pytest.mark.parametrize("value", [[[]], {(1, 2): 3}, 10**5000], ids=["deep", "key", "huge"])
def test_what_cannot_be_json_is_recorded_as_such(value):
    for _ in range(3000 if value == [[]] else 0):
        value = [value]
    assert list(json.loads(to_json({"value": value}))) == ["not_json"]


async def test_a_change_that_is_no_json_is_refused_and_changes_nothing(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0)])
    (lease,) = await store.lease("w", 1)
    before = await store.status()
    for reward in (float("nan"), Path("1.0")):
        with pytest.raises((TypeError, ValueError)):
            await store.seal(Seal("r0", 1, "w", "succeeded", reward))  # type: ignore[arg-type]
        assert await store.status() == before
    assert await run_attempt(store, lease) == "won"


# disk


async def test_rolling_keeps_every_row_and_goes_on(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n, step=n // 2) for n in range(6)])
    leases = await store.lease("w", 4)
    for lease in leases[:3]:
        await run_attempt(store, lease)
    await store.append("calls", calls("r3", 1, 0))
    before = [await taken(store, step) for step in (0, 1)]
    async for now in now_and_reopened(store, tmp_path):
        assert [await taken(now, step) for step in (0, 1)] == before
        assert await now.add_rollouts([rollout(0)]) == 0
    store = now
    await store.mark_trained(0, ["r0", "r1"])  # their texts are in Parquet alone by now
    await store.append("calls", calls("r3", 1, 0, 1))
    await store.roll()
    on_disk = {row["rollout_id"]: row for row in rows_on_disk(tmp_path, "rollouts")}
    assert [on_disk[f"r{n}"]["trained_step"] for n in range(3)] == [0, 0, -1]
    assert [on_disk[f"r{n}"]["input"] for n in range(6)] == [f'{{"q":{n}}}' for n in range(6)]
    assert await store.seal(Seal("r3", 1, "w", "succeeded", 1.0, {"engine": 2})) == "won"
    assert len((await taken(store, 1))["calls"]) == 4
    assert keys(await store.lease("w", 9)) == [("r4", 1), ("r5", 1)]
    assert len(list((tmp_path / "log").glob("*.log"))) == 1


async def test_memory_lets_go_of_texts_once_they_are_in_parquet(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n) for n in range(4)])
    for lease in await store.lease("w", 3):
        outcome = "engine_lost" if lease.rollout.rollout_id == "r2" else "timeout"
        seal = Seal(lease.rollout.rollout_id, 1, "w", outcome, None, error=f"why {lease.rollout.rollout_id}")
        await store.seal(seal)
    async for now in now_and_reopened(store, tmp_path):
        assert [row["error"] for row in (await taken(now))["attempts"]] == ["why r0", "why r1"]
        await now.mark_trained(0, ["r0"])  # so that its step is written anew
    assert [row["error"] for row in rows_on_disk(tmp_path, "attempts")] == ["why r0", "why r1", "why r2"]
    assert {attempt.error for attempt in now.state.attempts.values()} == {None}
    await now.mark_trained(1, ["r0"])
    await now.seal(Seal((await now.lease("w", 1))[0].rollout.rollout_id, 2, "w", "succeeded", 1.0, error="again"))
    await now.close()
    assert {attempt.error for attempt in now.state.attempts.values()} == {None}
    assert [row["error"] for row in rows_on_disk(tmp_path, "attempts")] == ["why r0", "why r1", "why r2", "again"]


async def test_records_of_an_attempt_that_lost_its_lease_between_rolls_are_all_there(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(1)])
    await store.lease("w", 2)
    await store.append("calls", calls("r0", 1, 0))
    store.leases, store.next_expiry = dict.fromkeys(store.leases, 0.0), 0.0
    assert await store.wait(0, "train", 0) == 2
    assert not store.leases
    await store.append("calls", calls("r0", 1, 1))
    await store.roll()  # calls 0 and 1 are in Parquet
    await store.append("calls", calls("r0", 1, 1, 2))
    crash(store)
    store = open_store(tmp_path)
    await store.append("calls", calls("r0", 1, 0, 2, 3))
    rolling = asyncio.create_task(store.roll())
    await asyncio.sleep(0)
    await store.append("calls", calls("r0", 1, 3, 4))
    assert await store.seal(Seal("r0", 1, "w", "succeeded", 1.0, {"engine": 5})) == "won"
    await rolling
    async for now in now_and_reopened(store, tmp_path):
        assert [row["source_sequence"] for row in (await taken(now))["calls"]] == [0, 1, 2, 3, 4]
    assert [row["sequence"] for row in rows_on_disk(tmp_path, "calls")] == [0, 1, 2, 3, 4]


async def test_rolls_beside_writers_lose_and_double_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_store, "SEGMENT_BYTES", 20_000)  # so that it rolls by itself, too
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n, step=n % 3) for n in range(60)])
    done = False

    async def worker(name: str) -> None:
        while leases := await store.lease(name, 2):
            assert await asyncio.gather(*(run_attempt(store, lease, made=4) for lease in leases)) == ["won"] * len(
                leases
            )

    async def roller() -> None:
        while not done:
            await store.roll()
            await asyncio.sleep(0.001)

    rolling = asyncio.create_task(roller())
    await asyncio.gather(*(worker(f"w{n}") for n in range(8)))
    done = True
    await rolling
    before = [await taken(store, step) for step in range(3)]
    assert [len(tables["calls"]) for tables in before] == [80] * 3
    assert store.log.number > 3
    crash(store)
    store = open_store(tmp_path)
    assert [await taken(store, step) for step in range(3)] == before
    await store.close()
    found = [(row["rollout_id"], row["sequence"]) for row in rows_on_disk(tmp_path, "calls")]
    assert found == sorted((f"r{n}", number) for n in range(60) for number in range(4))


async def test_a_roll_that_finds_the_disk_full_is_made_up_for_by_the_next(tmp_path):
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(n, step=n // 4) for n in range(8)])
    leases = await store.lease("w", 8)
    for lease in leases[:6]:
        await run_attempt(store, lease, made=3)
    before = [await taken(store, step) for step in (0, 1)]
    running, failed = leases[6].rollout.rollout_id, 0
    for limit in range(1_500, 100_000, 1_500):  # at another byte each time
        try:
            with full_disk(limit):
                await store.roll()
            break
        except OSError:
            await store.append("calls", calls(running, 1, failed))
            failed += 1
            assert [await taken(store, step) for step in (0, 1)] == before
    assert failed > 5
    crash(store)
    store = open_store(tmp_path)
    assert [await taken(store, step) for step in (0, 1)] == before
    assert await store.seal(Seal(running, 1, "w", "succeeded", 1.0, {"engine": failed})) == "won"
    await store.close()
    made = {lease.rollout.rollout_id: 3 for lease in leases[:6]} | {running: failed}
    found = [(row["rollout_id"], row["sequence"]) for row in rows_on_disk(tmp_path, "calls")]
    assert found == sorted((name, number) for name, count in made.items() for number in range(count))


async def test_a_full_disk_is_told_and_changes_nothing(tmp_path):
    store = open_store(tmp_path, lease_s=0.5)
    await store.add_rollouts([rollout(n) for n in range(4)])
    (lease,) = await store.lease("w", 1)
    await store.append("calls", calls("r0", 1, 0))
    before, size = await store.status(), store.log.size
    for room in (0, 7, 25, 60):  # bytes of a frame that still fit
        with full_disk(size + room):
            for asked in (
                lambda: store.append("calls", calls("r0", 1, 1)),
                lambda: store.seal(Seal("r0", 1, "w", "succeeded", 1.0, {"engine": 1})),
                lambda: store.lease("w", 3),
                lambda: store.cancel(["r0", "r1"]),
                lambda: store.add_rollouts([rollout(9)]),
                lambda: store.mark_trained(0, ["r0"]),
            ):
                with pytest.raises(OSError):
                    await asked()
                assert await store.status() == before and store.log.path.stat().st_size == size
    await asyncio.sleep(0.5)
    with full_disk(size), pytest.raises(OSError):
        await store.wait(0, "train", 1)  # can't note the lost lease
    await store.heartbeat("w", [("r0", 1)])
    assert await run_attempt(store, lease) == "won"
    assert keys(await store.lease("w", 9)) == [("r2", 1), ("r1", 1), ("r3", 1)]
    async for now in now_and_reopened(store, tmp_path):
        assert len((await taken(now))["calls"]) == 2


async def test_nothing_is_acknowledged_after_a_failed_fsync(tmp_path):
    left: list[int] = []
    store = open_store(tmp_path, leave=left.append)
    await store.add_rollouts([rollout(n) for n in range(4)])
    *_, last = await store.lease("w", 4)
    await run_attempt(store, last)
    unsynced = os.dup(store.log.fd)
    read_end, write_end = os.pipe()
    os.dup2(write_end, store.log.fd)  # takes what is written, but cannot be synced
    seals = [Seal(name, 1, "w", "succeeded", 1.0) for name in ("r1", "r2")]
    answers = await asyncio.gather(*map(store.seal, seals), return_exceptions=True)
    assert [type(answer) for answer in answers] == [OSError, OSError]
    assert left == [1, 1]
    os.dup2(unsynced, store.log.fd)  # a second fsync would succeed, and prove nothing
    asked = [store.seal(seals[0]), store.append("calls", calls("r0", 1, 0)), store.take(0, "train"), store.roll()]
    for asking in [*asked, store.wait(0, "train", 0)]:
        with pytest.raises(OSError, match="fsync failed"):
            await asking
    crash(store)
    store = open_store(tmp_path)
    status = await store.status()
    assert (status["succeeded"], status["running"]) == (1, 3)
    for descriptor in (unsynced, read_end, write_end):
        os.close(descriptor)


@pytest.mark.parametrize("fails", ["fdatasync", "rename"])
async def test_a_roll_that_breaks_the_log_ends_the_process(tmp_path, monkeypatch, fails):
    left: list[int] = []
    store = open_store(tmp_path, leave=left.append)
    await store.add_rollouts([rollout(0)])

    def fail(*_: Any) -> None:
        raise OSError(fails)

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match=fails):
        await store.roll()
    monkeypatch.undo()
    assert left == [1]
    crash(store)
    store = open_store(tmp_path)
    assert keys(await store.lease("w", 1)) == [("r0", 1)]
    await store.close()


async def test_a_half_frame_that_cannot_be_taken_back_is_never_written_behind(tmp_path):
    left: list[int] = []
    store = open_store(tmp_path, leave=left.append)
    await store.add_rollouts([rollout(0)])
    await store.lease("w", 1)
    kept, full = os.dup(store.log.fd), os.open("/dev/full", os.O_WRONLY)  # no space, and no truncate
    os.dup2(full, store.log.fd)
    with pytest.raises(OSError):
        await store.append("calls", calls("r0", 1, 0))
    assert left == [1]
    os.dup2(kept, store.log.fd)
    with pytest.raises(OSError, match="half a frame"):
        await store.append("calls", calls("r0", 1, 0))
    crash(store)
    store = open_store(tmp_path)
    await store.append("calls", calls("r0", 1, 0))
    assert await store.seal(Seal("r0", 1, "w", "succeeded", 1.0, {"engine": 1})) == "won"
    for descriptor in (kept, full):
        os.close(descriptor)


async def test_an_append_that_fails_does_not_hide_that_an_fsync_failed(tmp_path, monkeypatch):
    log = open_store(tmp_path).log

    def fail(*_: Any) -> None:
        raise OSError("no")

    def fail_beside_a_sync(*_: Any) -> None:
        with pytest.raises(OSError, match="no"):
            log.sync()
        fail()

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(os, "writev", fail_beside_a_sync)
    with pytest.raises(OSError, match="no"):
        log.append(STATE, b"{}")
    monkeypatch.undo()
    with pytest.raises(OSError, match="fsync failed"):
        log.append(STATE, b"{}")


async def test_one_process_has_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_store, "LOCK_WAIT_S", 0.1)
    store = open_store(tmp_path)
    with pytest.raises(BlockingIOError):
        open_store(tmp_path)
    await store.close()
    with pytest.raises(OSError, match="closed"):
        await store.add_rollouts([rollout(0)])
    await open_store(tmp_path).close()


async def test_what_was_said_is_left_out_where_nobody_reads_it(tmp_path):
    """Of calls that are held and of those in Parquet."""
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(1)])
    for lease in await store.lease("w", 2):
        await run_attempt(store, lease, made=2)
        await store.roll()
    whole, short = [(await store.take(0, "train", texts=texts))["calls"] for texts in (True, False)]
    assert set(whole.column_names) - set(short.column_names) == {"request", "response", "sampling"}
    assert len(short) == 4 and short.equals(whole.select(short.column_names))
    await store.close()


async def test_what_upstreams_have_cost(tmp_path):
    """Of all attempts: won, lost, still running, and rewound."""
    store = open_store(tmp_path)
    await store.add_rollouts([rollout(0), rollout(1), rollout(2, step=1)])
    assert await store.costs() == {}
    one, other, rewound = await store.lease("w", 3)

    def priced(lease, number, name, cost, source="engine"):
        made = call(lease.rollout.rollout_id, lease.attempt, number, source)
        return to_batch(CALLS, [replace(made, policy=name, cost=cost)])

    await run_attempt(store, one, made=1)
    judge = UPSTREAM + "judge"
    for lease, number, name, cost, source in (
        (other, 0, judge, 0.5, "a"),
        (other, 1, judge, 0.25, "a"),
        (other, 1, judge, 0.25, "a"),  # sent again
        (rewound, 0, judge, 2.0, "b"),
        (rewound, 1, UPSTREAM + "planner", 1.0, "b"),
    ):
        await store.append("calls", priced(lease, number, name, cost, source))
    await store.seal(Seal(rewound.rollout.rollout_id, rewound.attempt, "w", "upstream_lost", None))
    await store.rewind(0)
    async for now in now_and_reopened(store, tmp_path):
        assert await now.costs() == {"judge": {"a": 0.75, "b": 2.0}, "planner": {"b": 1.0}}
