"""Agents' processes that are kept from rollout to rollout (`agent.persistent`), since starting one takes long.

Such a process has one rollout at a time. For each it reads a line of JSON, the variables that it would find in its environment
were it started for that rollout, and answers with a line {"output": ...}, or {"error": "..."} where it failed. Other lines are what
it printed. Over a limit it is killed, and another one is started.
"""

from __future__ import annotations

import json
import queue
import subprocess
from typing import Any

from raygent.actors.subprocess_agent import (
    KEPT_BYTES,
    CommandEnd,
    Supervised,
    Tail,
    agent_variables,
    base_environment,
    command_of,
    events_file,
    read_events,
)
from raygent.callables import ModelEndpoint
from raygent.config import Config
from raygent.emit import EVENTS_BYTES

Row = dict[str, Any]


class PersistentAgent(Supervised):
    """One such process, which waits among the `idle` for its next rollout."""

    def __init__(self, config: Config, idle: queue.SimpleQueue[PersistentAgent]) -> None:
        """Raises OSError where it cannot be started."""
        self.config, self.idle, self.answered = config, idle, False
        super().__init__(
            command_of(config),
            config.folder,
            base_environment(config),
            config.agent.memory_mb or 0,
            config.agent.processes or 0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr
        self.stderr = Tail(self.process.stderr)

    def let_go(self) -> None:
        """Its rollout is over; the process is, too, where it has not answered."""
        if self.answered:
            self.idle.put(self)
        else:
            self.stop()

    def run(self, task_input: Any, endpoint: ModelEndpoint) -> CommandEnd:
        """One rollout; blocks until it is answered or the process has ended."""
        self.answered = False
        with events_file() as events:
            answer, printed = self._ask(agent_variables(self.config, task_input, endpoint, events.name))
            self.answered = answer is not None
            if answer is not None:
                return CommandEnd(0, printed, self.stderr.take(), read_events(events), answer=answer)
            code, said, over = self.process.wait(), self.stderr.text(), self.over()
            self.stop()
            return CommandEnd(code, printed, said, read_events(events), over)

    def _ask(self, variables: dict[str, str]) -> tuple[Row | None, str]:
        """The answer, None where the process ended before it gave one, and the end of what it printed until then."""
        stdin, stdout, printed = self.process.stdin, self.process.stdout, b""
        assert stdin and stdout
        self.stderr.take()  # said between the rollouts
        try:
            stdin.write(json.dumps(variables).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return None, ""
        while line := stdout.readline(EVENTS_BYTES + 1):
            if len(line) > EVENTS_BYTES:
                self.stop()
                return {
                    "error": f"a line of its output is over {EVENTS_BYTES >> 20} MiB; answer with what the grader needs"
                }, ""
            if (answer := _answer_in(line)) is not None:
                return answer, printed.decode(errors="replace")
            printed = (printed + line)[-KEPT_BYTES:]
        return None, printed.decode(errors="replace")


class PersistentAgents:
    """Those of one worker that are idle."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.idle: queue.SimpleQueue[PersistentAgent] = queue.SimpleQueue()

    def take(self) -> PersistentAgent:
        """Raises OSError where none is idle and none can be started."""
        while True:
            try:
                agent = self.idle.get_nowait()
            except queue.Empty:
                return PersistentAgent(self.config, self.idle)
            if agent.process.poll() is None and not agent.stopped:
                return agent
            agent.stop()

    def close(self) -> None:
        while not self.idle.empty():
            self.idle.get_nowait().stop()


def _answer_in(line: bytes) -> Row | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() & {"output", "error"} else None
