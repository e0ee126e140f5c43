"""The user's tasks and chats, read from JSONL or Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raygent.config import ConfigError, source_name
from raygent.records import Task

KEYS = ("id", "input", "private")


def load_tasks(path: str | Path | list[str] | None, key: str = "data.train") -> list[Task]:
    """Read the tasks of a file, or of several one behind the other, which are then the tasks' `source`: each row has `id` (unique
    in all of them), `input`, and optionally `private`; none where there is no path.

    Raises ConfigError, naming `key` and the line, for a row that is no task.
    """
    tasks: list[Task] = []
    seen: dict[str, tuple[Path, str]] = {}
    for file in path if isinstance(path, list) else [path] if path else []:
        tasks += _tasks_of(Path(file), key, source_name(file) if isinstance(path, list) else "", seen)
    return tasks


def _tasks_of(path: Path, key: str, source: str, seen: dict[str, tuple[Path, str]]) -> list[Task]:
    """The tasks of one file. `seen`: by id, the file and the place where one stands; these are added."""
    tasks: list[Task] = []
    for place, row in read_rows(path, key):
        if not isinstance(row, dict) or "id" not in row or "input" not in row:
            has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(f'{key}: {path} {place} needs "id" and "input" (and may have "private"), not {has[:120]}')
        if unknown := sorted(set(row) - set(KEYS)):
            raise ConfigError(f"{key}: {path} {place} has {unknown[0]!r}; put it under input or private")
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int) or row["id"] == "":
            raise ConfigError(f"{key}: {path} {place}: the id is a text or a whole number, not {row['id']!r}")
        name = str(row["id"])
        if name in seen:
            file, before = seen[name]
            of = before if file == path else f"{file} {before}"
            raise ConfigError(f"{key}: {path} {place} repeats the id {name!r} of {of}; ids are unique")
        seen[name] = path, place
        tasks.append(Task(name, row["input"], row.get("private"), source))
    if not tasks:
        raise ConfigError(f'{key}: {path} holds no task; a line is {{"id": "1", "input": ..., "private": ...}}')
    return tasks


def read_rows(path: str | Path, key: str) -> list[tuple[str, Any]]:
    """The rows of a JSONL or Parquet file, each with the words for its place. Raises ConfigError where it is not to be read."""
    path = Path(path)
    try:
        return _parquet_rows(path, key) if path.suffix == ".parquet" else _json_rows(path, key)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror or error}") from error


def _json_rows(path: Path, key: str) -> list[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path} is not UTF-8 at byte {error.start}; give JSONL in UTF-8, or Parquet"
        ) from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a JSON text may hold U+2028
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{key}: {path} line {number} is not JSON: {error}; give one row a line") from error
    return rows


def _parquet_rows(path: Path, key: str) -> list[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        json.dumps(rows)
    except pa.ArrowException as error:
        raise ConfigError(f"{key}: {path} is not a whole Parquet file: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key}: {path} holds values that JSON has not: {error}; store them as text") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
