"""What an agent's failure was: its own limits, or the engine's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raygent.actors.agent_runner import Ended

MAX_CALLS = "raygent_max_calls"  # the gateway's error code
OVERFLOW = re.compile(r"context_length_exceeded|maximum (context|model) length|prompt is too long", re.IGNORECASE)
NO_CALL = (
    "the agent made no model call with this attempt's endpoint: does it use the base_url and api_key it is given? A "
    'framework with one client for the whole process needs agent.in = "subprocess"'
)
UNANSWERED = "(no call with this attempt's base_url was answered before that)"


def outcome_of(ended: Ended, closed: dict[str, dict[str, Any]]) -> str:
    """The outcome of an agent that did not return: what the replicas refused it (`closed`), or its own failing.

    Where both were refused it, its error text tells which one it failed by.
    """
    if ended.how in ("timeout", "over_memory", "over_processes"):
        return ended.how
    if MAX_CALLS in ended.error:
        return "max_calls"
    if OVERFLOW.search(ended.error):
        return "context_overflow"
    if any(of["over_max_calls"] for of in closed.values()):
        return "max_calls"
    if any(of["overflow"] for of in closed.values()):
        return "context_overflow"
    return "agent_error"


def engine_failed(error: BaseException | None, base_url: str) -> bool:
    """Whether `error`, or what it was raised from, is a lost connection to the engine or its 5xx answer."""
    return any(_of_engine(link, base_url) for link in _chain(error))


def gave_up(error: BaseException | None, base_url: str) -> bool:
    """Whether `error`, or what it was raised from, is that a call took too long for its caller. Of a process, which gives no
    exception, it may be."""
    return error is None or any(_is_timeout(link, base_url) for link in _chain(error))


def _is_timeout(error: BaseException, base_url: str) -> bool:
    request = _request_of(error)
    theirs = request is not None and str(request.url).startswith(base_url) and "Timeout" in type(error).__name__
    return isinstance(error, TimeoutError) or theirs


def _request_of(error: BaseException) -> Any:
    try:  # httpx's `request` raises where there is none
        return getattr(error, "request", None) or getattr(getattr(error, "response", None), "request", None)
    except RuntimeError:
        return None


def _of_engine(error: BaseException, base_url: str) -> bool:
    request = _request_of(error)
    if request is None or not str(request.url).startswith(base_url):
        return False
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    timed_out = "Timeout" in type(error).__name__
    return status >= 500 if status is not None else not timed_out


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
