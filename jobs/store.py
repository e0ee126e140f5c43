"""`raygent store inspect|verify RUN`: what a run's store holds, and whether it is whole. Reads files, starts nothing.

The run may be over, killed, or going on. See docs/store.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa

from raygent.actors.segments import KINDS, RECORDS, Contents, Rolled, StoreDamaged
from raygent.actors.store_state import State, read_store
from raygent.actors.store_tables import read_parquet, record_files
from raygent.cluster.prompt_table import file_of
from raygent.records import SCHEMAS, AttemptKey

LOOKS = 5  # at a store that goes on


def store_folder(run: Path) -> Path:
    return run / "store" if (run / "store").is_dir() else run


def inspect(run: Path) -> int:
    """Print rows and bytes of each table, what is in the log alone, rollouts by status and attempts by outcome."""
    folder = store_folder(run)
    try:
        state, contents, rolled = _read(folder)
        for table in SCHEMAS:
            paths = record_files(folder, table, rolled)
            rows = sum(len(read_parquet(path, [])) for path in paths)
            size = sum(path.stat().st_size for path in paths)
            print(f"{table:9} {rows:8} rows in {len(paths)} Parquet files, {size:,} bytes")
        if (file := file_of(folder)).is_file():
            print(f"prompts   {len(read_parquet(file, [])):8} rows in 1 Parquet files, {file.stat().st_size:,} bytes")
    except StoreDamaged as damage:
        print(f"damaged: {damage}")
        return 1
    for segment in contents:
        kinds = Counter(KINDS[frame.kind] for frame in segment.frames)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        print(f"log/{segment.path.name}: {segment.end:,} bytes, frames: {told}")
    for table, values in (
        ("rollouts", [rollout.status for rollout in state.rollouts.values()]),
        ("attempts", [attempt.outcome or "running" for attempt in state.attempts.values()]),
    ):
        counted = ", ".join(f"{count} {name}" for name, count in Counter(values).most_common())
        print(f"{table}, log and Parquet: {len(values)}{': ' if counted else ''}{counted}")
    return 0


def _read(folder: Path) -> tuple[State, list[Contents], Rolled]:
    """read_store(), a second time where a store that goes on took a file away between. Raises StoreDamaged."""
    try:
        return read_store(folder)
    except (StoreDamaged, FileNotFoundError):
        return read_store(folder)


def verify(run: Path) -> int:
    """Read every byte: checksums of frames and files, each attempt against the records it counts. 1 where one is wrong.

    A store that goes on changes between the readings of two files: a fault is what two looks, one after the other, agree on.
    """
    folder = store_folder(run)
    before: list[str] = []
    for _ in range(LOOKS):
        found, told = _look(folder)
        faults = [fault for fault in found if fault in before]
        if faults or not found:
            break
        before = found
    else:
        print("\n".join(f"unsure: {fault}" for fault in found))
        print(f"{told}: each of {LOOKS} looks found something else; ask again when the run is not so busy")
        return 1
    for fault in faults:
        print(f"damaged: {fault}")
    print(f"{told}: {'damaged' if faults else 'whole'}")
    return 1 if faults else 0


def _look(folder: Path) -> tuple[list[str], str]:
    """What is wrong, and how much was read."""
    try:
        state, contents, rolled = read_store(folder)
        faults = _winners_missing(folder, state) + _miscounted(folder, state, rolled)
        rows = sum(len(read_parquet(path)) for table in SCHEMAS for path in record_files(folder, table, rolled))
        rows += len(read_parquet(file_of(folder))) if file_of(folder).is_file() else 0
    except (StoreDamaged, FileNotFoundError) as damage:
        return [str(damage)], "not read to the end"
    frames = sum(len(segment.frames) for segment in contents)
    return faults, f"{rows} rows in Parquet, {frames} frames in the log"


def _miscounted(folder: Path, state: State, rolled: Rolled) -> list[str]:
    """Attempts that do not have as many records as they count, and records of no attempt."""
    faults = []
    for table in RECORDS:
        there: dict[AttemptKey, list[int]] = defaultdict(list)
        for path in record_files(folder, table, rolled):
            for key, sequence in _sequences(read_parquet(path, ["rollout_id", "attempt", "sequence"])):
                there[key].append(sequence)
                if key not in state.attempts:
                    faults.append(f"{path}: a record of attempt {key[1]} of {key[0]}, which no table knows")
        for key, attempt in state.attempts.items():
            for batch in attempt.held.get(table, ()):
                there[key] += [sequence for _, sequence in _sequences(batch)]
            stated = getattr(attempt, table)
            if sorted(there[key]) != list(range(stated)):
                mode, step = state.rollouts[attempt.rollout_id].key
                found, files = len(set(there[key])), f"{folder / table / f'{mode}-{step:06d}-*.parquet'} and log"
                faults.append(f"{files}: {found} of the {stated} {table} of attempt {key[1]} of {key[0]}")
    return faults


def _sequences(rows: pa.Table | pa.RecordBatch) -> list[tuple[AttemptKey, int]]:
    rollouts, attempts, sequences = (rows.column(name).to_pylist() for name in ("rollout_id", "attempt", "sequence"))
    return [((rollout, attempt), n) for rollout, attempt, n in zip(rollouts, attempts, sequences, strict=True)]


def _winners_missing(folder: Path, state: State) -> list[str]:
    """Rollouts that were won by an attempt without a row, or by one that did not win."""
    won = [(rollout, (rollout.rollout_id, rollout.winning_attempt)) for rollout in state.rollouts.values()]
    return [
        f"{folder / 'attempts' / f'{rollout.mode}-{rollout.step:06d}-*.parquet'} and log: {key[0]} was won by attempt "
        f"{key[1]}, of which there is no such row"
        for rollout, key in won
        if key[1] and not (key in state.attempts and state.attempts[key].won)
    ]
