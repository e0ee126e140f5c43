"""Agents that run as a process of their own: a command in any language, or a Python callable kept apart.

Such a process finds the model in OPENAI_BASE_URL and OPENAI_API_KEY (and ANTHROPIC_*), its task in RAYGENT_TASK (JSON),
and nothing of Ray's, raygent's or W&B's. It works in the TOML's folder. All it starts ends with it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raygent.callables import ModelEndpoint
from raygent.config import Config
from raygent.emit import EVENTS_BYTES, EVENTS_FILE
from raygent.prompts import PROMPTS_VARIABLE

SUPERVISOR = Path(__file__).with_name("supervisor.py")
OURS = ("RAY_", "RAYGENT_", "SERVE_", "VLLM_", "WANDB_")  # variables that no agent's process is to see
SET_BY_RAY = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")  # in a worker that has started
JOB_COPIES = "working_dir_files"  # Ray's folder of the copies that jobs get of their --working-dir
KEPT_BYTES = 1 << 20  # of stdout and of stderr each, from the end
PIPE_BYTES = 1 << 20  # the most that Linux lets a process have one hold
TASK_BYTES = (128 << 10) - len("RAYGENT_TASK=") - 1  # Linux starts no process with a longer variable
PROMPTS_BYTES = (128 << 10) - len(f"{PROMPTS_VARIABLE}=") - 1
REST_S = 5.0  # for the outputs of an ended process to end


@dataclass(frozen=True)
class CommandEnd:
    """How an agent's process ended: exit code (128 + n after signal n), the ends of its outputs, what it emitted, and
    which of its limits it was killed for."""

    code: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]]  # "table": "rewards" | "spans" | "result", and the record's own fields
    over: str = ""  # "over_memory FOUND" (MiB), "over_processes FOUND"
    answer: dict[str, Any] | None = None  # of a persistent one, which goes on


class Supervised:
    """A command under its supervisor: `stop()`, the death of this process, or more than `memory_mb` MiB or `processes`
    processes (0: no limit) kill all that it started.

    Raises OSError where no process can be started.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        environment: dict[str, str],
        memory_mb: int = 0,
        processes: int = 0,
        **streams: Any,
    ) -> None:
        self._hold, life = socket.socketpair()
        limits = [str(memory_mb), str(processes)]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(life.fileno()), *limits, *command],
                cwd=cwd,
                env=environment,
                pass_fds=[life.fileno()],
                **streams,
            )
        except OSError:
            self._hold.close()
            raise
        finally:
            life.close()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Have everything killed; returns at once, may be called again and from any thread."""
        with self._lock:
            self._hold.close()

    def let_go(self) -> None:
        """What it was started for is over: see stop()."""
        self.stop()

    @property
    def stopped(self) -> bool:
        return self._hold.fileno() < 0

    def over(self) -> str:
        """Of an ended command that was not stopped: the limit it was killed for (CommandEnd.over)."""
        with self._lock:
            if self._hold.fileno() < 0:
                return ""
            self._hold.setblocking(False)
            try:
                return self._hold.recv(100).decode()
            except BlockingIOError:  # its first supervisor was killed, and the second is still at work
                return ""


def command_of(config: Config) -> list[str]:
    """What the agent's process runs: agent.command, or a runner of agent.run."""
    if config.agent.command is not None:
        return config.agent.command
    return [sys.executable, "-m", "raygent.actors.agent_process", *["--persistent"] * config.agent.persistent]


