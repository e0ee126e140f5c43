"""The replay store: the queue of rollouts and all that was recorded of them, as one Ray actor over log and Parquet files.

What it promises, and tests kill it to prove it:
- an append has been written when it returns: it outlives any kill of the process; sent twice it counts once;
- the seal of an attempt, and every change of the queue, is on disk (fsync) when it returns; one fsync serves all who wait;
- an attempt that lacks a record its seal states is "incomplete", a failure of ours, and is made again;
- one attempt wins a rollout; later ones are kept, marked `late`, never taken;
- after a crash, what was acknowledged is there, the queue included; changed bytes are named and nothing starts on them;
- after a failed fsync the process ends: the next one recovers from what is on disk.

It owns `runs/NAME/store/`: `log/` (segments.py) and `TABLE/*.parquet` (store_tables.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from raygent.actors.file_lock import lock
from raygent.actors.segments import CLOSED, RECORDS, STATE, Contents, Rolled, Segment, StoreDamaged, write_rolled
from raygent.actors.store_state import (
    REWOUND,
    AttemptState,
    RolloutState,
    attempt_row,
    read_store,
    reader_of_winners,
    recall,
    sources_of,
    state_frame,
)
from raygent.actors.store_tables import (
    StepKey,
    discard_uncommitted,
    make_folders,
    record_name,
    state_name,
    sum_costs,
    write_parquet,
    write_states,
)
from raygent.records import (
    ENDED,
    INFRASTRUCTURE,
    OUTCOMES,
    SCHEMAS,
    SUCCEEDED,
    AttemptKey,
    Lease,
    Rollout,
    Seal,
    to_json,
)

logger = logging.getLogger("raygent")

SEGMENT_BYTES = 128 << 20  # a segment that has grown so large is rolled by itself
LOCK_WAIT_S = 10.0  # for a killed predecessor's lock
LATE_HEARTBEATS_S = 0.1  # heartbeats that wait behind a stall of ours are heard before a lease is called lost
CANCELLED = "cancelled"  # outcome of a rollout nobody wants any more, and of an attempt that lost its rollout so


class AttemptSealed(ValueError):
    """A new record for an attempt that has been sealed: it is refused, for what is sealed does not change."""


class ReplayStore:
    """See the module. `directory` is the run's `store` folder; a lease without heartbeat lasts `lease_s` seconds; a rollout
    gets `max_attempts` attempts for infrastructure's sake. `leave` ends the process where the log takes nothing more; Ray
    starts another, which recovers. Raises StoreDamaged where the files are not what was written."""

    def __init__(
        self, directory: str, lease_s: float, max_attempts: int, leave: Callable[[int], object] = os._exit
    ) -> None:
        self.directory, self.lease_s, self.max_attempts, self.leave = Path(directory), lease_s, max_attempts, leave
        self.folder = self.directory / "log"
        make_folders(self.directory)
        self.lock = _lock(self.directory / "lock")
        try:
            self.state, contents, self.rolled = read_store(self.directory)
            discard_uncommitted(self.directory, self.rolled)
            self.log = self._open_log(contents)
        except (StoreDamaged, OSError):
            os.close(self.lock)
            raise
        self.next_expiry = time.monotonic() + lease_s  # no lease runs out before
        self.leases: dict[AttemptKey, float] = dict.fromkeys(self.state.running, self.next_expiry)
        self.unheard = set(self.state.running)  # leases from before this start whose worker has not been heard since
        self.queue = [_place(rollout) for rollout in self.state.rollouts.values() if rollout.status == "queued"]
        heapq.heapify(self.queue)
        self.workers: dict[str, float] = {}  # name -> when it was heard last, monotonic
        self.ended = asyncio.Event()  # set, and replaced, when a rollout ends
        self.committing, self.rolling = asyncio.Lock(), asyncio.Lock()
        self.roll_by_size: asyncio.Task[None] | None = None

    def _open_log(self, contents: list[Contents]) -> Segment:
        if not contents:
            return Segment.create(self.folder, 1, [])
        if contents[-1].ended:
            return Segment.create(self.folder, contents[-1].number + 1, self._carried())
        if contents[-1].torn:
            logger.warning("%s: %d bytes of a torn tail cut off", contents[-1].path, contents[-1].torn)
        return Segment.reopen(contents[-1])

    # the queue

    async def add_rollouts(self, rollouts: list[Rollout]) -> int:
        """Queue the rollouts whose ids are not known yet, or were freed by a rewind. Durable. Returns how many.

        One that is known as another task's (the config or the data has changed) and is not trained is rewound first: a group
        of two tasks would compare what cannot be compared.
        """
        self._undo(
            known
            for rollout in rollouts
            if (known := self.state.rollouts.get(rollout.rollout_id))
            and known.task_id != rollout.task_id
            and known.trained_step < 0
        )
        rows = []
        for rollout in rollouts:
            known = self.state.rollouts.get(rollout.rollout_id)
            row: dict[str, Any] = asdict(rollout) | {"status": "queued", "queued": time.time()}
            row |= {"input": to_json(rollout.input), "private": to_json(rollout.private)}
            row["prompts"] = to_json(rollout.prompts)
            if known and known.outcome == REWOUND:
                if known.key != (rollout.mode, rollout.step):
                    raise ValueError(f"{rollout.rollout_id}: was added for {known.key}, now for another step or mode")
                # Attempt numbers go on, so that no key, record or late seal of the old attempts fits a new one.
                row |= {"outcome": "", "ended": None, "first_attempt": known.attempts + 1, "failures": 0}
            elif known:
                continue
            rows.append(row)
        rows = list({row["rollout_id"]: row for row in rows}.values())
        self._change(rollouts=rows)
        await self._durable()
        return len(rows)

    async def lease(self, worker: str, n: int) -> list[Lease]:
        """At most `n` queued rollouts for `worker`: eval before train, then by step and index. Durable."""
        await self._expire()
        self.workers[worker] = time.monotonic()
        taken: dict[str, RolloutState] = {}
        while self.queue and len(taken) < n:
            rollout = self.state.rollouts[heapq.heappop(self.queue)[-1]]
            if rollout.status == "queued":
                taken[rollout.rollout_id] = rollout
        attempts = [AttemptState(name, rollout.attempts + 1, worker, time.time()) for name, rollout in taken.items()]
        try:
            self._change(
                rollouts=[{"rollout_id": a.rollout_id, "status": "running", "attempts": a.attempt} for a in attempts],
                attempts=[attempt_row(attempt) for attempt in attempts],
            )
        except OSError:
            for rollout in taken.values():
                heapq.heappush(self.queue, _place(rollout))
            raise
        leases = [Lease(_rollout(taken[a.rollout_id]), a.attempt, taken[a.rollout_id].failures) for a in attempts]
        if leases:
            await self._durable()
        return leases

    async def heartbeat(self, worker: str, held: list[AttemptKey]) -> list[AttemptKey]:
        """Extend the leases `worker` holds. Returns those it no longer has: it must cancel these attempts."""
        now = self.workers[worker] = time.monotonic()
        lost = []
        for rollout_id, number in held:
            attempt = self.state.attempts.get((rollout_id, number))
            if (rollout_id, number) in self.leases and attempt and attempt.worker == worker:
                self.leases[rollout_id, number] = now + self.lease_s
                self.unheard.discard(attempt.key)
            else:
                lost.append((rollout_id, number))
        return lost

    async def cancel(self, rollout_ids: list[str]) -> None:
        """Drop rollouts that are queued, running, or ended but not trained (too stale). Durable."""
        rows = []
        for rollout in map(self._known, rollout_ids):
            if rollout.status not in ENDED:
                rows.append(_end(rollout, "dropped", CANCELLED))
            elif rollout.status in ("succeeded", "failed") and rollout.trained_step < 0:
                rows.append({"rollout_id": rollout.rollout_id, "status": "dropped"})
        stopped = [_stopped(attempt, CANCELLED) for row in rows for attempt in self._running(row["rollout_id"])]
        self._change(rollouts=rows, attempts=stopped)
        await self._durable()

    async def rewind(self, step: int | None, keep: bool = False) -> None:
        """Go back to before `step` (None: the newest there is): it and the steps after it are to be done again. Durable,
        idempotent.

        What has ended of `step` stays as it is, but for what was lost. That, all of later steps, and all that has not ended
        is dropped with outcome "rewound": who goes on asks for what it wants, and an open rollout of another agent, of an
        evaluation or of a search is not run by it. Attempts are kept as late ones; the ids may be added again, with attempt
        numbers that go on. With `keep` what has ended in later steps stays as it is, and so does what was trained.
        """
        all_known = self.state.rollouts.values()
        step = max((r.step for r in all_known), default=0) if step is None else step
        self._undo(
            one
            for one in all_known
            if one.status not in ENDED or (one.step > step and not keep) or (one.step == step and one.status == "lost")
        )
        trained = [one.rollout_id for one in all_known if one.trained_step >= step and not keep]
        self._change(rollouts=[{"rollout_id": name, "trained_step": -1} for name in trained])
        await self._durable()

    def _undo(self, rollouts: Iterable[RolloutState]) -> None:
        """Drop them as rewound, but for those that are."""
        rows: dict[str, dict[str, Any]] = {}
        attempts: list[dict[str, Any]] = []
        for rollout in rollouts:
            name = rollout.rollout_id
            if rollout.outcome == REWOUND or name in rows:
                continue
            rows[name] = _end(rollout, "dropped", REWOUND)
            rows[name] |= {"winning_attempt": 0, "reward": None, "trained_step": -1}
            attempts += [_stopped(attempt, CANCELLED) for attempt in self._running(name)]
            if rollout.winning_attempt:
                attempts.append({"rollout_id": name, "attempt": rollout.winning_attempt, "won": False, "late": True})
        self._change(rollouts=list(rows.values()), attempts=attempts)

    async def mark_trained(self, step: int, rollout_ids: list[str]) -> None:
        """Note that learner step `step` took these rollouts. Durable, idempotent."""
        rollouts = [self._known(rollout_id) for rollout_id in rollout_ids]
        self._change(
            rollouts=[{"rollout_id": r.rollout_id, "trained_step": step} for r in rollouts if r.trained_step != step]
        )
        await self._durable()

    # what is recorded

    async def append(self, table: str, batch: pa.RecordBatch) -> None:
        """Take `batch` of SCHEMAS[`table`] ("calls", "spans" or "rewards"), written to the log at once.

        Its `sequence` is set here; a record known by (rollout, attempt, source, source_sequence) is passed over. Raises
        ValueError for another schema or an attempt never leased, AttemptSealed for a sealed one; what the batch holds of
        other attempts is taken all the same.
        """
        if table not in RECORDS or not batch.schema.equals(SCHEMAS[table]):
            raise ValueError(f"append: {table!r} takes batches of records.SCHEMAS[{table!r}], one of {sorted(RECORDS)}")
        refused: list[ValueError] = []
        by_attempt: dict[AttemptKey, list[int]] = {}
        keys = zip(batch.column("rollout_id").to_pylist(), batch.column("attempt").to_pylist(), strict=True)
        for row, key in enumerate(keys):
            by_attempt.setdefault(key, []).append(row)
        made = sources_of(batch)
        for key, rows in by_attempt.items():
            attempt = self.state.attempts.get(key)
            if attempt is None:
                refused.append(ValueError(f"append: attempt {key[1]} of {key[0]} was never leased"))
                continue
            recall(self.state, attempt, self.directory, self.rolled)
            new = {made[row]: row for row in reversed(rows) if not attempt.has(table, made[row])}
            if new and attempt.sealed:
                refused.append(AttemptSealed(f"append: attempt {key[1]} of {key[0]} is sealed"))
            elif new:
                self._take_in(attempt, table, batch, sorted(new.values()))
        if self._grown() and (self.roll_by_size is None or self.roll_by_size.done()):
            self.roll_by_size = asyncio.create_task(self._roll_by_size())
        if refused:
            raise refused[0]

    def _take_in(self, attempt: AttemptState, table: str, batch: pa.RecordBatch, rows: list[int]) -> None:
        """Number the rows of `batch` that are new to `attempt`, log them, hold them."""
        adjacent = rows[-1] - rows[0] == len(rows) - 1
        batch = batch.slice(rows[0], len(rows)) if adjacent else batch.take(pa.array(rows))
        first, place = getattr(attempt, table), batch.schema.get_field_index("sequence")
        numbers = pa.array(range(first, first + len(rows)), pa.int32())
        message = batch.set_column(place, batch.schema.field(place), numbers).serialize()
        with self._leaving_when_broken():
            self.log.append(RECORDS[table], message)
        # Held as a view of the message, not of `batch`, which would pin its object in Ray's shared memory.
        held = pa.ipc.read_record_batch(message, SCHEMAS[table])
        attempt.hold(table, held, sources_of(held))
        self.state.dirty.add(self.state.rollouts[attempt.rollout_id].key)

    async def seal(self, seal: Seal, records: dict[str, pa.RecordBatch] | None = None) -> str:
        """Append `records` (batches by table), then end the attempt for good. Durable when it returns; asked again it
        answers the same.

        Returns "won"; "late" where the rollout had ended, or was rewound, before; "failed" where infrastructure failed or
        a stated record is missing: the rollout is queued again, or lost after `max_attempts`.
        """
        if seal.outcome not in (SUCCEEDED, *OUTCOMES, *INFRASTRUCTURE):
            raise ValueError(f"seal: unknown outcome {seal.outcome!r}")
        rollout = self._known(seal.rollout_id)
        attempt = self.state.attempts.get((seal.rollout_id, seal.attempt))
        if attempt is None:
            raise ValueError(f"seal: attempt {seal.attempt} of {seal.rollout_id} was never leased")
        for table, batch in (records or {}).items():
            await self.append(table, batch)
        if not attempt.sealed:
            recall(self.state, attempt, self.directory, self.rolled)
            self._seal(rollout, attempt, seal)
        await self._durable()
        return attempt.verdict

    def _seal(self, rollout: RolloutState, attempt: AttemptState, seal: Seal) -> None:
        outcome, error = seal.outcome, seal.error
        if outcome not in INFRASTRUCTURE and (lacking := _lacking(attempt, seal)):
            outcome, error = "incomplete", "; ".join(filter(None, [error, lacking]))
        row = {
            "rollout_id": seal.rollout_id,
            "attempt": seal.attempt,
            "worker": seal.worker,
            "outcome": outcome,
            "reward": seal.reward,
            "error": error,
            "started": seal.started or attempt.started,
            "finished": seal.finished,
        }
        if rollout.status in ENDED or attempt.attempt < rollout.first_attempt:
            self._change(attempts=[row | {"late": True}])
        elif outcome in INFRASTRUCTURE:
            self._change(rollouts=[self._try_again(rollout)] if attempt.key in self.leases else [], attempts=[row])
        else:
            status = "succeeded" if outcome == SUCCEEDED else "failed"
            won = _end(rollout, status, outcome) | {"winning_attempt": attempt.attempt, "reward": seal.reward}
            running = self._running(rollout.rollout_id)
            others = [_stopped(other, CANCELLED) for other in running if other is not attempt]
            self._change(rollouts=[won], attempts=[row | {"won": True}, *others])

    # what the driver takes

    async def wait(self, step: int, mode: str, timeout_s: float) -> int:
        """Block until no rollout of `step` and `mode` is open, or `timeout_s` have passed. Returns how many are open."""
        deadline = time.monotonic() + timeout_s
        while True:
            await self._expire()
            still_open = self.state.open_in((mode, step))
            left = deadline - time.monotonic()
            if not still_open or left <= 0:
                await self._durable()
                return still_open
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), min(left, self.lease_s / 4))

    async def take(self, step: int, mode: str, spans: bool = False, texts: bool = True) -> dict[str, pa.Table]:
        """The ended rollouts of `step` and `mode`, and of their winning attempts the attempts, calls (without `texts` not what
        was said in them, which is most of their bytes), rewards and, where asked for, `spans`.

        Records are ordered by rollout and sequence. What it returns is durable. Dropped and lost rollouts have a row in
        "rollouts" and no records, rewound ones not even that; "lost" has the last attempt of each that was lost.
        """
        # Held records and `rolled` are of the same moment, so a roll that ends meanwhile neither doubles nor hides a row.
        read = reader_of_winners(self.directory, self.state, self.rolled, (mode, step), spans, texts)
        await self._durable()
        return await asyncio.to_thread(read)

    async def rewards_before(self, step: int) -> dict[str, list[list[float]]]:
        """By task id the rewards of its train rollouts of all steps before `step` that have ended: a list a group, oldest first.

        In an order that neither who ended first nor a recovery changes.
        """
        found: dict[str, dict[tuple[int, str], list[float]]] = {}
        for (mode, of), rollouts in self.state.steps.items():
            if mode == "train" and of < step:
                for one in rollouts.values():
                    if one.status in ENDED and one.reward is not None:
                        found.setdefault(one.task_id, {}).setdefault((of, one.group_id), []).append(one.reward)
        return {task: [sorted(groups[key]) for key in sorted(groups)] for task, groups in found.items()}

    async def status(self) -> dict[str, int]:
        """Counts: asked, each rollout status, `failed_KIND`, trained, retried (attempts that infrastructure failed), attempts
        and `attempts_OUTCOME`, workers heard within two leases, and bytes of the log."""
        counts = {name: count for name, count in self.state.counts.items() if count}
        horizon = time.monotonic() - 2 * self.lease_s
        statuses = dict.fromkeys(("queued", "running", *ENDED, "trained"), 0)
        return statuses | counts | {
            "asked": len(self.state.rollouts),
            "attempts": len(self.state.attempts),
            "retried": sum(counts.get(f"attempts_{outcome}", 0) for outcome in INFRASTRUCTURE),
            "workers": sum(heard > horizon for heard in self.workers.values()),
            "log_bytes": self.log.size,
        }  # fmt: skip

    async def costs(self) -> dict[str, dict[str, float]]:
        """Dollars that all recorded calls have cost: by upstream, by the engine replica that made them."""
        held = [batch for attempt in self.state.attempts.values() for batch in attempt.held.get("calls", ())]
        return await asyncio.to_thread(sum_costs, self.directory, self.rolled, held)

    # disk

    async def roll(self) -> None:
        """Move what has ended from the log to Parquet: new segment, files by atomic rename, one commit, old log deleted."""
        async with self.rolling:
            if not self.state.dirty:
                return
            async with self.committing:
                with self._leaving_when_broken():
                    await asyncio.to_thread(self.log.sync)
                segment, steps = self.log.number, self.state.dirty
                states = {
                    (table, key): self.state.rows(table, key) for key in steps for table in ("rollouts", "attempts")
                }
                moved = self._movable(steps)
                with self._leaving_when_broken():
                    self.log = Segment.create(self.folder, segment + 1, self._carried(), before=self.log)
                self.state.dirty = set()
            try:
                self.rolled = await asyncio.to_thread(self._write_tables, segment, states, moved)
            finally:
                if self.rolled.segment < segment:  # the log is still whole: the next roll does it all again
                    self.state.dirty |= steps
            self._forget(steps, moved)

    def _movable(
        self, steps: set[StepKey]
    ) -> dict[tuple[str, StepKey], list[tuple[AttemptState, list[pa.RecordBatch]]]]:
        """The held records of attempts that run no more, by table and step."""
        moved: dict[tuple[str, StepKey], list[tuple[AttemptState, list[pa.RecordBatch]]]] = {}
        for key in steps:
            for rollout in self.state.steps[key].values():
                for number in range(1, rollout.attempts + 1):
                    attempt = self.state.attempts[rollout.rollout_id, number]
                    for table, batches in attempt.held.items() if attempt.outcome else ():
                        if batches:
                            moved.setdefault((table, key), []).append((attempt, list(batches)))
        return moved

    def _carried(self) -> list[tuple[int, bytes | pa.Buffer]]:
        """The first frames of a new segment: what is open, so that older segments may go."""
        frames: list[tuple[int, bytes | pa.Buffer]] = [
            (STATE, state_frame(event)) for event in self.state.open_events()
        ]
        for attempt in self.state.running.values():
            for table, batches in attempt.held.items():
                frames += [(RECORDS[table], batch.serialize()) for batch in batches]
        return frames

    def _grown(self) -> bool:
        """Whether the log is to be rolled by itself. What each roll carries over is not rewritten for little."""
        return self.log.size - self.log.head > max(SEGMENT_BYTES, self.log.head)

    def _write_tables(self, segment: int, states: dict, moved: dict) -> Rolled:
        """In a thread. The commit is write_rolled: before it the log counts and record files don't, after it they do."""
        for (table, key), rows in states.items():
            write_states(self.directory, table, key, rows)
        for (table, key), parts in moved.items():
            rows = pa.Table.from_batches([batch for _, batches in parts for batch in batches]).combine_chunks()
            write_parquet(self.directory / record_name(table, key, segment), rows)
        written = {state_name(table, key) for table, key in states}
        written |= {record_name(table, key, segment) for table, key in moved}
        rolled = Rolled(segment, self.rolled.files | written)
        write_rolled(self.folder, rolled)
        discard_uncommitted(self.directory, rolled)
        return rolled

    def _forget(self, steps: set[StepKey], moved: dict) -> None:
        """Let go of what Parquet has now."""
        for (table, _), parts in moved.items():
            for attempt, batches in parts:
                del attempt.held[table][: len(batches)]
                if attempt.sealed and not any(attempt.held.values()):
                    attempt.held.clear()
                    attempt.made.clear()
                    attempt.made_whole = False
        for key in steps - self.state.dirty:
            for rollout in self.state.steps[key].values():
                if rollout.status in ENDED:
                    rollout.input = rollout.private = rollout.prompts = None
                for number in range(1, rollout.attempts + 1):
                    if self.state.attempts[rollout.rollout_id, number].error:
                        self.state.attempts[rollout.rollout_id, number].error = None

    async def _roll_by_size(self) -> None:
        try:
            await self.roll()
        except (OSError, StoreDamaged) as error:
            logger.error("the log could not be rolled, it grows on: %s", error)

    async def close(self) -> None:
        """Roll what there is, running and queued rollouts with their state of now, and let go of the files."""
        try:
            await self.roll()
        finally:
            async with self.committing:
                self.log.close()
            os.close(self.lock)

    # inner

    def _known(self, rollout_id: str) -> RolloutState:
        if rollout_id not in self.state.rollouts:
            raise ValueError(f"no rollout {rollout_id!r} was ever added")
        return self.state.rollouts[rollout_id]

    def _running(self, rollout_id: str) -> Iterable[AttemptState]:
        """The attempt of `rollout_id` that holds a lease, if there is one."""
        key = (rollout_id, self.state.rollouts[rollout_id].attempts)
        return [self.state.attempts[key]] if key in self.leases else []

    def _try_again(self, rollout: RolloutState) -> dict[str, Any]:
        """The row of a rollout whose running attempt failed for infrastructure's sake."""
        failures = {"failures": rollout.failures + 1}
        if rollout.failures + 1 >= self.max_attempts:
            return _end(rollout, "lost", "") | failures
        return {"rollout_id": rollout.rollout_id, "status": "queued"} | failures

    async def _expire(self) -> None:
        """Attempts whose lease has run out fail as "lease_lost"; as "store_restarted", which is not counted against the
        rollout, where nobody was heard to hold it since this start: its worker may never have got our answer."""
        now = time.monotonic()
        if now < self.next_expiry:
            return
        self.next_expiry = min(self.leases.values(), default=now + self.lease_s)
        if now < self.next_expiry:
            return
        await asyncio.sleep(LATE_HEARTBEATS_S)
        now = time.monotonic()
        overdue = [self.state.attempts[key] for key, expires in self.leases.items() if expires < now]
        self._change(
            rollouts=[
                {"rollout_id": attempt.rollout_id, "status": "queued"}
                if attempt.key in self.unheard
                else self._try_again(self.state.rollouts[attempt.rollout_id])
                for attempt in overdue
            ],
            attempts=[_stopped(a, "store_restarted" if a.key in self.unheard else "lease_lost") for a in overdue],
        )

    def _change(self, **event: list[dict[str, Any]]) -> None:
        """Log a change of rollouts and attempts as one frame, then make it."""
        event = {table: rows for table, rows in event.items() if rows}
        if not event:
            return
        with self._leaving_when_broken():
            self.log.append(STATE, state_frame(event))
        self.state.apply(event)
        for row in event.get("attempts", []):
            key = (row["rollout_id"], row["attempt"])
            if key in self.state.running:
                self.leases[key] = time.monotonic() + self.lease_s
            else:
                self.leases.pop(key, None)
        for row in event.get("rollouts", []):
            if row.get("status") == "queued":
                heapq.heappush(self.queue, _place(self.state.rollouts[row["rollout_id"]]))
            elif row.get("status") in ENDED:
                self.ended.set()
        if self.ended.is_set():
            self.ended = asyncio.Event()

    async def _durable(self) -> None:
        """Return when all that has been logged so far is safe on disk. Whoever comes first syncs for all who wait."""
        log, target = self.log, self.log.written
        async with self.committing:
            if log.durable < target:
                size = log.size
                with self._leaving_when_broken():
                    await asyncio.to_thread(log.sync)
                    log.state_durable(size)

    @contextlib.contextmanager
    def _leaving_when_broken(self) -> Iterator[None]:
        """Ends the process if the log takes nothing more: what is safe on disk, only a recovery can tell."""
        try:
            yield
        except OSError as error:
            if self.log.broken not in ("", CLOSED):
                logger.critical("the store ends and has to be started again: %s", error)
                self.leave(1)
            raise


