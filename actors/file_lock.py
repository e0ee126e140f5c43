"""The lock by which a store's folder has one process that writes to it."""

from __future__ import annotations

import fcntl
import time
from typing import Any

POLL_S = 0.05


def lock(file: Any, wait_s: float) -> bool:
    """Hold `file` (a descriptor, or an open file) until it is closed. False where another process held it for `wait_s`
    seconds."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(POLL_S)
