"""The reward: does the agent's query give the rows that the gold query gives?"""

from __future__ import annotations

from collections import Counter
from typing import Any

from database import QueryError, run_query


def rows_equal(task: dict[str, str], private: dict[str, Any], output: Any) -> float:
    """1.0 if the query `output` gives the rows of `private["sql"]` on the task's database, else 0.0.

    The order of the rows counts only where `private["ordered"]` says so. Raises QueryError if the gold query fails.
    """
    wanted = rounded(run_query(task["database"], private["sql"]))
    if not isinstance(output, str):
        return 0.0
    try:
        given = rounded(run_query(task["database"], output))
    except QueryError:
        return 0.0
    return float(given == wanted if private["ordered"] else Counter(given) == Counter(wanted))


def rounded(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows with their real numbers to 6 digits, so that the order in which a sum was added up does not matter."""
    return [tuple(float(f"{value:.6g}") if isinstance(value, float) else value for value in row) for row in rows]
