"""Rewards and spans from inside an agent: no-ops outside a run.

    raygent.emit_reward(0.5, components={"rows": 1.0, "order": 0.0})
    with raygent.span("search", query=text) as attributes:
        attributes["hits"] = len(search(text))

Within a run they go to the sink of the running attempt, found by a context variable: in the agent's own thread, task,
and the tasks and `asyncio.to_thread` calls it starts. A thread that the agent starts itself finds it when it runs in
`contextvars.copy_context()`. In a subprocess of a run they go to the file that RAYGENT_EVENTS names.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

EVENTS_FILE = "RAYGENT_EVENTS"
Sink = Callable[[str, dict[str, Any]], None]  # (table "rewards" or "spans", the record's own fields)

sink: ContextVar[Sink | None] = ContextVar("raygent_sink", default=None)


def emit_reward(
    value: float, name: str = "reward", agent: str = "", components: dict[str, float] | None = None
) -> None:
    """Record a reward of the running rollout, or of one of its agents by name.

    The last one named "reward" without an agent is the rollout's, unless a grader or the agent's return value gives it.
    Raises TypeError or ValueError where a value is no finite number.
    """
    fields = {
        "value": finite(value, "a reward"),
        "name": str(name),
        "agent": str(agent or ""),
        "components": {str(key): finite(part, f"the component {key!r}") for key, part in (components or {}).items()},
        "time": time.time(),
    }
    _emit("rewards", fields)


@contextmanager
def span(name: str, kind: str = "note", **attributes: Any) -> Iterator[dict[str, Any]]:
    """Record what happens inside as one event; the dict it yields takes more attributes. Also a decorator."""
    started = time.time()
    try:
        yield attributes
    except BaseException as error:
        attributes["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        times = {"started": started, "finished": time.time()}
        _emit("spans", {"kind": str(kind), "name": str(name), "attributes": attributes} | times)


def finite(value: Any, what: str) -> float:
    """`value` as a float; True is 1. Raises TypeError for no number, ValueError for nan, infinities and what is beyond them."""
    value = scalar(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is a number, not {type(value).__name__} {str(value)[:80]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; it has to be finite")
    return number


def scalar(value: Any) -> Any:
    """One number of numpy's or torch's as Python's own; else `value` itself."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _emit(table: str, fields: dict[str, Any]) -> None:
    here = sink.get()
    if here is not None:
        here(table, fields)
    elif EVENTS_FILE in os.environ:
        append_event(os.environ[EVENTS_FILE], {"table": table} | fields)


def append_event(path: str, event: dict[str, Any]) -> None:
    """One JSON line with one write(), so that lines of several processes do not mix."""
    try:
        line = json.dumps(event, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a span's attributes: all else is known to be JSON
        line = json.dumps(event | {"attributes": {"not_json": f"{type(error).__name__}: {error}"}})
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)
