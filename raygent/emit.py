"""Rewards, spans and names from inside an agent: no-ops outside a run.

    raygent.emit_reward(0.5, components={"rows": 1.0, "order": 0.0})
    with raygent.span("search", query=text) as attributes:
        attributes["hits"] = len(search(text))

    client = AsyncOpenAI(http_client=httpx.AsyncClient(event_hooks={"request": [raygent.tag]}))

    @raygent.agent("planner")
    async def plan(question):
        ...  # what the client asks for here is planner's

Within a run they go to the sink of the running attempt, found by a context variable: in the agent's own thread, task,
and the tasks and `asyncio.to_thread` calls it starts. A thread that the agent starts itself finds it when it runs in
`contextvars.copy_context()`. In a subprocess of a run they go to the file that RAYGENT_EVENTS names.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import numbers
import os
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

EVENTS_FILE = "RAYGENT_EVENTS"
EVENTS_BYTES = 16 << 20  # of what stands in it
MOST = 1e12  # of a reward or a component: squares and sums of these are still numbers, in float32 too
AWAITED = "raygent.awaited"  # an attribute of an event that is not the work: what the function returned is awaited yet
AGENT_HEADER = "x-raygent-agent"
F = TypeVar("F", bound=Callable[..., Any])
Sink = Callable[[str, dict[str, Any]], None]  # (table "rewards" or "spans", the record's own fields)

sink: ContextVar[Sink | None] = ContextVar("raygent_sink", default=None)
acting: ContextVar[str] = ContextVar("raygent_agent", default="")  # the agent whose function runs


def emit_reward(
    value: float,
    name: str = "reward",
    agent: str = "",
    components: dict[str, float] | None = None,
    call: int | None = None,
) -> None:
    """Record a reward of the running rollout, of one of its agents by name, or of one model call.

    `call`: which call of the rollout, from 0 in the order of their replies; with `agent`, which of that agent's. The last one
    named "reward" without agent and call is the rollout's, unless a grader or the agent's return value gives it.
    Raises, within a run, TypeError or ValueError where a value is no finite number, or `call` none from 0 on.
    """
    if in_run():
        _emit("rewards", reward_fields(value, name, agent, components, call))


def reward_fields(
    value: Any, name: str = "reward", agent: str = "", components: dict[str, Any] | None = None, call: Any = None
) -> dict[str, Any]:
    """A reward's own fields, of now. Raises TypeError or ValueError as emit_reward does."""
    whole = not isinstance(call, bool) and isinstance(call, numbers.Integral)
    if call is not None and not (whole and 0 <= int(call) < 2**31):
        raise ValueError(f"a reward's call is a number from 0 on, not {call!r}")
    return {
        "value": finite(value, "a reward"),
        "name": str(name),
        "agent": str(agent or ""),
        "components": {str(key): finite(part, f"the component {key!r}") for key, part in (components or {}).items()},
        "call_sequence": -1 if call is None else int(call),
        "time": time.time(),
    }


class span:
    """Record what happens inside as one event: `with span(...) as attributes`, a dict that takes more of them. Also a decorator
    of a function, sync or async, each call of which is an event. Raises TypeError for a generator."""

    def __init__(self, name: str, /, kind: str = "note", **attributes: Any) -> None:
        self.of = (name, kind, attributes)

    def __enter__(self) -> dict[str, Any]:
        name, kind, attributes = self.of
        self.event = _event(name, kind, dict(attributes))
        return self.event.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.event.__exit__(*raised)

    def __call__(self, function: F) -> F:
        name, kind, attributes = self.of
        return _within(lambda: _event(name, kind, dict(attributes)), function, "span")


@contextmanager
def _event(name: str, kind: str, attributes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    started = time.time()
    try:
        yield attributes
    except BaseException as error:
        attributes["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        times = {"started": started, "finished": time.time()}
        if not attributes.pop(AWAITED, False):
            _emit("spans", {"kind": str(kind), "name": str(name), "attributes": attributes} | times)


def agent(name: str) -> Callable[[F], F]:
    """A decorator of a function, sync or async: in a run its work is a span of kind "agent" under `name`, and model calls by
    clients with `tag` or `headers()` are recorded, rewarded and trained as those of the agent `name`.

    Raises ValueError for a name that no HTTP header can hold, TypeError for a generator, whose work ends after its call.
    """
    if not (name.isascii() and name.isprintable() and name == name.strip() and name):
        raise ValueError(f"@agent: {name!r} goes into an HTTP header; use printable ASCII without spaces around it")

    @contextmanager
    def at_work() -> Iterator[dict[str, Any]]:
        if not in_run():
            yield {}
            return
        token = acting.set(name)
        try:
            with span(name, kind="agent") as attributes:
                yield attributes
        finally:
            acting.reset(token)

    return lambda function: _within(at_work, function, "agent")


def _within(context: Callable[[], AbstractContextManager[Any]], function: Any, decorator: str) -> Any:
    """`function`, each call of it in a context of its own. Raises TypeError for a generator."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"@{decorator}: {function.__qualname__} is a generator; mark the function that goes through it")

    async def finish(result: Awaitable[Any]) -> Any:
        with context():
            return await result

    def call(*positional: Any, **named: Any) -> Any:
        with context() as attributes:
            result = function(*positional, **named)
            if not inspect.isawaitable(result):
                return result
            attributes[AWAITED] = True
        return finish(result)

    async def call_async(*positional: Any, **named: Any) -> Any:
        with context():
            return await function(*positional, **named)

    of_class = getattr(type(function), "__call__", None)  # noqa: B004 - of an object that is called
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(of_class)
    return functools.update_wrapper(call_async if is_async else call, function)


def headers() -> dict[str, str]:
    """For a client's model calls, where it takes headers by call: the name of the agent that runs, if one does."""
    return {AGENT_HEADER: acting.get()} if acting.get() else {}


def tag(request: Any) -> Awaitable[None]:
    """A request hook for httpx.Client and httpx.AsyncClient, which openai and anthropic are built on: adds `headers()`."""
    for name, value in headers().items():
        request.headers.setdefault(name, value)
    return _Nothing()


class _Nothing:
    """What AsyncClient awaits, and Client leaves alone."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


def finite(value: Any, what: str) -> float:
    """`value` as a float; True is 1. Raises TypeError for no number, ValueError for nan, infinities and what is beyond MOST."""
    value = scalar(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is a number, not {type(value).__name__} {str(value)[:80]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MOST:  # nor is nan
        raise ValueError(f"{what} is {number:g}; it has to be finite, and within +-{MOST:g}")
    return number


def scalar(value: Any) -> Any:
    """One number of numpy's or torch's as Python's own; else `value` itself."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def in_run() -> bool:
    return sink.get() is not None or EVENTS_FILE in os.environ


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
    except Exception as error:  # noqa: BLE001 - a span's attributes, whose __str__ may raise anything; all else is JSON
        line = json.dumps(event | {"attributes": {"not_json": f"{type(error).__name__}: {error}"}})
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:  # the agent has cleaned up
        return
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)
