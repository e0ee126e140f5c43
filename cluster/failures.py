"""What went wrong in rollouts, said as soon as it is seen: by the agent's or the grader's own fault, or by infrastructure's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from raygent.records import last_line

LINE_CHARACTERS = 300


def failures_to_tell(tables: dict[str, pa.Table], told: set[str]) -> list[str]:
    """A line for each outcome of the attempts that came with an error and is not among `told`, which it then is: how many ended
    so, and the last line of the newest error."""
    rows = [row for table in ("attempts", "lost") for row in _with_error(tables[table])]
    counts = Counter(row["outcome"] for row in rows)
    newest = {row["outcome"]: row for row in sorted(rows, key=lambda row: row["finished"])}
    lines = [
        f"{outcome}: {counts[outcome]} of {len(tables['rollouts'])} rollouts, the newest: "
        f"{last_line(newest[outcome]['error'])[:LINE_CHARACTERS]} (all: the store's table attempts)"
        for outcome in sorted(newest.keys() - told)
    ]
    told.update(newest)
    return lines


def why_lost(tables: dict[str, pa.Table]) -> str:
    """The newest error of what infrastructure lost; "" where none says anything."""
    rows = sorted(_with_error(tables["lost"]), key=lambda row: row["finished"])
    return f"{rows[-1]['outcome']}: {last_line(rows[-1]['error'])[:LINE_CHARACTERS]}" if rows else ""


def _with_error(attempts: pa.Table) -> list[dict[str, Any]]:
    return [row for row in attempts.select(["outcome", "error", "finished"]).to_pylist() if row["error"]]
