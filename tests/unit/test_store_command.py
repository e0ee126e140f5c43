"""`raygent store inspect|verify` on real stores: one that goes on, one that was killed, one that was closed, damaged ones."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import calls, crash, open_store, rollout, run_attempt

from raygent.actors.store_tables import read_parquet, write_parquet
from raygent.cli import main
from raygent.jobs import store as store_job
from raygent.jobs.store import verify
from raygent.records import ENDED, INFRASTRUCTURE, OUTCOMES, SCHEMAS, SPANS, Span, to_batch


@pytest.fixture(autouse=True)
def own_environment():
    """The command sets variables."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def ask(capsys, what: str, run: Path) -> tuple[int, str]:
    """Exit code and output of `raygent store WHAT RUN`, which changes nothing."""
    before = files_of(run)
    code = main(["store", what, str(run)])
    assert files_of(run) == before
    return code, capsys.readouterr().out


async def half_run(run: Path):
    """A store of two steps: three attempts sealed, of which two are rolled; one with a call, running."""
    store = open_store(run / "store")
    await store.add_rollouts([rollout(n, step=n // 2) for n in range(5)])
    leases = await store.lease("w", 4)
    for lease in leases[:2]:
        await run_attempt(store, lease)
    await store.roll()
    await run_attempt(store, leases[2], outcome="timeout", reward=0.0)
    await store.append("calls", calls(leases[3].rollout.rollout_id, 1, 0))
    return store


async def test_a_store_that_goes_on_that_was_killed_and_that_was_closed(tmp_path, capsys):
    run = tmp_path / "run"
    store = await half_run(run)
    going_on = ask(capsys, "inspect", run), ask(capsys, "verify", run)
    crash(store)
    killed = ask(capsys, "inspect", run), ask(capsys, "verify", run)
    assert going_on == killed
    (code, told), (verified, found) = killed
    assert (code, verified) == (0, 0) and found.strip().endswith("whole")
    assert "calls            4 rows in 1 Parquet files" in told
    assert "rollouts, log and Parquet: 5: 2 succeeded, 1 failed, 1 running, 1 queued" in told
    assert "attempts, log and Parquet: 4: 2 succeeded, 1 timeout, 1 running" in told
    store = open_store(run / "store")
    await store.append("spans", to_batch(SPANS, [Span("r3", 1, "w", 0, "note", "n", "{}", 0.0, 1.0)]))
    await store.close()
    code, told = ask(capsys, "inspect", run)
    assert code == 0 and "calls            6 rows in 2 Parquet files" in told
    assert ask(capsys, "verify", run)[0] == 0


async def test_a_roll_that_was_cut_short_does_not_count(tmp_path, capsys):
    store = await half_run(tmp_path)
    crash(store)
    write_parquet(tmp_path / "store/calls/train-000001-0-000002.parquet", pa.table({"a": [1]}))
    assert ask(capsys, "verify", tmp_path)[0] == 0


async def test_a_torn_tail_is_no_damage(tmp_path, capsys):
    store = await half_run(tmp_path)
    log = store.log.path
    crash(store)
    log.write_bytes(log.read_bytes()[:-3])
    code, told = ask(capsys, "verify", tmp_path)
    assert (code, told.strip().endswith("whole")) == (0, True)


async def test_a_store_that_works_and_rolls_meanwhile_is_whole_at_every_look(tmp_path, capsys):
    async def work() -> None:
        store = open_store(tmp_path / "store")
        for step in range(9):
            await store.add_rollouts([rollout(4 * step + n, step=step) for n in range(4)])
            kept, lost, *_ = leases = await store.lease("w", 4)
            await run_attempt(store, kept)
            await run_attempt(store, lost, outcome="engine_lost", reward=None)
            for lease in leases[2:]:
                await store.append("calls", calls(lease.rollout.rollout_id, lease.attempt, 0, 1))
            await store.cancel([lease.rollout.rollout_id for lease in leases[2:3]])
            await store.roll()
            if step % 4 == 3:
                await store.rewind(step - 2)
                crash(store)
                store = open_store(tmp_path / "store")
        await store.close()

    working = asyncio.create_task(work())
    await asyncio.sleep(0.05)
    looks = 0
    while not working.done():
        assert await asyncio.to_thread(verify, tmp_path) == 0, capsys.readouterr().out
        looks += 1
    await working
    assert looks > 3 and verify(tmp_path) == 0


@pytest.mark.parametrize(
    "looks, code, said",
    [
        ([["passing"], []], 0, "whole"),
        ([["passing"], ["real"], ["real", "passing"]], 1, "damaged: real\n4 rows: damaged"),
        ([["1"], ["2"], ["3"], ["4"], ["5"]], 1, "unsure: 5\n4 rows: each of 5 looks found something else"),
    ],
    ids=["passing", "real", "restless"],
)
def test_a_fault_is_what_two_looks_agree_on(tmp_path, capsys, monkeypatch, looks, code, said):
    left = iter(looks)
    monkeypatch.setattr(store_job, "_look", lambda folder: (next(left), "4 rows"))
    assert verify(tmp_path) == code
    assert said in capsys.readouterr().out and not list(left)


async def closed_run(run: Path) -> None:
    store = await half_run(run)
    await store.close()


@pytest.mark.parametrize("table", ["calls", "rewards", "attempts", "rollouts"])
async def test_a_flipped_byte_of_a_parquet_file_is_named(tmp_path, capsys, table):
    await closed_run(tmp_path)
    path = sorted((tmp_path / "store" / table).glob("*.parquet"))[0]
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        code, told = ask(capsys, "verify", tmp_path)
        assert code == 1 and str(path) in told, (place, told)
    path.write_bytes(whole)
    assert ask(capsys, "verify", tmp_path)[0] == 0


async def test_a_flipped_byte_of_the_log_is_named(tmp_path, capsys):
    store = await half_run(tmp_path)
    log, safe = store.log.path, store.log.durable
    crash(store)
    whole = log.read_bytes()
    for place in range(0, safe, 97):
        log.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        for what in ("verify", "inspect"):
            code, told = ask(capsys, what, tmp_path)
            assert code == 1 and str(log) in told, (place, told)


@pytest.mark.parametrize("table", ["calls", "rewards", "attempts", "rollouts"])
async def test_a_missing_file_is_named(tmp_path, capsys, table):
    await closed_run(tmp_path)
    path = sorted((tmp_path / "store" / table).glob("*.parquet"))[0]
    path.unlink()
    code, told = ask(capsys, "verify", tmp_path)
    assert code == 1 and f"{path}: damaged at byte 0: the file is missing" in told


async def test_a_missing_record_is_named(tmp_path, capsys):
    """A file that is whole in itself and lacks a row that an attempt counts."""
    await closed_run(tmp_path)
    path = sorted((tmp_path / "store/calls").glob("train-000000-*.parquet"))[0]
    rows = read_parquet(path)
    write_parquet(path, rows.slice(1))
    code, told = ask(capsys, "verify", tmp_path)
    assert code == 1 and "store/calls/train-000000-*.parquet and log: 1 of the 2 calls of attempt 1 of r0" in told
    write_parquet(path, pa.concat_tables([rows, rows.slice(0, 1)]))
    code, told = ask(capsys, "verify", tmp_path)
    assert code == 1 and "of attempt 1 of r0" in told


async def test_a_winner_without_a_row_is_named(tmp_path, capsys):
    await closed_run(tmp_path)
    path = sorted((tmp_path / "store/attempts").glob("train-000000-*.parquet"))[0]
    write_parquet(path, read_parquet(path).slice(1))
    code, told = ask(capsys, "verify", tmp_path)
    assert code == 1 and "r0 was won by attempt 1, of which there is no such row" in told
    assert "a record of attempt 1 of r0, which no table knows" in told


async def test_other_readers_read_what_the_docs_say(tmp_path):
    """docs/store.md: pyarrow, and pandas behind it, read a table's folder alone."""
    await closed_run(tmp_path)
    rollouts = pq.read_table(tmp_path / "store/rollouts").to_pandas()
    found = pq.read_table(tmp_path / "store/calls").to_pandas()
    won = rollouts.merge(found, left_on=["rollout_id", "winning_attempt"], right_on=["rollout_id", "attempt"])
    assert sorted(won["rollout_id"]) == ["r0", "r0", "r1", "r1", "r2", "r2"]
    assert (won["response_token_ids"].str.len() == won["logprobs"].str.len()).all()


def test_every_column_and_outcome_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    columns = {name for schema in SCHEMAS.values() for name in schema.names}
    assert [word for word in (*columns, *OUTCOMES, *INFRASTRUCTURE, *ENDED) if f"`{word}`" not in text] == []
