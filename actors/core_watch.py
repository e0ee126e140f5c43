"""A watch over vLLM's EngineCore: one that hangs, as on a GPU or a collective that never comes back, tells nobody, and one that
died tells its log alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("raygent.engine")
STDERR = Path("/proc/self/fd/2")  # a file, in Ray's workers; EngineCore writes to it too
TAIL = 64 << 10
MOST_GAP_S = 15.0  # between two looks, as far as it counts: three of Serve's health checks
UPDATE_S = 600.0  # of a part of an update, for which the engine's handle waits half as long
ERROR = re.compile(r"^\((?:EngineCore|Worker)[^)]*\) ([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE)


def why_it_died(stderr: Path = STDERR) -> str:
    """The last error that EngineCore, or a worker of its own, has written."""
    try:
        with stderr.open("rb") as file:
            file.seek(max(0, stderr.stat().st_size - TAIL))
            errors = ERROR.findall(file.read().decode(errors="replace"))
    except OSError:  # no file, or none that can be sought in
        errors = []
    return errors[-1] if errors else "it was killed, or ended without a word"


class CoreWatch:
    """Kills an EngineCore that has answered nothing for `silent_s` seconds: the calls that wait for it fail then, as failures of
    infrastructure rather than as their agents' time-outs, and Serve replaces the replica, as with one that died by itself.

    `why`: of the one that was killed; "" as long as none was.
    """

    def __init__(self, llm: AsyncLLM, silent_s: float) -> None:
        self.llm, self.silent_s, self.why = llm, silent_s, ""
        self.question: asyncio.Task[bool] | None = None  # that it answers between two steps
        self.busy = False
        self.looked, self.silent = time.monotonic(), 0.0

    def look(self, busy: bool) -> None:
        """To be called every few seconds, on the event loop. `busy`: it is at an update, of which a part may take longer than a
        step. Raises RuntimeError where one that was killed is still there: no signal ends what waits for a driver."""
        if self.why:
            raise RuntimeError(self.why)
        now = time.monotonic()
        gap, self.looked = min(now - self.looked, MOST_GAP_S), now  # a loop that stood still tells nothing of the core
        if self.question is None or self.question.done():
            if self.question and not self.question.cancelled() and (error := self.question.exception()):
                logger.warning("EngineCore's answer is an error: %s", error)
            self.question, self.silent = asyncio.create_task(self.llm.is_sleeping()), 0.0
        elif busy != self.busy:
            self.silent = 0.0
        else:
            self.silent += gap
            if self.silent > (max(self.silent_s, UPDATE_S) if busy else self.silent_s):
                self.why = f"vLLM's EngineCore answered nothing for {self.silent:.0f} s, longer than engine.silent_s"
                logger.error("%s: it is replaced", self.why)
                self._kill()
        self.busy = busy

    def _kill(self) -> None:
        manager = self.llm.engine_core.resources.engine_manager  # type: ignore[attr-defined]
        for core in manager.processes:
            with contextlib.suppress(psutil.Error):
                for worker in psutil.Process(core.pid).children(recursive=True):
                    worker.kill()
            core.kill()
