"""A watch over vLLM's EngineCore: one that hangs, as on a GPU or a collective that never comes back, tells nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("raygent.engine")


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
