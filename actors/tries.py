"""Asking an endpoint over HTTP again: which answers are none, and how long to wait before the next try."""

from __future__ import annotations

import math
import random
import time
from email.utils import parsedate_to_datetime

import httpx

FIRST_WAIT_S, MOST_WAIT_S = 0.5, 30.0  # between tries, where the endpoint does not say
SHOWN = 300  # characters of an endpoint's error


class Unanswered(Exception):
    """A try that gave nothing; `wait_s` is how long the endpoint asks to be left alone, 0 where it does not say. `mistake`: the
    status that tells of a mistake in the config."""

    def __init__(self, why: str, wait_s: float = 0.0, mistake: int = 0) -> None:
        super().__init__(why)
        self.wait_s, self.mistake = wait_s, mistake


def check_answered(response: httpx.Response) -> None:
    """Raises Unanswered for a reply, read already, that says no more than to come again: the endpoint is busy, or broken."""
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        raise Unanswered(f"HTTP {status}: {beginning(response)}", _retry_after(response.headers))


def beginning(response: httpx.Response) -> str:
    """Of what it says, whatever encoding it claims to have."""
    return response.content[: 4 * SHOWN].decode("utf-8", "replace")[:SHOWN]


def wait_before_next(error: Unanswered, tries: int) -> float:
    """Seconds to wait after so many `tries`: as the endpoint asks, or twice as long each time, at random by half."""
    own = min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries, 10)) * random.uniform(0.5, 1)
    return error.wait_s or own


def _retry_after(headers: httpx.Headers) -> float:
    """How many seconds the endpoint asks to wait; 0 where it does not say."""
    told = headers.get("retry-after", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
