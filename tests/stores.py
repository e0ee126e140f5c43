"""What the tests of the replay store share: rollouts, records, one whole attempt, a crash, and the tables as rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raygent.actors.replay_store import ReplayStore
from raygent.records import CALLS, REWARDS, SCHEMAS, Call, Lease, Mode, Reward, Rollout, Seal, to_batch


def open_store(folder: Path, lease_s: float = 1000, max_attempts: int = 3, **rest: Any) -> ReplayStore:
    return ReplayStore(str(folder), lease_s, max_attempts, **rest)


def crash(store: ReplayStore) -> None:
    """What a kill leaves of the store: nothing is flushed, rolled or told."""
    store.log.close()
    os.close(store.lock)


def rollout(number: int, step: int = 0, mode: Mode = "train") -> Rollout:
    return Rollout(
        f"r{number}", f"t{number}", f"g{number // 2}", mode, step, number % 2, {"q": number}, {"gold": number}
    )


def call(rollout_id: str, attempt: int, number: int, source: str = "engine", text: str = "{}") -> Call:
    return Call(
        rollout_id, attempt, source, number, f"req{number}", 0, "agent", "policy", "chat", text, [1, 2], [3, number],
        [-0.5, -1.0], [0, 1], "{}", 1.0, "stop", True, "", 0, float(number), float(number) + 1,
    )  # fmt: skip


def calls(rollout_id: str, attempt: int, *numbers: int, source: str = "engine") -> pa.RecordBatch:
    return to_batch(CALLS, [call(rollout_id, attempt, number, source) for number in numbers])


async def run_attempt(
    store: ReplayStore, lease: Lease, made: int = 2, outcome: str = "succeeded", reward: float | None = 1.0
) -> str:
    """An attempt of `made` calls and a reward, sealed: what the store says to it."""
    name, attempt = lease.rollout.rollout_id, lease.attempt
    for number in range(made):
        await store.append("calls", calls(name, attempt, number))
    await store.append("rewards", to_batch(REWARDS, [Reward(name, attempt, "w", 0, reward or 0.0)]))
    return await store.seal(Seal(name, attempt, "w", outcome, reward, {"engine": made}, {}, {"w": 1}))


async def taken(store: ReplayStore, step: int = 0, mode: Mode = "train") -> dict[str, list[dict[str, Any]]]:
    return {name: table.to_pylist() for name, table in (await store.take(step, mode)).items()}


def rows_on_disk(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table in Parquet, read by pyarrow alone."""
    if not list((folder / table).glob("*.parquet")):
        return []
    rows = pq.read_table(folder / table)
    assert rows.schema == SCHEMAS[table]
    place = ("rollout_id", "attempt", "sequence")
    return sorted(rows.to_pylist(), key=lambda row: [row[name] for name in place if name in row])
