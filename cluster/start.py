"""`raygent train` on this machine: a Ray of our own where none is named, and the job submitted to it as on a cluster."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from raygent.actors.environment import NO_TELEMETRY, free_port
from raygent.actors.subprocess_agent import Supervised
from raygent.config import Config

QUIET = NO_TELEMETRY | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would have Ray build the environment again for each worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # 5 s are short on a busy small machine: Serve kills the proxy then
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
HERE = "127.0.0.1"
START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 30.0
SAID_BY_THE_JOB = (1, 2)  # exit codes of a job whose own last lines, its log's, tell why
RAY_LOGS = Path(tempfile.gettempdir()) / "ray" / "session_latest" / "logs"
# Ray's word of Serve's controller, which the run itself ends.
ENDED_BY_US = re.compile(r"Task ServeController\.\w+ failed\. There are infinite retries .*killed by `ray\.kill`")
STEP = re.compile(r"^step (\d+)/(\d+) (.*)")


def quiet_environment() -> None:
    """Usage statistics of every library off, in this process and those it starts."""
    os.environ.update(QUIET)


def before_ray() -> None:
    """What has to be in the environment before Ray is imported. A Ray of our own gets a token: other users stay out."""
    quiet_environment()
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def submit_and_follow(config: Config, module: str, arguments: list[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` as a Ray job and follow its log; the exit status.

    On the cluster that RAY_ADDRESS names (http://host:8265), else on a Ray started for it here and ended with it.
    Ctrl-C stops the job.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        return _follow(
            address, module, arguments, {"working_dir": str(config.folder), "excludes": ["/runs/", "/wandb/"]}
        )
    with local_ray(config) as (dashboard, check):
        return _follow(dashboard, module, arguments, {}, check)


@contextmanager
def local_ray(config: Config) -> Iterator[tuple[str, Callable[[], None]]]:
    """A Ray head with its dashboard on loopback, for the time of the block; also when this process is killed nothing of it stays.

    Yields the dashboard's address, and what raises RuntimeError, with what Ray said, once it has ended.
    """
    port, dashboard = free_port(HERE), free_port(HERE)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port(HERE)}",
        f"--dashboard-agent-listen-port={free_port(HERE)}",  # the usual one may be another Ray's
        f"--num-cpus={cpus_needed(config)}", "--disable-usage-stats",
        f"--object-store-memory={512 * 2**20}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS",)}
    with tempfile.TemporaryFile() as log:
        print("starting Ray on this machine", flush=True)
        cluster = Supervised(command, Path.cwd(), environment, stdin=log, stdout=log, stderr=log)
        try:
            check = partial(_check, cluster, log)
            _wait_for_port(dashboard, check)
            yield f"http://127.0.0.1:{dashboard}", check
        finally:
            cluster.stop()
            cluster.process.wait()


def cpus_needed(config: Config) -> int:
    """As many CPUs as the run's actors ask for, and no fewer than there are: on a small machine they share them."""
    ranks = sum(learner.ranks for learner in config.learners.values())
    need = ranks + config.engine.replicas + config.workers.max * config.workers.cpus + 1
    return max(os.cpu_count() or 1, math.ceil(need))


def _check(cluster: Supervised, log: Any) -> None:
    if cluster.process.poll() is not None:
        log.seek(0)
        said = log.read().decode(errors="replace")[-2000:].strip()
        raise RuntimeError(f"Ray did not start; its logs are in {RAY_LOGS}. It said:\n{said}")


def _wait_for_port(port: int, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((HERE, port)) == 0:
                return
        check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start within {START_DEADLINE_S:.0f} s; its logs are in {RAY_LOGS}")
        time.sleep(0.2)


def _follow(
    address: str,
    module: str,
    arguments: list[str],
    runtime_env: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> int:
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    entrypoint = shlex.join([sys.executable if not runtime_env else "python", "-m", module, *arguments])
    job = f"raysubmit_{secrets.token_hex(8)}"
    submission = {"entrypoint": entrypoint, "submission_id": job, "runtime_env": runtime_env | {"env_vars": QUIET}}
    client = _submit(JobSubmissionClient, address, submission, check)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        asyncio.run(_tail(client, job))
    except KeyboardInterrupt:
        goes_on = "; given again, the command goes on from the last checkpoint" if module.endswith(".train") else ""
        print(f"stopping{goes_on}", flush=True)
        try:
            client.stop_job(job)
            deadline = time.monotonic() + STOP_DEADLINE_S
            while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
                time.sleep(0.5)
        except OSError as error:
            print(f"Ray's dashboard does not answer, so job {job} may go on: {type(error).__name__}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code not in SAID_BY_THE_JOB:
        print(f"job {job} {info.status.lower()}: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


def _submit(make: Any, address: str, submission: dict[str, Any], check: Callable[[], None]) -> Any:
    """The client, once the job is accepted. A Ray that has just started takes jobs a little after its dashboard answers, and one
    on a busy machine may break off while it does; `check` raises once there is none any more."""
    deadline, broke_off = time.monotonic() + START_DEADLINE_S, False
    while True:
        try:
            client = make(address)
            client.submit_job(**submission)
            return client
        except (OSError, RuntimeError) as error:  # OSError: the connection
            check()
            if broke_off and "already exists" in str(error):
                return client
            broke_off = broke_off or isinstance(error, OSError)
            if time.monotonic() > deadline or (
                "No available agent" not in str(error) and isinstance(error, RuntimeError)
            ):
                raise
            time.sleep(0.5)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


async def _tail(client: Any, job: str) -> None:
    """The job's log as it is; on a terminal its steps as a progress bar."""
    bar = tqdm(total=0, unit="step") if sys.stderr.isatty() else None
    rest = ""
    async for chunk in client.tail_job_logs(job):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if ENDED_BY_US.search(line):
                continue
            step = STEP.match(line)
            if bar is not None and step:
                bar.total, bar.n = int(step[2]), int(step[1])
                bar.set_postfix_str(step[3][:80])
            elif bar is not None:
                bar.write(line)
            else:
                print(line, flush=True)
    if rest:
        print(rest, flush=True)
    if bar is not None:
        bar.close()
