"""The store against a model of it of a page: whatever is asked of both, in whatever order, they say and hold the same."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import call, crash, open_store, rollout, rows_on_disk, taken

from raygent.actors import replay_store
from raygent.actors.replay_store import AttemptSealed
from raygent.records import CALLS, ENDED, INFRASTRUCTURE, REWARDS, SPANS, Reward, Rollout, Seal, Span, to_batch

MAX_ATTEMPTS = 3
STEPS = (("train", 0), ("train", 1), ("train", 2), ("eval", 1))
ROLLOUTS = [rollout(n, STEPS[n % 4][1], STEPS[n % 4][0]) for n in range(8)]  # type: ignore[arg-type]
Source = tuple[str, int]


@dataclass
class ModelAttempt:
    rollout_id: str
    number: int
    outcome: str = ""
    sealed: bool = False
    unheard: bool = False  # since the store was opened again
    won: bool = False
    late: bool = False
    error: str = ""
    records: dict[str, list[Source]] = field(default_factory=lambda: {"calls": [], "spans": [], "rewards": []})

    @property
    def verdict(self) -> str:
        return "won" if self.won else "late" if self.late else "failed"


@dataclass
class ModelRollout:
    rollout: Rollout
    status: str = "queued"
    outcome: str = ""
    reward: float | None = None
    trained: int = -1
    winner: int = 0
    failures: int = 0
    first: int = 1
    attempts: list[ModelAttempt] = field(default_factory=list)

    @property
    def running(self) -> list[ModelAttempt]:
        return [attempt for attempt in self.attempts if not attempt.outcome]

    def stop(self, outcome: str) -> None:
        for attempt in self.running:
            attempt.outcome = outcome

    def try_again(self) -> None:
        self.failures += 1
        self.status = "lost" if self.failures >= MAX_ATTEMPTS else "queued"

    def seal(self, attempt: ModelAttempt, outcome: str, reward: float | None, complete: bool) -> str:
        if attempt.sealed:
            return attempt.verdict
        held_lease, attempt.sealed = not attempt.outcome, True
        attempt.outcome = outcome if complete or outcome in INFRASTRUCTURE else "incomplete"
        if self.status in ENDED or attempt.number < self.first:
            attempt.late = True
        elif attempt.outcome not in INFRASTRUCTURE:
            self.status, self.outcome = "succeeded" if outcome == "succeeded" else "failed", outcome
            attempt.won, self.winner, self.reward = True, attempt.number, reward
            self.stop("cancelled")
        elif held_lease:
            self.try_again()
        return attempt.verdict


class StoreMachine(RuleBasedStateMachine):
    rollouts = st.lists(st.integers(0, len(ROLLOUTS) - 1), max_size=4)
    which = st.integers(0, 99)

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.model: dict[str, ModelRollout] = {}
        self.rolling: asyncio.Task | None = None
        self.store = open_store(self.folder)

    def ask(self, asked: Any) -> Any:
        return self.loop.run_until_complete(asked)

    def known(self, numbers: list[int]) -> list[ModelRollout]:
        return [self.model[f"r{number}"] for number in numbers if f"r{number}" in self.model]

    def attempt(self, which: int) -> tuple[ModelRollout, ModelAttempt] | None:
        attempts = [(of, attempt) for of in self.model.values() for attempt in of.attempts]
        attempts.sort(key=lambda pair: bool(pair[1].outcome))  # the running ones first: they are asked for more often
        return attempts[which % len(attempts)] if attempts else None

    @rule(numbers=rollouts)
    def add(self, numbers: list[int]) -> None:
        new = 0
        for number in dict.fromkeys(numbers):
            old = self.model.get(f"r{number}")
            if old is None:
                self.model[f"r{number}"] = ModelRollout(ROLLOUTS[number])
            elif old.outcome == "rewound":
                attempts = old.attempts
                self.model[f"r{number}"] = ModelRollout(ROLLOUTS[number], first=len(attempts) + 1, attempts=attempts)
            else:
                continue
            new += 1
        assert self.ask(self.store.add_rollouts([ROLLOUTS[number] for number in numbers])) == new

    @rule(n=st.integers(1, 4))
    def lease(self, n: int) -> None:
        queued = [of for of in self.model.values() if of.status == "queued"]
        queued.sort(
            key=lambda of: (of.rollout.mode != "eval", of.rollout.step, of.rollout.index, of.rollout.rollout_id)
        )
        leases = self.ask(self.store.lease("w", n))
        assert [lease.rollout for lease in leases] == [of.rollout for of in queued[:n]]
        for of, lease in zip(queued, leases, strict=False):
            of.status = "running"
            of.attempts.append(ModelAttempt(of.rollout.rollout_id, len(of.attempts) + 1))
            assert lease.attempt == len(of.attempts)

    @rule(
        which=which,
        table=st.sampled_from(["calls", "calls", "spans", "rewards"]),
        sources=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), min_size=1, max_size=4),
    )
    def append(self, which: int, table: str, sources: list[Source]) -> None:
        if not (found := self.attempt(which)):
            return
        attempt, records = found[1], found[1].records[table]
        new = [source for source in dict.fromkeys(sources) if source not in records]
        asked = self.store.append(table, self.batch(attempt, table, sources))
        if new and attempt.sealed:
            with pytest.raises(AttemptSealed):
                self.ask(asked)
        else:
            self.ask(asked)
            records += new

    def batch(self, attempt: ModelAttempt, table: str, sources: list[Source]) -> pa.RecordBatch:
        key = (attempt.rollout_id, attempt.number)
        if table == "calls":
            return to_batch(CALLS, [call(*key, number, source) for source, number in sources])
        if table == "spans":
            return to_batch(SPANS, [Span(*key, source, n, "log", str(n), "{}", 0.0, 0.0) for source, n in sources])
        return to_batch(REWARDS, [Reward(*key, source, number, float(number)) for source, number in sources])

    @rule(
        which=which,
        outcome=st.sampled_from(["succeeded"] * 4 + ["timeout", "engine_lost"]),
        reward=st.floats(-1, 1, width=32),
        lacking=st.integers(0, 4),
    )
    def seal(self, which: int, outcome: str, reward: float, lacking: int) -> None:
        if not (found := self.attempt(which)):
            return
        of, attempt = found
        stated = {table: dict(Counter(source for source, _ in made)) for table, made in attempt.records.items()}
        if lacking == 0:
            stated["calls"]["a"] = stated["calls"].get("a", 0) + 1
        complete = all(
            (source, number) in attempt.records[table]
            for table, counts in stated.items()
            for source, count in counts.items()
            for number in range(count)
        )
        if not attempt.sealed:
            attempt.error = "why"
        seal = Seal(attempt.rollout_id, attempt.number, "w", outcome, reward, error="why", finished=1.0, **stated)
        assert self.ask(self.store.seal(seal)) == of.seal(attempt, outcome, reward, complete)

    @rule(numbers=rollouts)
    def expire(self, numbers: list[int]) -> None:
        for of in self.known(numbers):
            for attempt in of.running:
                self.store.leases[attempt.rollout_id, attempt.number] = self.store.next_expiry = 0
                attempt.outcome = "store_restarted" if attempt.unheard else "lease_lost"
                if attempt.unheard:
                    of.status = "queued"
                else:
                    of.try_again()
        late, replay_store.LATE_HEARTBEATS_S = replay_store.LATE_HEARTBEATS_S, 0
        assert self.ask(self.store.wait(9, "train", 0)) == 0
        replay_store.LATE_HEARTBEATS_S = late

    @rule(numbers=rollouts)
    def cancel(self, numbers: list[int]) -> None:
        for of in self.known(numbers):
            if of.status not in ENDED:
                of.status, of.outcome = "dropped", "cancelled"
                of.stop("cancelled")
            elif of.status in ("succeeded", "failed") and of.trained < 0:
                of.status = "dropped"
        self.ask(self.store.cancel([of.rollout.rollout_id for of in self.known(numbers)]))

    @rule(step=st.integers(0, 2))
    def rewind(self, step: int) -> None:
        for of in self.model.values():
            if of.trained >= step:
                of.trained = -1
            open_yet = of.status not in ENDED
            again = open_yet or of.rollout.step > step or (of.rollout.step == step and of.status == "lost")
            if again and of.outcome != "rewound":
                of.status, of.outcome, of.reward, of.winner = "dropped", "rewound", None, 0
                of.stop("cancelled")
                for attempt in of.attempts:
                    attempt.won, attempt.late = False, attempt.late or attempt.won
        self.ask(self.store.rewind(step))

    @rule(step=st.integers(0, 2), numbers=rollouts)
    def train(self, step: int, numbers: list[int]) -> None:
        won = [of for of in self.known(numbers) if of.status in ("succeeded", "failed")]
        for of in won:
            of.trained = step
        self.ask(self.store.mark_trained(step, [of.rollout.rollout_id for of in won]))

    @rule()
    def heartbeat(self) -> None:
        attempts = [(attempt.rollout_id, attempt.number) for of in self.model.values() for attempt in of.attempts]
        held = {(attempt.rollout_id, attempt.number) for of in self.model.values() for attempt in of.running}
        lost = self.ask(self.store.heartbeat("w", attempts))
        assert set(lost) == set(attempts) - held
        self.unheard(False)

    def unheard(self, now: bool) -> None:
        for of in self.model.values():
            for attempt in of.running:
                attempt.unheard = now

    @rule()
    def roll(self) -> None:
        self.ask(self.store.roll())

    @precondition(lambda self: self.rolling is None)
    @rule()
    def roll_beside_what_follows(self) -> None:
        self.rolling = self.loop.create_task(self.store.roll())
        self.ask(asyncio.sleep(0))

    def rolled(self) -> None:
        if self.rolling:
            self.ask(self.rolling)
        self.rolling = None

    @rule()
    def crash(self) -> None:
        self.rolled()
        crash(self.store)
        self.store = open_store(self.folder)
        self.unheard(True)

    @rule()
    def close_and_open(self) -> None:
        self.rolled()
        self.ask(self.store.close())
        self.compare_with_disk()
        self.store = open_store(self.folder)
        self.unheard(True)

    @rule()
    def take(self) -> None:
        for mode, step in STEPS:
            tables = self.ask(taken(self.store, step, mode))  # type: ignore[arg-type]
            of_step = [of for of in self.model.values() if (of.rollout.mode, of.rollout.step) == (mode, step)]
            there = [of for of in of_step if of.status in ENDED and of.outcome != "rewound"]
            ended = {of.rollout.rollout_id: of.status for of in there}
            assert {row["rollout_id"]: row["status"] for row in tables["rollouts"]} == ended
            won = [of.attempts[of.winner - 1] for of in of_step if of.status in ("succeeded", "failed")]
            won.sort(key=lambda attempt: attempt.rollout_id)
            told = [(row["rollout_id"], row["error"]) for row in tables["attempts"]]
            assert told == [(attempt.rollout_id, attempt.error) for attempt in won]
            for table in ("calls", "rewards"):
                assert list(map(record, tables[table])) == records(won, table)

    @invariant()
    def counts(self) -> None:
        attempts = [attempt for of in self.model.values() for attempt in of.attempts]
        told = Counter(of.status for of in self.model.values())
        told.update(f"attempts_{attempt.outcome or 'running'}" for attempt in attempts)
        told.update(f"failed_{of.outcome}" for of in self.model.values() if of.status == "failed")
        told.update("trained" for of in self.model.values() if of.trained >= 0)
        told.update("attempts_late" for attempt in attempts if attempt.late)
        told.update(asked=len(self.model), attempts=len(attempts))
        told.update(retried=sum(attempt.outcome in INFRASTRUCTURE for attempt in attempts))
        status = self.ask(self.store.status())
        assert {name: count for name, count in status.items() if count and name not in ("workers", "log_bytes")} == {
            name: count for name, count in told.items() if count
        }
        for mode, step in STEPS:
            of_step = [of for of in self.model.values() if (of.rollout.mode, of.rollout.step) == (mode, step)]
            assert self.store.state.open_in((mode, step)) == sum(of.status not in ENDED for of in of_step)

    def compare_with_disk(self) -> None:
        """After close(): the Parquet files alone, read by pyarrow alone."""
        attempts = sorted(
            (a for of in self.model.values() for a in of.attempts), key=lambda a: (a.rollout_id, a.number)
        )
        rows = {row["rollout_id"]: row for row in rows_on_disk(self.folder, "rollouts")}
        names = ("status", "outcome", "winning_attempt", "attempts", "reward", "trained_step", "input")
        assert {name: tuple(row[n] for n in names) for name, row in rows.items()} == {
            name: (of.status, of.outcome, of.winner, len(of.attempts), of.reward, of.trained, f'{{"q":{name[1:]}}}')
            for name, of in self.model.items()
        }
        names = ("rollout_id", "attempt", "outcome", "won", "late", "calls", "spans", "rewards")
        assert [tuple(row[n] for n in names) for row in rows_on_disk(self.folder, "attempts")] == [
            (a.rollout_id, a.number, a.outcome, a.won, a.late, *map(len, a.records.values())) for a in attempts
        ]
        errors = [row["error"].partition(";")[0] for row in rows_on_disk(self.folder, "attempts")]
        assert errors == [a.error for a in attempts]
        # The records of what runs still stand in the log alone.
        for table in ("calls", "spans", "rewards"):
            ended = [attempt for attempt in attempts if attempt.outcome]
            assert list(map(record, rows_on_disk(self.folder, table))) == records(ended, table)

    def teardown(self) -> None:
        self.rolled()
        self.take()
        self.ask(self.store.close())
        self.compare_with_disk()
        shutil.rmtree(self.folder)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


def record(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["rollout_id"], row["attempt"], row["sequence"], row["source"], row["source_sequence"]


def records(attempts: list[ModelAttempt], table: str) -> list[tuple[Any, ...]]:
    return [(a.rollout_id, a.number, n, *source) for a in attempts for n, source in enumerate(a.records[table])]


QUICK = settings(max_examples=25, stateful_step_count=40, suppress_health_check=list(HealthCheck), database=None)
StoreMachine.TestCase.settings = QUICK
TestStore = StoreMachine.TestCase


@pytest.mark.slow
class TestStoreLong(StoreMachine.TestCase):
    settings = settings(QUICK, max_examples=200, stateful_step_count=80)