def scrubbed_environment() -> dict[str, str]:
    """This process's environment without what is ours: Ray's, raygent's, W&B's. What Ray has put in another value's place is
    as it was: those of SET_BY_RAY as this process was started with, PYTHONPATH without a job's working_dir."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    started_with = dict(
        line.split("=", 1) for line in os.fsdecode(Path("/proc/self/environ").read_bytes()).split("\0") if "=" in line
    )
    for name in SET_BY_RAY:
        kept.pop(name, None)
        if name in started_with:
            kept[name] = started_with[name]
    kept.pop("SPT_NOENV", None)  # has setproctitle leave /proc/self/environ alone
    paths = [path for path in kept.pop("PYTHONPATH", "").split(os.pathsep) if JOB_COPIES not in Path(path).parts]
    return kept | ({"PYTHONPATH": os.pathsep.join(paths)} if any(paths) else {})


def agent_environment(config: Config, task_input: Any, endpoint: ModelEndpoint, events: str) -> dict[str, str]:
    return base_environment(config) | agent_variables(config, task_input, endpoint, events)


def base_environment(config: Config) -> dict[str, str]:
    """What the processes of all rollouts have in theirs."""
    keys = {upstream.api_key_env for upstream in config.upstream.values()} | {config.algorithm.teacher_api_key_env}
    return {name: value for name, value in scrubbed_environment().items() if name not in keys}


def agent_variables(config: Config, task_input: Any, endpoint: ModelEndpoint, events: str) -> dict[str, str]:
    """What one rollout's has besides."""
    added = {
        "OPENAI_BASE_URL": endpoint.base_url,
        "OPENAI_API_KEY": endpoint.api_key,
        "ANTHROPIC_BASE_URL": endpoint.anthropic_base_url,
        "ANTHROPIC_API_KEY": endpoint.api_key,
        "RAYGENT_MODEL": endpoint.model,
        "RAYGENT_TASK": variable(task_input),
        PROMPTS_VARIABLE: variable(endpoint.prompts),
        EVENTS_FILE: events,
        "RAYGENT_REWARD_URL": f"{endpoint.anthropic_base_url}/v1/rewards",
    }
    if config.agent.run is not None:
        added["RAYGENT_AGENT"] = config.agent.run
    if not {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & os.environ.keys():  # the user's own
        traces = f"{endpoint.anthropic_base_url}/v1/traces"
        added |= {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    return added


def variable(value: Any) -> str:
    """JSON as short as it can be in an environment variable: half a surrogate pair has no UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def run_command(
    config: Config, task_input: Any, endpoint: ModelEndpoint, started: Callable[[Supervised], None]
) -> CommandEnd:
    """Run the agent's process to its end; blocks. `started` gets the handle to stop it with, once it runs.

    Raises OSError where the process cannot be started.
    """
    with events_file() as events:
        supervised = Supervised(
            command_of(config),
            config.folder,
            agent_environment(config, task_input, endpoint, events.name),
            config.agent.memory_mb or 0,
            config.agent.processes or 0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started(supervised)
        process = supervised.process
        assert process.stdout and process.stderr
        outputs = [Tail(process.stdout), Tail(process.stderr)]
        code = process.wait()
        stdout, stderr = (output.text() for output in outputs)
        over = supervised.over()
        supervised.stop()
        return CommandEnd(code, stdout, stderr, read_events(events), over)


@contextmanager
def events_file() -> Iterator[IO[bytes]]:
    """One rollout's, in a folder of its own, which the agent may do with as it likes: what was opened here is read."""
    folder = tempfile.TemporaryDirectory(prefix="raygent-events-", ignore_cleanup_errors=True)
    with folder, (Path(folder.name) / "events.jsonl").open("w+b") as events:
        yield events


class Tail:
    """The last KEPT_BYTES of a pipe, read to its end by a thread."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.kept, self.ended, self.stream, self.reading = b"", False, stream, threading.Lock()
        os.set_blocking(stream.fileno(), False)  # our end of it alone
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with self.stream:
            waiting = select.poll()
            waiting.register(self.stream, select.POLLIN)
            while not self.ended:
                waiting.poll()
                with self.reading:
                    self._keep()

    def _keep(self) -> None:
        """What has been written until now: no more than a pipe holds."""
        with suppress(BlockingIOError):
            if not self.ended:
                chunk = os.read(self.stream.fileno(), PIPE_BYTES)
                self.kept, self.ended = (self.kept + chunk)[-KEPT_BYTES:], not chunk

    def take(self) -> str:
        """What has been written until now and was not taken before."""
        with self.reading:
            self._keep()
            kept, self.kept = self.kept, b""
        return kept.decode(errors="replace")

    def text(self) -> str:
        """Once the stream has ended, or, where something that got away holds it open, after REST_S."""
        self.thread.join(REST_S)
        return self.kept.decode(errors="replace")


def read_events(file: IO[bytes]) -> list[dict[str, Any]]:
    """The whole lines of an events file; a last line cut by a kill is left out, lines over EVENTS_BYTES, and of what is behind
    that many all except results."""
    events: list[dict[str, Any]] = []
    size = 0
    file.seek(0)
    for line in iter(lambda: file.readline(EVENTS_BYTES + 1), b""):
        size += len(line)
        try:
            if not line.endswith(b"\n"):
                continue
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # not ours: the file is the agent's to write to
        wanted = ("rewards", "spans", "result") if size <= EVENTS_BYTES else ("result",)
        if isinstance(event, dict) and event.get("table") in wanted:
            events.append(event)
    return events


def last_line(stdout: str) -> Any:
    """What a command gives back: the last line that is not empty, as JSON where it is JSON; None without one."""
    lines = [line.strip() for line in stdout.split("\n") if line.strip()]  # not splitlines(): JSON may hold U+2028
    if not lines:
        return None
    try:
        return json.loads(lines[-1])
    except (ValueError, RecursionError):
        return lines[-1]


def stdout_span(end: CommandEnd, started: float) -> dict[str, Any]:
    """The span that keeps what the process printed."""
    attributes = {"code": end.code, "stdout": end.stdout[-65536:], "stderr": end.stderr[-65536:]}
    return {"kind": "stdout", "name": "process", "attributes": attributes, "started": started, "finished": time.time()}
