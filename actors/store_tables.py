"""The Parquet files of the replay store, for any reader: `store/TABLE/*.parquet`.

`rollouts` and `attempts` have one file for each mode and step, replaced whole by an atomic rename when a row of it
changed. `calls`, `spans` and `rewards` get new files at each roll, named after the newest log segment rolled into them,
and are never changed. Only the files that the last commit names count (segments.Rolled): another one is half of a roll
that was cut short, the log still has its rows, and recovery deletes it. One that is named and missing is damage.

Each file checks itself: between its pages and its footer, where Parquet readers do not look, stands the CRC32 of all its
other bytes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raygent.actors.segments import SHARD, Rolled, StoreDamaged, sync_folder, write_atomically
from raygent.records import SCHEMAS, UPSTREAM, AttemptKey

StepKey = tuple[str, int]  # mode, step

TEXTS = {
    "rollouts": ("input", "private", "prompts"),
    "attempts": ("error",),
}  # not kept in memory once they are in Parquet
CALL_TEXTS = ("request", "response", "sampling")  # most of a call's bytes, and none that training reads

_TAIL = 8  # the footer's length (4 bytes) and the closing magic
_CRC = 4


def make_folders(directory: Path) -> None:
    """The folders of a store, there for good once this returns."""
    for name in ("log", *SCHEMAS):
        (directory / name).mkdir(parents=True, exist_ok=True)
    sync_folder(directory)
    sync_folder(directory.parent)


def state_name(table: str, key: StepKey) -> str:
    return f"{table}/{key[0]}-{key[1]:06d}-{SHARD}.parquet"


def record_name(table: str, key: StepKey, segment: int) -> str:
    return f"{table}/{key[0]}-{key[1]:06d}-{SHARD}-{segment:06d}.parquet"


def write_parquet(path: Path, table: pa.Table) -> None:
    """All of `table`, safe on disk and under its name before this returns, or nothing under that name."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    raw = sink.getvalue()
    footer = _footer(raw)
    pages, rest = raw.slice(0, footer), raw.slice(footer)
    write_atomically(path, [pages, zlib.crc32(rest, zlib.crc32(pages)).to_bytes(_CRC, "little"), rest])


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Rows of one file, its checksum checked. Raises StoreDamaged."""
    if not path.exists():
        raise StoreDamaged(str(path), 0, "the file is missing")
    raw = pa.py_buffer(path.read_bytes())
    footer = _footer(raw)
    if footer < _CRC:
        raise StoreDamaged(str(path), max(len(raw) - _TAIL, 0), "the length of its footer does not fit the file")
    pages, crc, rest = raw.slice(0, footer - _CRC), raw.slice(footer - _CRC, _CRC), raw.slice(footer)
    if zlib.crc32(rest, zlib.crc32(pages)) != int.from_bytes(crc, "little"):
        raise StoreDamaged(str(path), 0, "its bytes do not match their checksum")
    file = pq.ParquetFile(pa.BufferReader(raw))
    if missing := sorted(set(columns or ()) - set(file.schema_arrow.names)):
        raise StoreDamaged(str(path), 0, f"it has no column {missing[0]}: another version of raygent wrote it")
    return file.read(columns)


def _footer(raw: pa.Buffer) -> int:
    """The offset of a Parquet file's footer."""
    return len(raw) - _TAIL - int.from_bytes(raw[-_TAIL : -_TAIL + 4], "little")


def write_states(directory: Path, table: str, key: StepKey, rows: pa.Table) -> None:
    """Replace the file of `rows`, which keeps its texts where theirs are null."""
    write_parquet(directory / state_name(table, key), with_texts(directory, table, key, rows))


def with_texts(directory: Path, table: str, key: StepKey, rows: pa.Table) -> pa.Table:
    """`rows` of a step with the TEXTS that memory has let go of, which are null there, from their file."""
    if any(rows[name].null_count for name in TEXTS[table]):
        of = [name for name in ("rollout_id", "attempt") if name in rows.column_names]
        old = read_parquet(directory / state_name(table, key), [*of, *TEXTS[table]]).to_pylist()
        texts = {tuple(row[name] for name in of): row for row in old}
        keys = list(zip(*(rows[name].to_pylist() for name in of), strict=True))
        for name in TEXTS[table]:
            held = zip(keys, rows[name].to_pylist(), strict=True)
            whole = [texts[key][name] if text is None else text for key, text in held]
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), pa.array(whole, rows.schema.field(place).type))
    return rows