def _lock(path: Path) -> int:
    """Hold `path` for this process alone, until it ends. Raises BlockingIOError if another store process lives."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    if not lock(descriptor, LOCK_WAIT_S):
        os.close(descriptor)
        raise BlockingIOError(f"{path}: another process's store holds it")
    return descriptor


def _place(rollout: RolloutState) -> tuple[bool, int, int, str]:
    """The queue's order: eval first, then by step and index."""
    return rollout.mode != "eval", rollout.step, rollout.index, rollout.rollout_id


def _end(rollout: RolloutState, status: str, outcome: str) -> dict[str, Any]:
    return {"rollout_id": rollout.rollout_id, "status": status, "outcome": outcome, "ended": time.time()}


def _stopped(attempt: AttemptState, outcome: str) -> dict[str, Any]:
    """The row that ends a running attempt without a seal."""
    return {"rollout_id": attempt.rollout_id, "attempt": attempt.attempt, "outcome": outcome}


def _rollout(state: RolloutState) -> Rollout:
    assert state.input is not None and state.private is not None and state.prompts is not None
    return Rollout(
        state.rollout_id,
        state.task_id,
        state.group_id,
        state.mode,  # type: ignore[arg-type]
        state.step,
        state.index,
        json.loads(state.input),
        json.loads(state.private),
        state.resource_version,
        json.loads(state.prompts),
    )


def _lacking(attempt: AttemptState, seal: Seal) -> str:
    """Which of the records that `seal` states the store has not got; "" if it has all."""
    for table in RECORDS:
        for source, count in getattr(seal, table).items():
            missing = [number for number in range(count) if not attempt.has(table, (source, number))]
            if missing:
                return f"{len(missing)} of {count} {table} of {source} are missing, the first is number {missing[0]}"
    return ""
