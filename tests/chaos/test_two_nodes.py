"""`ray job submit` to two raylets on this machine: both nodes' workers take rollouts; stopped or killed, nothing is left."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from running import Training, gone, kill, make_run, of_run

from raygent.actors.environment import free_port
from raygent.actors.store_state import read_store
from raygent.cluster.metrics import read_lines
from raygent.cluster.start import QUIET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
RAY = str(Path(sys.executable).with_name("ray"))
OURS = ("ray::RolloutWorker", "ray::ReplayStore", "ray::Serve", "ray::Learner", "ray::Keeper", "ray::Proxy", "VLLM", "raygent.jobs")  # fmt: skip


@pytest.fixture
def two_nodes(tmp_path):
    """A head and a second node with a CPU count of its own; the dashboard's address and the environment to use it."""
    port, dashboard = free_port(), free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # so that no other Ray is met by chance
    environment = clean | QUIET | token | {"RAYGENT_TEST": str(tmp_path)}
    common = ["--block", "--disable-usage-stats", f"--object-store-memory={300 * 2**20}"]
    nodes = []
    for role in (
        ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}", "--num-cpus=4"],
        [f"--address=127.0.0.1:{port}", "--num-cpus=2"],
    ):  # fmt: skip
        log = (tmp_path / f"ray-{len(nodes)}.txt").open("w")
        nodes.append(
            subprocess.Popen(
                [RAY, "start", *role, *common, f"--dashboard-agent-listen-port={free_port()}"],
                env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / f"ray-{len(nodes) - 1}.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.5)
    yield f"http://127.0.0.1:{dashboard}", environment
    for node in nodes:
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):  # the one before it took it with it
                process.kill()
        node.wait()
    assert not gone(lambda: of_run(tmp_path, "raylet", "gcs_server", "ray::"), 30)


def submit(address, environment, folder, *overrides):
    job = [RAY, "job", "submit", "--address", address, "--working-dir", str(folder), "--"]
    return Training(
        [*job, sys.executable, "-m", "raygent.jobs.train", "run.toml", f"run.directory={folder / 'runs'}", *overrides],
        folder,
        environment,
    )


def ours(folder):
    return lambda: of_run(folder, *OURS)


def test_two_nodes_share_the_work_and_nothing_stays(two_nodes, tmp_path):
    address, environment = two_nodes
    source = tmp_path / "source"
    source.mkdir()
    make_run(source, 200)
    training = submit(address, environment, source)
    training.wait_for("step 3/")
    job = re.search(r"raysubmit_\w+", training.said()).group()
    logs = subprocess.run(
        [RAY, "job", "logs", "--address", address, job], env=environment, capture_output=True, text=True
    )
    assert "step 3/200 reward" in logs.stdout
    stopped = subprocess.run(
        [RAY, "job", "stop", "--address", address, job], env=environment, capture_output=True, text=True
    )
    assert stopped.returncode == 0, stopped.stderr
    assert not gone(ours(tmp_path), 60)
    state, _, _ = read_store(source / "runs" / "chaos" / "store")
    nodes = {attempt.worker.partition("@")[2] for attempt in state.attempts.values() if attempt.won}
    assert len(nodes) == 2, nodes

    training = submit(address, environment, source)  # the same command goes on
    training.wait_for("going on at step")
    at = int(re.search(r"going on at step (\d+)", training.said()).group(1))
    assert at >= 3 and at % 3 == 0
    training.wait_for(f"step {at + 2}/")
    (driver,) = of_run(tmp_path, "-m raygent.jobs.train run.toml")[-1:]
    kill(driver)
    assert not gone(ours(tmp_path), 60)

    done = len(read_lines(source / "runs" / "chaos" / "metrics.jsonl"))
    training = submit(address, environment, source, f"run.steps={done + 2}")
    training.end()
    summary = json.loads((source / "runs" / "chaos" / "summary.json").read_text())
    assert summary["steps"] == done + 2
    rows = pq.read_table(source / "runs" / "chaos" / "store" / "attempts").to_pylist()
    assert len({row["worker"].partition("@")[2] for row in rows if row["won"]}) == 2
