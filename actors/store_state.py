"""What the replay store knows, in memory, and how it is rebuilt from Parquet and the log.

Every change of a rollout or an attempt is a STATE frame `{"rollouts": [...], "attempts": [...]}` of rows: the key and the
fields that changed, with their new values. Replaying a log over a state that holds it already changes nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raygent.actors.segments import KINDS, RECORDS, STATE, Contents, Rolled, StoreDamaged, read_log, read_rolled
from raygent.actors.store_tables import CALL_TEXTS, StepKey, check_files, read_records, read_states, with_texts
from raygent.records import ENDED, SCHEMAS, AttemptKey, to_batch, utf8

REWOUND = "rewound"  # outcome of a rollout whose step is to be done again: its id may be added again


@dataclass(slots=True)
class RolloutState:
    """A row of `rollouts` and what the queue needs besides."""

    rollout_id: str
    task_id: str
    group_id: str
    mode: str
    step: int
    index: int
    resource_version: int
    queued: float
    status: str = "queued"
    outcome: str = ""
    winning_attempt: int = 0
    attempts: int = 0  # the highest attempt number given out
    reward: float | None = None
    trained_step: int = -1
    ended: float | None = None
    input: str | None = None  # JSON; None: only in Parquet
    private: str | None = None
    prompts: str | None = None
    first_attempt: int = 1  # attempts below it are from before a rewind and can't win
    failures: int = 0  # attempts since then that failed for infrastructure's sake

    @property
    def key(self) -> StepKey:
        return self.mode, self.step

    def tally(self) -> list[str]:
        """The counts of `status()` it belongs to."""
        kind = [f"failed_{self.outcome}"] if self.status == "failed" else []
        return [self.status, *kind, *(["trained"] if self.trained_step >= 0 else [])]


@dataclass(slots=True)
class AttemptState:
    """A row of `attempts`, and its records that are not in Parquet yet.

    `calls`, `spans`, `rewards` count its records, so they are the next `sequence` too. `outcome` is "" while it runs;
    `finished` is None until a seal came. `held` has its record batches and `made` knows its records by (source,
    source_sequence), by table; `made_whole` is False where some of those are only in Parquet.
    """

    rollout_id: str
    attempt: int
    worker: str
    started: float
    outcome: str = ""
    reward: float | None = None
    won: bool = False
    late: bool = False
    calls: int = 0
    spans: int = 0
    rewards: int = 0
    error: str | None = ""  # None: only in Parquet
    finished: float | None = None
    held: dict[str, list[pa.RecordBatch]] = field(default_factory=lambda: defaultdict(list))
    made: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    made_whole: bool = True

    @property
    def key(self) -> AttemptKey:
        return self.rollout_id, self.attempt

    @property
    def sealed(self) -> bool:
        return self.finished is not None

    @property
    def verdict(self) -> str:
        return "won" if self.won else "late" if self.late else "failed"

    def has(self, table: str, source: tuple[str, int]) -> bool:
        return source in self.made.get(table, ())

    def tally(self) -> list[str]:
        return [f"attempts_{self.outcome or 'running'}", *(["attempts_late"] if self.late else [])]

    def hold(self, table: str, batch: pa.RecordBatch, made: list[tuple[str, int]]) -> None:
        """Take in records that are new and numbered."""
        self.held[table].append(batch)
        self.made.setdefault(table, set()).update(made)
        setattr(self, table, max(getattr(self, table), batch.column("sequence")[-1].as_py() + 1))


ATTEMPT_FIELDS = [name for name in SCHEMAS["attempts"].names]


class State:
    """All rollouts and attempts, by key and by step, those that have not ended, and the counts of their kinds."""

    def __init__(self) -> None:
        self.rollouts: dict[str, RolloutState] = {}
        self.attempts: dict[AttemptKey, AttemptState] = {}
        self.steps: dict[StepKey, dict[str, RolloutState]] = defaultdict(dict)
        self.open: dict[StepKey, dict[str, RolloutState]] = defaultdict(dict)  # queued or running
        self.running: dict[AttemptKey, AttemptState] = {}
        self.counts: Counter[str] = Counter()
        self.dirty: set[StepKey] = set()  # steps with rows newer than their Parquet files

    def apply(self, event: dict[str, list[dict[str, Any]]]) -> None:
        """Take in a STATE event: new rows, or new values of known ones."""
        for row in event.get("rollouts", []):
            rollout = self.rollouts.get(row["rollout_id"])
            if rollout is None:
                rollout = self.rollouts[row["rollout_id"]] = RolloutState(**row)
                self.steps[rollout.key][rollout.rollout_id] = rollout
                self.counts.update(rollout.tally())
            else:
                self._change(rollout, row)
            if rollout.status in ENDED:
                self.open[rollout.key].pop(rollout.rollout_id, None)
            else:
                self.open[rollout.key][rollout.rollout_id] = rollout
            self.dirty.add(rollout.key)
        for row in event.get("attempts", []):
            attempt = self.attempts.get((row["rollout_id"], row["attempt"]))
            if attempt is None:
                attempt = AttemptState(**row)
                self.attempts[attempt.key] = attempt
                self.counts.update(attempt.tally())
            else:
                self._change(attempt, row)
            if attempt.outcome:
                self.running.pop(attempt.key, None)
            else:
                self.running[attempt.key] = attempt
            self.dirty.add(self.rollouts[attempt.rollout_id].key)

    def _change(self, record: RolloutState | AttemptState, row: dict[str, Any]) -> None:
        self.counts.subtract(record.tally())
        for name, value in row.items():
            setattr(record, name, value)
        self.counts.update(record.tally())

    def open_in(self, key: StepKey) -> int:
        """How many rollouts of that mode and step are queued or running."""
        return len(self.open.get(key, ()))

    def open_events(self) -> Iterator[dict[str, list[dict[str, Any]]]]:
        """The STATE events that carry what has not ended over to the next segment."""
        for rollouts in filter(None, self.open.values()):
            yield {"rollouts": [asdict(rollout) for rollout in rollouts.values()]}
        yield {"attempts": [attempt_row(attempt) for attempt in self.running.values()]}

    def rows(self, table: str, key: StepKey) -> pa.Table:
        """The rows of `rollouts` or `attempts` of one step (texts that are in Parquet alone are null)."""
        records: list[Any] = list(self.steps[key].values())
        if table == "attempts":
            records = [
                self.attempts[rollout.rollout_id, number]
                for rollout in records
                for number in range(1, rollout.attempts + 1)
            ]
        schema = SCHEMAS[table]
        rows = [{name: getattr(record, name) for name in schema.names} for record in records]
        return pa.Table.from_batches([to_batch(schema, rows)])


def state_frame(event: dict[str, list[dict[str, Any]]]) -> bytes:
    """The payload of a STATE frame. Raises TypeError or ValueError for what JSON does not hold, nan and infinities too."""
    return utf8(json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)).encode()


def attempt_row(attempt: AttemptState) -> dict[str, Any]:
    return {name: getattr(attempt, name) for name in ATTEMPT_FIELDS}


def sources_of(batch: pa.RecordBatch | pa.Table) -> list[tuple[str, int]]:
    """What makes each record itself within its attempt and table: (source, source_sequence)."""
    return list(zip(batch.column("source").to_pylist(), batch.column("source_sequence").to_pylist(), strict=True))


def read_store(directory: Path) -> tuple[State, list[Contents], Rolled]:
    """The state on disk, the log's segments that it still needs, and the last roll; nothing is changed.

    Raises StoreDamaged.
    """
    contents, rolled = read_log(directory / "log"), read_rolled(directory / "log")
    if not contents and any(directory.glob("*/*.parquet")):
        raise StoreDamaged(str(directory / "log"), 0, "there are tables, but the log is missing")
    check_files(directory, rolled)
    state = State()
    for table in ("rollouts", "attempts"):
        state.apply({table: list(read_states(directory, table, rolled))})
    for attempt in state.attempts.values():
        attempt.made_whole = not attempt.outcome  # the records of a running one are carried from log to log
    state.dirty.clear()
    for segment in contents:
        for frame in segment.frames:
            if frame.kind == STATE:
                state.apply(json.loads(frame.payload.to_pybytes()))
            elif KINDS[frame.kind] in RECORDS:
                table = KINDS[frame.kind]
                _hold_replayed(state, table, pa.ipc.read_record_batch(frame.payload, SCHEMAS[table]))
    return state, contents, rolled


def reader_of_winners(
    directory: Path, state: State, rolled: Rolled, key: StepKey, spans: bool = False, texts: bool = True
) -> Callable[[], dict[str, pa.Table]]:
    """What reads the ended rollouts of step `key`, and of their winning attempts the attempts, calls (with their `texts`, or
    without), rewards and, where asked for, `spans`, as they stand now; it may be called later and in another thread.

    Records are ordered by rollout and sequence. Dropped and lost rollouts have a row in "rollouts" and no records, rewound ones
    not even that; "lost" has the last attempt of each that was lost.
    """
    rollouts = state.steps.get(key, {}).values()
    ended = pa.array([one.status in ENDED and one.outcome != REWOUND for one in rollouts], pa.bool_())
    winners = {(one.rollout_id, one.winning_attempt) for one in rollouts if one.status in ("succeeded", "failed")}
    won = [state.attempts[winner] for winner in sorted(winners)]
    given_up = [state.attempts[one.rollout_id, one.attempts] for one in rollouts if one.status == "lost"]
    attempts, lost = (
        pa.Table.from_batches([to_batch(SCHEMAS["attempts"], [attempt_row(attempt) for attempt in some])])
        for some in (won, given_up)
    )
    states = {"rollouts": state.rows("rollouts", key).filter(ended), "attempts": attempts}
    wanted = ("calls", "rewards", *["spans"] * spans)
    held = {table: [batch for attempt in won for batch in attempt.held[table]] for table in wanted}
    expected = {table: sum(getattr(attempt, table) for attempt in won) for table in held}

    def read() -> dict[str, pa.Table]:
        tables = {table: with_texts(directory, table, key, rows) for table, rows in states.items()}
        tables["lost"] = with_texts(directory, "attempts", key, lost)
        for table, batches in held.items():
            columns = [name for name in SCHEMAS[table].names if texts or name not in CALL_TEXTS]
            rows = pa.Table.from_batches(batches, SCHEMAS[table]).select(columns)
            if len(rows) < expected[table]:
                rows = pa.concat_tables([rows, read_records(directory, table, rolled, key, winners, columns)])
            if len(rows) != expected[table]:
                what = f"{len(rows)} rows of the winners of {key[0]} step {key[1]}, not {expected[table]}"
                raise StoreDamaged(str(directory / table), 0, what)
            tables[table] = rows.combine_chunks().sort_by([("rollout_id", "ascending"), ("sequence", "ascending")])
        return tables

    return read


def _hold_replayed(state: State, table: str, batch: pa.RecordBatch) -> None:
    """A logged batch is of one attempt and numbered; one carried over from the segment before may be known already."""
    attempt = state.attempts[batch.column("rollout_id")[0].as_py(), batch.column("attempt")[0].as_py()]
    made = sources_of(batch)
    if not all(attempt.has(table, source) for source in made):
        attempt.hold(table, batch, made)
        state.dirty.add(state.rollouts[attempt.rollout_id].key)


def recall(state: State, attempt: AttemptState, directory: Path, rolled: Rolled) -> None:
    """Complete `attempt.made` with what only the Parquet files know of it."""
    if not attempt.made_whole:
        key = state.rollouts[attempt.rollout_id].key
        for table in RECORDS:
            if getattr(attempt, table):
                rows = read_records(directory, table, rolled, key, {attempt.key}, ["source", "source_sequence"])
                attempt.made.setdefault(table, set()).update(sources_of(rows))
        attempt.made_whole = True
