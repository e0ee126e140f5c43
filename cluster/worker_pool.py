"""WorkerPool: as many RolloutWorkers as the queue asks for, between workers.min and workers.max.

A thread of the driver, so that it ends with it; the actors are the driver's, so that they do too. An actor that Ray cannot
place yet is what tells the autoscaler to add a node; one that has ended gives its node back.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raygent.actors.rollout_worker import make_worker
from raygent.config import Config
from raygent.records import last_line

logger = logging.getLogger("raygent")
LOOK_S = 0.5
FAILED_START_S = 5.0  # a worker that ended sooner is not replaced at once
SOON_S, MOST_SOON = 30.0, 20  # so many workers in a row that ended within this time: the next will too


class WorkerPool:
    """`start` and `stop` are the driver's; `sizes` and `broken` may be read at any time."""

    def __init__(self, config: Config, store: Any, engine: Any, secret: str) -> None:
        self.config = config
        self.store = store
        self.engine = engine
        self.secret = secret
        self.workers: dict[Any, tuple[Any, str, float]] = {}  # the ref of run() -> actor, name, when it was made
        self.leaving: set[Any] = set()  # told to stop
        self.made = 0
        self.replaced = 0
        self.soon = 0  # workers in a row that ended soon after their start
        self.broken = ""  # why no worker stays, where none does
        self.enough_since = time.monotonic()  # when the queue last asked for all there are
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="worker pool", daemon=True)

    def start(self) -> None:
        """Make the first workers (Ray places them when it can), then follow the queue."""
        for _ in range(self.config.workers.min):
            self._make()
        self._thread.start()

    def stop(self) -> None:
        """End the workers now, with what they run; sealed attempts are in the store."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        for actor, _, _ in self.workers.values():
            ray.kill(actor)
        self.workers.clear()

    def sizes(self) -> dict[str, int]:
        return {"workers": len(self.workers), "workers_made": self.made, "workers_replaced": self.replaced}

    def _follow(self) -> None:
        while not self._end.wait(LOOK_S):
            self._bury()
            try:
                status = ray.get(self.store.status.remote(), timeout=30)
            except (GetTimeoutError, RayError) as error:
                logger.warning("worker pool: the store does not answer: %s", type(error).__name__)
                continue
            self._resize(status["queued"] + status["running"])

    def _bury(self) -> None:
        """Forget the workers that ended; a dead one is replaced."""
        if not self.workers:
            return
        ended, _ = ray.wait(list(self.workers), num_returns=len(self.workers), timeout=0)
        for ref in ended:
            actor, name, made = self.workers.pop(ref)
            try:
                why = ray.get(ref)
            except RayError as error:
                why = last_line(error)
            ray.kill(actor)
            if ref in self.leaving:
                self.leaving.discard(ref)
                continue
            self.replaced += 1
            logger.warning("%s ended: %s", name, why)
            self.soon = self.soon + 1 if time.monotonic() - made < SOON_S else 0
            if self.soon >= MOST_SOON:
                self.broken = f"{self.soon} rollout workers in a row ended soon after their start, the last with: {why}"
            if time.monotonic() - made < FAILED_START_S:
                self._end.wait(FAILED_START_S)
            if not self._end.is_set():
                self._make()

    def _resize(self, open_rollouts: int) -> None:
        bounds, there = self.config.workers, len(self.workers) - len(self.leaving)
        wanted = max(bounds.min, min(bounds.max, math.ceil(open_rollouts / bounds.rollouts_each)))
        if wanted >= there:
            self.enough_since = time.monotonic()
        for _ in range(wanted - there):
            self._make()
        if time.monotonic() - self.enough_since > bounds.idle_s:
            for ref in [ref for ref in self.workers if ref not in self.leaving][wanted:]:
                self.leaving.add(ref)
                self.workers[ref][0].stop.remote()

    def _make(self) -> None:
        self.made += 1
        name = f"worker-{self.made}"
        actor = make_worker(self.config, self.store, self.engine, self.secret, name)
        self.workers[actor.run.remote()] = (actor, name, time.monotonic())
