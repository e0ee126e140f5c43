"""Agents' processes that are kept from rollout to rollout (`agent.persistent`), since starting one takes long.

Such a process has one rollout at a time. For each it reads a line of JSON, the variables that it would find in its environment
were it started for that rollout, and answers with a line {"output": ...}, or {"error": "..."} where it failed. Other lines are what
it printed. Over a limit it is killed, and another one is started.
"""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raygent.actors.subprocess_agent import (
    KEPT_BYTES,
    CommandEnd,
    Supervised,
    Tail,
    agent_variables,
    base_environment,
    command_of,
    read_events,
)
from raygent.callables import ModelEndpoint
from raygent.config import Config
from raygent.emit import EVENTS_BYTES

Row = dict[str, Any]


class PersistentAgents:
    """Those of one worker, as many as it has had rollouts at once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.idle: queue.SimpleQueue[PersistentAgent] = queue.SimpleQueue()

    def run(self, task_input: Any, endpoint: ModelEndpoint, started: Callable[[Supervised], None]) -> CommandEnd:
        """One rollout; blocks. `started` gets the handle to stop its process with. Raises OSError where none can be started."""
        folder = tempfile.TemporaryDirectory(prefix="raygent-events-", ignore_cleanup_errors=True)
        with folder, (Path(folder.name) / "events.jsonl").open("w+b") as events:
            agent = self._take()
            started(agent.supervised)
            variables = agent_variables(self.config, task_input, endpoint, events.name)
            answer, printed = agent.ask(variables)
            if answer is None:
                return agent.end(printed, read_events(events))
            end = CommandEnd(0, printed, agent.said(), read_events(events), answer=answer)
            self.idle.put(agent)
            return end

    def _take(self) -> PersistentAgent:
        while True:
            try:
                agent = self.idle.get_nowait()
            except queue.Empty:
                return PersistentAgent(self.config)
            if agent.supervised.process.poll() is None:
                return agent
            agent.supervised.stop()

    def close(self) -> None:
        """End those that are idle; the others end with their rollouts, or with this process."""
        while not self.idle.empty():
            self.idle.get_nowait().supervised.stop()


class PersistentAgent:
    def __init__(self, config: Config) -> None:
        self.supervised = Supervised(
            command_of(config),
            config.folder,
            base_environment(config),
            config.agent.memory_mb or 0,
            config.agent.processes or 0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.supervised.process.stderr
        self.stderr = Tail(self.supervised.process.stderr)

    def ask(self, variables: dict[str, str]) -> tuple[Row | None, str]:
        """Its answer, None where it ended before it gave one, and the end of what it printed until then."""
        process, printed = self.supervised.process, b""
        assert process.stdin and process.stdout
        self.stderr.kept = b""
        try:
            process.stdin.write(json.dumps(variables).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None, ""
        while line := process.stdout.readline(EVENTS_BYTES + 1):
            if (answer := _answer_in(line)) is not None:
                return answer, printed.decode(errors="replace")
            printed = (printed + line)[-KEPT_BYTES:]
        return None, printed.decode(errors="replace")

    def said(self) -> str:
        """The end of what it wrote to stderr in this rollout, as far as it has come here."""
        return self.stderr.kept.decode(errors="replace")

    def end(self, printed: str, events: list[Row]) -> CommandEnd:
        """Of a process that has ended, or closed its output."""
        over = self.supervised.over()
        self.supervised.stop()
        code = self.supervised.process.wait()
        return CommandEnd(code, printed, self.stderr.text(), events, over)


def _answer_in(line: bytes) -> Row | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() & {"output", "error"} else None
