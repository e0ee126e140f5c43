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
    infrastructure rather than as their agents' time-outs, and Serve replaces the replica, as with one that died by itself."""

    def __init__(self, llm: AsyncLLM, silent_s: float) -> None:
        self.llm, self.silent_s = llm, silent_s
        self.question: asyncio.Task[bool] | None = None  # that it answers between two steps
        self.heard = time.monotonic()

    def look(self, busy: bool) -> None:
        """To be called every few seconds, on the event loop. `busy`: it is at something longer than a step, an update say."""
        if self.question is not None and self.question.done():
            if not self.question.cancelled() and (error := self.question.exception()):
                logger.warning("EngineCore's answer is an error: %s", error)
            self.question = None
            self.heard = time.monotonic()
        if busy:
            self.heard = time.monotonic()
        elif self.question is None:
            self.question = asyncio.create_task(self.llm.is_sleeping())
        elif time.monotonic() - self.heard > self.silent_s:
            logger.error(
                "vLLM's EngineCore has answered nothing for %g s (engine.silent_s): it is replaced", self.silent_s
            )
            self._kill()

    def _kill(self) -> None:
        manager = self.llm.engine_core.resources.engine_manager  # type: ignore[attr-defined]
        cores = [psutil.Process(process.pid) for process in manager.processes if process.is_alive()]
        for process in [*(worker for core in cores for worker in core.children(recursive=True)), *cores]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
