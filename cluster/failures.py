"""What went wrong in rollouts by the agent's or the grader's own fault, said as soon as it is seen."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from raygent.records import last_line

LINE_CHARACTERS = 300


def failures_to_tell(tables: dict[str, pa.Table], told: set[str]) -> list[str]:
    """A line for each outcome of the attempts that came with an error and is not among `told`, which it then is: how many ended
    so, and the last line of the newest error."""
    rows = [row for row in tables["attempts"].select(["outcome", "error", "finished"]).to_pylist() if row["error"]]
    counts = Counter(row["outcome"] for row in rows)
    newest = {row["outcome"]: row for row in sorted(rows, key=lambda row: row["finished"])}
    lines = [
        f"{outcome}: {counts[outcome]} of {len(tables['rollouts'])} rollouts, the newest: "
        f"{last_line(newest[outcome]['error'])[:LINE_CHARACTERS]} (all: the store's table attempts)"
        for outcome in sorted(newest.keys() - told)
    ]
    told.update(newest)
    return lines
