"""The grader's calls, each under `grader.timeout_s`.

A sync grader runs in processes of its own, so that one that hangs can be ended (a thread cannot) and its prints and
crashes stay there; an async one runs as a task, many at once. `grade_once` is for --dry-run.

Run as a program, this file is such a process: a JSON line in, a JSON line out.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygent.actors.subprocess_agent import Supervised, scrubbed_environment
from raygent.callables import GRADER_OFFERS, TEXT, Verdict, arguments, awaited, is_async, load_callable, read_verdict
from raygent.config import Config

MOST_PROCESSES = 8  # of one worker
IMPORT_S = 120.0  # for a process's import of the grader: no time of a call's
DIED = "the grader ended its process (an exit, a crash, or too little memory); its last words are in the worker's log"
SPAWN_AFTER_S = 0.1  # a free process is waited for so long before another one is started


class GraderError(Exception):
    """The grader raised, hung, or gave no finite number: what to tell the user."""


@dataclass(frozen=True)
class Graded:
    verdict: Verdict
    seconds: float


class Grader:
    """`config.grader`, ready to be called. Raises ConfigError where it cannot be imported."""

    def __init__(self, config: Config, at_once: int) -> None:
        assert config.grader.run is not None
        self.config = config
        self.function = load_callable(config.grader.run, config.folder, "grader.run")
        arguments(self.function, GRADER_OFFERS, (None, None, None), "grader.run")
        self.is_async = is_async(self.function)
        self.most = min(at_once, MOST_PROCESSES)
        self.idle: queue.Queue[GraderProcess] = queue.Queue()
        self.started = 0
        self.lock = threading.Lock()
        self.threads = ThreadPoolExecutor(at_once, thread_name_prefix="grader")

    async def grade(self, task_input: Any, private: Any, output: Any) -> Graded:
        """The reward of `output` (a JSON value). Raises GraderError."""
        started = time.monotonic()
        if self.is_async:
            value = await self._in_task(task_input, private, output)
        else:
            loop = asyncio.get_running_loop()
            value = await loop.run_in_executor(self.threads, self._in_process, (task_input, private, output))
        return Graded(read(value), time.monotonic() - started)

    async def _in_task(self, *values: Any) -> Any:
        positional, named = arguments(self.function, GRADER_OFFERS, values, "grader.run")
        task = asyncio.ensure_future(self.function(*positional, **named))
        done, _ = await asyncio.wait({task}, timeout=self.config.grader.timeout_s)
        if not done:
            task.cancel()
            raise GraderError(timed_out(self.config))
        if task.cancelled():
            raise GraderError("the grader was cancelled")
        if error := task.exception():
            raise GraderError("".join(traceback.format_exception(error))[-TEXT:])
        return task.result()

    def _in_process(self, values: tuple[Any, Any, Any]) -> Any:
        process = self._take()
        try:
            return process.call(values, self.config.grader.timeout_s)
        except GraderProcessEnded as ended:
            raise GraderError(str(ended)) from None
        finally:
            if process.ended:
                with self.lock:
                    self.started -= 1
            else:
                self.idle.put(process)

    def _take(self) -> GraderProcess:
        while True:
            try:
                process = self.idle.get(timeout=SPAWN_AFTER_S if self.started else 0)
                if process.supervised.process.poll() is None:
                    return process
                process.stop()  # it was killed while it was idle, which is no fault of what is graded next
                with self.lock:
                    self.started -= 1
            except queue.Empty:
                with self.lock:
                    if self.started == self.most:
                        continue
                    self.started += 1
                try:
                    return GraderProcess(self.config)
                except OSError:  # no process can be started: its place is free again
                    with self.lock:
                        self.started -= 1
                    raise

    def close(self) -> None:
        """Ends the idle processes; the others end with this process."""
        while not self.idle.empty():
            self.idle.get().stop()
        self.threads.shutdown(wait=False, cancel_futures=True)


class GraderProcessEnded(Exception):
    """A grader's process hung or died; it is of no more use."""


class GraderProcess:
    """A process that has imported the grader, or is about to: the first call waits for that."""

    def __init__(self, config: Config) -> None:
        assert config.grader.run is not None
        self.config = config
        self.ended = False
        self.ready = False
        self.supervised = Supervised(
            [sys.executable, "-m", "raygent.actors.grading", config.grader.run],
            config.folder,
            scrubbed_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(self, values: tuple[Any, Any, Any], timeout_s: float) -> Any:
        """Raises GraderError where the grader raised; GraderProcessEnded, then it is of no more use, where it hung or died."""
        try:
            if not self.ready:
                self._read(time.monotonic() + IMPORT_S)
                self.ready = True
            reply = self._ask(json.dumps(values).encode() + b"\n", time.monotonic() + timeout_s)
        except GraderProcessEnded:
            self.stop()
            raise
        if "error" in reply:
            raise GraderError(reply["error"])
        return reply["value"]

    def _ask(self, line: bytes, deadline: float) -> dict[str, Any]:
        assert self.supervised.process.stdin is not None
        try:
            self.supervised.process.stdin.write(line)
            self.supervised.process.stdin.flush()
        except BrokenPipeError:
            raise GraderProcessEnded(DIED) from None
        return self._read(deadline)

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self.supervised.process.stdout is not None
        file, line = self.supervised.process.stdout.fileno(), b""
        poll = select.poll()
        poll.register(file, select.POLLIN | select.POLLHUP)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise GraderProcessEnded(timed_out(self.config))
            chunk = os.read(file, 1 << 16)
            if not chunk:
                raise GraderProcessEnded(DIED)
            line += chunk
        return json.loads(line)

    def stop(self) -> None:
        self.ended = True
        self.supervised.stop()
        self.supervised.process.wait()
        for stream in (self.supervised.process.stdin, self.supervised.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not yet flushed
                    stream.close()


def timed_out(config: Config) -> str:
    return f"the grader took more than grader.timeout_s = {config.grader.timeout_s:g} s"


def read(value: Any) -> Verdict:
    try:
        verdict = read_verdict(value, "the grader")
    except (TypeError, ValueError) as error:
        raise GraderError(str(error)) from error
    if verdict is None:
        raise GraderError(f"the grader gave {str(value)[:80]!r}; it returns a number or a dict with one at 'reward'")
    return verdict


def grade_once(config: Config, task_input: Any, private: Any, output: Any) -> Graded:
    """One call of the grader outside a run. Raises ConfigError for an import, GraderError for the call."""
    grader = Grader(config, 1)
    try:
        return asyncio.run(grader.grade(task_input, private, output))
    finally:
        grader.close()


def serve(run: str) -> None:
    """The grader's process: answers until its input ends. The grader's own prints go to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    function = load_callable(run, Path.cwd(), "grader.run")
    print("{}", file=replies, flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(answer(function, json.loads(line))), file=replies, flush=True)


def answer(function: Any, values: list[Any]) -> dict[str, Any]:
    positional, named = arguments(function, GRADER_OFFERS, tuple(values), "grader.run")
    try:
        value = function(*positional, **named)
        if inspect.isawaitable(value):
            value = asyncio.run(awaited(value))
        verdict = read(value)
    except Exception:  # noqa: BLE001 - the user's code may raise anything; it is the reply
        return {"error": traceback.format_exc()[-TEXT:]}
    return {"value": verdict.to_dict()}


if __name__ == "__main__":
    serve(sys.argv[1])
