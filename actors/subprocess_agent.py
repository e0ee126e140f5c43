"""Agents that run as a process of their own: a command in any language, or a Python callable kept apart.

Such a process finds the model in OPENAI_BASE_URL and OPENAI_API_KEY (and ANTHROPIC_*), its task in RAYGENT_TASK (JSON),
and nothing of Ray's, raygent's or W&B's. It works in the TOML's folder. All it starts ends with it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raygent.callables import ModelEndpoint
from raygent.config import Config
from raygent.emit import EVENTS_FILE
from raygent.prompts import PROMPTS_VARIABLE

SUPERVISOR = Path(__file__).with_name("supervisor.py")
OURS = ("RAY_", "RAYGENT_", "SERVE_", "VLLM_", "WANDB_")  # variables that no agent's process is to see
SET_BY_RAY = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")  # in a worker that has started
JOB_COPIES = "working_dir_files"  # Ray's folder of the copies that jobs get of their --working-dir
KEPT_BYTES = 1 << 20  # of stdout and of stderr each, from the end
TASK_BYTES = (128 << 10) - len("RAYGENT_TASK=") - 1  # Linux starts no process with a longer variable
PROMPTS_BYTES = (128 << 10) - len(f"{PROMPTS_VARIABLE}=") - 1
EVENTS_BYTES = 16 << 20  # of emitted rewards and spans


@dataclass(frozen=True)
class CommandEnd:
    """How an agent's process ended: exit code (128 + n after signal n), the ends of its outputs, what it emitted, and
    which of its limits it was killed for."""

    code: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]]  # "table": "rewards" | "spans" | "result", and the record's own fields
    over: str = ""  # "over_memory FOUND" (MiB), "over_processes FOUND"


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
    return [sys.executable, "-m", "raygent.actors.agent_process"]


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
    added = {
        "OPENAI_BASE_URL": endpoint.base_url,
        "OPENAI_API_KEY": endpoint.api_key,
        "ANTHROPIC_BASE_URL": endpoint.anthropic_base_url,
        "ANTHROPIC_API_KEY": endpoint.api_key,
        "RAYGENT_MODEL": endpoint.model,
        "RAYGENT_TASK": task_variable(task_input),
        PROMPTS_VARIABLE: prompts_variable(endpoint.prompts),
        EVENTS_FILE: events,
        "RAYGENT_REWARD_URL": f"{endpoint.anthropic_base_url}/v1/rewards",
    }
    if config.agent.run is not None:
        added["RAYGENT_AGENT"] = config.agent.run
    keys = {upstream.api_key_env for upstream in config.upstream.values()}
    kept = {name: value for name, value in scrubbed_environment().items() if name not in keys}
    if (
        not {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & kept.keys()
    ):  # else the user's own collector gets them
        traces = f"{endpoint.anthropic_base_url}/v1/traces"
        added |= {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    return kept | added


def task_variable(task_input: Any) -> str:
    return _variable(task_input)


def prompts_variable(texts: dict[str, str]) -> str:
    return _variable(texts)


def _variable(value: Any) -> str:
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
    with tempfile.NamedTemporaryFile(prefix="raygent-events-", suffix=".jsonl") as events:
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
        ends: dict[str, bytes] = {}
        readers = [
            threading.Thread(target=lambda n=name, s=stream: ends.update({n: kept_of(s)}), daemon=True)
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr))
        ]
        for reader in readers:
            reader.start()
        code = process.wait()
        for reader in readers:
            reader.join()
        over = supervised.over()
        supervised.stop()
        written = Path(events.name).read_bytes()
    texts = {name: end.decode(errors="replace") for name, end in ends.items()}
    return CommandEnd(code, texts["stdout"], texts["stderr"], read_events(written), over)


def kept_of(stream: IO[bytes]) -> bytes:
    """Read to the end, keep the last KEPT_BYTES."""
    kept = b""
    with stream:
        while chunk := stream.read1(1 << 16):  # type: ignore[attr-defined]
            kept = (kept + chunk)[-KEPT_BYTES:]
    return kept


def read_events(written: bytes) -> list[dict[str, Any]]:
    """The whole lines of an events file; a last line cut by a kill is left out, and what is over EVENTS_BYTES except results."""
    events: list[dict[str, Any]] = []
    size = 0
    for line in written.split(b"\n")[:-1]:
        size += len(line) + 1
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue  # not ours: the file is the agent's to write to
        wanted = ("rewards", "spans", "result") if size <= EVENTS_BYTES else ("result",)
        if isinstance(event, dict) and event.get("table") in wanted:
            events.append(event)
    return events


def last_line(stdout: str) -> Any:
    """What a command gives back: the last line that is not empty, as JSON where it is JSON; None without one."""
    lines = [line.strip() for line in stdout.splitlines() if line.strip()]
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
