"""Run a query on a SQLite file so that nothing can be written and nothing runs for long."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
LONGEST_VALUE = 1_000_000  # bytes
MOST_ROWS = 10_000
INSTRUCTIONS_A_LOOK = 10_000  # SQLite instructions between two looks at the clock


class QueryError(Exception):
    """What SQLite said against a query, or that it ran too long or gave too much."""


def run_query(database: str, sql: str, seconds: float = 2.0) -> list[tuple[Any, ...]]:
    """The rows of `sql`, one SELECT, on the SQLite file `database` (a path, relative to this folder).

    Raises QueryError if it fails, takes more than `seconds`, gives more than MOST_ROWS, or would do more than read.
    """
    connection = sqlite3.connect(f"{(HERE / database).resolve().as_uri()}?mode=ro", uri=True)
    try:
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, INSTRUCTIONS_A_LOOK)
        rows = connection.execute(sql).fetchmany(MOST_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: a NUL in the text
        raise QueryError(str(error)) from error
    finally:
        connection.close()
    if len(rows) > MOST_ROWS:
        raise QueryError(f"more than {MOST_ROWS} rows")
    return rows


def columns(database: str) -> dict[str, list[str]]:
    """The tables of the database, each with the names of its columns."""
    connection = sqlite3.connect(f"{(HERE / database).resolve().as_uri()}?mode=ro", uri=True)
    try:
        query = (
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c "
            "WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%' ORDER BY m.rowid, c.cid"
        )
        tables: dict[str, list[str]] = {}
        for table, column in connection.execute(query):
            tables.setdefault(table, []).append(column)
        return tables
    finally:
        connection.close()


def try_query(database: str, sql: str) -> str | None:
    """None if the query gives rows; else what to tell the model: the error, and the columns of the tables it named."""
    try:
        if run_query(database, sql):
            return None
        error = "no rows"
    except QueryError as complaint:
        error = str(complaint)
    named = set(re.findall(r"\w+", sql.lower()))
    return "\n".join(
        [error]
        + [f"{table}: {' '.join(names)}" for table, names in columns(database).items() if table.lower() in named]
    )