def read_states(directory: Path, table: str, rolled: Rolled) -> Iterator[dict]:
    """The rows of all steps, their texts left out."""
    columns = [name for name in SCHEMAS[table].names if name not in TEXTS["rollouts"]]
    for path in record_files(directory, table, rolled):
        for row in read_parquet(path, columns).to_pylist():
            yield row | {"error": None if row["error"] else ""} if table == "attempts" else row


def record_files(directory: Path, table: str, rolled: Rolled, key: StepKey | None = None) -> list[Path]:
    """The files of `table` that count, of one step or of all."""
    start = f"{table}/{key[0]}-{key[1]:06d}-{SHARD}" if key else f"{table}/"
    return [directory / name for name in sorted(rolled.files) if name.startswith(start)]


def read_records(
    directory: Path,
    table: str,
    rolled: Rolled,
    key: StepKey,
    attempts: set[AttemptKey],
    columns: list[str] | None = None,
) -> pa.Table:
    """The rows of `attempts` (rollout id, number), all of which belong to step `key`, in committed files."""
    wanted = pa.array(sorted({rollout_id for rollout_id, _ in attempts}), pa.string())
    names = columns or SCHEMAS[table].names
    found = [SCHEMAS[table].empty_table().select(names)]
    for path in record_files(directory, table, rolled, key):
        rows = read_parquet(path, columns and list(dict.fromkeys(["rollout_id", "attempt", *columns])))
        rows = rows.filter(pc.is_in(rows["rollout_id"], value_set=wanted))
        pairs = zip(rows["rollout_id"].to_pylist(), rows["attempt"].to_pylist(), strict=True)
        found.append(rows.filter(pa.array([pair in attempts for pair in pairs], pa.bool_())).select(names))
    return pa.concat_tables(found)


def sum_costs(directory: Path, rolled: Rolled, held: list[pa.RecordBatch]) -> dict[str, dict[str, float]]:
    """Dollars that the calls in committed files and those `held` have cost: by upstream, by the source that recorded them."""
    names = ["policy", "source", "cost"]
    parts = [read_parquet(path, names) for path in record_files(directory, "calls", rolled)]
    calls = pa.concat_tables([pa.Table.from_batches(held, SCHEMAS["calls"]).select(names), *parts])
    calls = calls.filter(pc.starts_with(calls["policy"], UPSTREAM))
    costs: dict[str, dict[str, float]] = {}
    for row in calls.group_by(["policy", "source"]).aggregate([("cost", "sum")]).to_pylist():
        costs.setdefault(row["policy"].removeprefix(UPSTREAM), {})[row["source"]] = row["cost_sum"]
    return costs


def check_files(directory: Path, rolled: Rolled) -> None:
    """Every file that counts must be there. Raises StoreDamaged."""
    there = {f"{table}/{entry.name}" for table in SCHEMAS for entry in _entries(directory / table)}
    for name in sorted(rolled.files - there):
        raise StoreDamaged(str(directory / name), 0, "the file is missing")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder)) if folder.is_dir() else []


def discard_uncommitted(directory: Path, rolled: Rolled) -> None:
    """Delete what a roll cut short has left: Parquet files that don't count, temporary files, and logs rolled before."""
    for table in SCHEMAS:
        for entry in _entries(directory / table):
            if entry.name.endswith((".parquet", ".tmp")) and f"{table}/{entry.name}" not in rolled.files:
                os.unlink(entry.path)
    for path in (directory / "log").glob("*.tmp"):
        path.unlink()
    for path in (directory / "log").glob(f"{SHARD}-*.log"):
        if int(path.stem.rpartition("-")[2]) <= rolled.segment:
            path.unlink()
