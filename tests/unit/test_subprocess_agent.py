"""Agents as processes: what they find, what they give back, and that nothing of them is left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from raygent.actors.agent_runner import AgentRunner, Recorder
from raygent.actors.subprocess_agent import last_line, read_events
from raygent.agent import ModelEndpoint
from raygent.config import Config

ENDPOINT = ModelEndpoint("http://127.0.0.1:1/app/a/rg-key.sig/v1", "rg-key.sig")


def config_of(folder, timeout_s=20.0, **agent):
    return Config.model_validate(
        {
            "path": str(folder / "raygent.toml"),
            "model": {"path": "m/m"},
            "agent": {"timeout_s": timeout_s} | agent,
            "data": {"train": "tasks.jsonl"},
        }
    )


def run(config, task="task"):
    recorder = Recorder("rollout", 1, "worker")
    return asyncio.run(AgentRunner(config).run(task, ENDPOINT, recorder)), recorder


def shell(folder, script, **keys):
    return run(config_of(folder, command=["sh", "-c", script], **keys), {"question": "how many?"})


def test_what_a_command_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "secret")
    monkeypatch.setenv("RAYGENT_OLD", "secret")
    script = (
        "import json, os; print('thinking'); print(json.dumps({'env': {k: v for k, v in os.environ.items()}, "
        "'cwd': os.getcwd(), 'sid': os.getsid(0) == os.getpid()}))"
    )
    ended, recorder = run(config_of(tmp_path, command=[sys.executable, "-c", script]), {"question": "how many?"})
    assert ended.how == "returned" and ended.value["cwd"] == str(tmp_path) and ended.value["sid"]
    found = ended.value["env"]
    assert found["OPENAI_BASE_URL"] == ENDPOINT.base_url and found["OPENAI_API_KEY"] == "rg-key.sig"
    assert found["ANTHROPIC_BASE_URL"] == ENDPOINT.base_url.removesuffix("/v1")
    assert json.loads(found["RAYGENT_TASK"]) == {"question": "how many?"}
    assert "secret" not in found.values()
    assert not [name for name in found if name.startswith("RAY_")]
    span = recorder.spans[0]
    assert span.kind == "stdout" and json.loads(span.attributes)["stdout"].startswith("thinking\n")


def test_what_a_command_gives_back(tmp_path):
    assert last_line("a\n\n 0.5 \n\n") == 0.5
    assert last_line('a\n{"reward": 1}\n') == {"reward": 1}
    assert last_line("SELECT 1\n") == "SELECT 1"
    assert last_line(" \n") is None
    assert last_line("[" * 3000) == "[" * 3000
    ended, _ = shell(tmp_path, "echo trace >&2; exit 3")
    assert ended.how == "raised" and ended.error == "trace\nthe agent's process ended with exit code 3"
    ended, _ = run(config_of(tmp_path, command=["no-such-program-of-test"]))
    assert ended.how == "raised" and "no-such-program-of-test: No such file or directory" in ended.error
    ended, _ = shell(tmp_path, "yes | head -c 5000000; echo; echo 0.25")
    assert ended.value == 0.25


def test_nothing_is_left_after_the_end_a_time_out_or_a_crash(tmp_path, processes_of):
    daemons = "setsid sleep 7441 & (setsid sh -c 'trap \"\" TERM INT HUP; sleep 7441' &) ; sleep 0.2;"
    ended, _ = shell(tmp_path, daemons + "echo 1")
    assert ended.value == 1 and processes_of("sleep 7441") == []
    ended, _ = shell(tmp_path, daemons + "echo half; sleep 7441", timeout_s=0.6)
    assert ended.how == "timeout" and processes_of("sleep 7441") == []
    ended, _ = shell(tmp_path, daemons + "kill -SEGV $$")
    assert ended.how == "raised" and "exit code 139" in ended.error and processes_of("sleep 7441") == []


def test_a_cancelled_attempt_takes_its_process_along(tmp_path, processes_of):
    async def cancelled():
        runner = AgentRunner(config_of(tmp_path, command=["sh", "-c", "setsid sleep 7442 & sleep 7442"]))
        task = asyncio.create_task(runner.run("t", ENDPOINT, Recorder("r", 1, "w")))
        while len(processes_of("sleep 7442")) < 2:
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    gone_soon(processes_of, "sleep 7442")


OWNER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_subprocess_agent import ENDPOINT, config_of
from raygent.actors.agent_runner import AgentRunner, Recorder
runner = AgentRunner(config_of(Path({folder!r}), command=["sh", "-c", "setsid sleep 7443 & sleep 7443"]))
asyncio.run(runner.run("t", ENDPOINT, Recorder("r", 1, "w")))
"""


@pytest.mark.parametrize("victim", ["owner", "first supervisor", "both"])
def test_nothing_is_left_when_the_owner_or_a_supervisor_is_killed(tmp_path, processes_of, victim):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))]
    )
    try:
        deadline = time.monotonic() + 30
        while len(processes_of("sleep 7443")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = subprocess.run(["ps", "--ppid", str(owner.pid), "-o", "pid="], capture_output=True, text=True)
        if victim != "owner":
            os.kill(int(children.stdout), signal.SIGKILL)
        if victim != "first supervisor":
            owner.kill()
        gone_soon(processes_of, "sleep 7443")
    finally:
        owner.kill()
        owner.wait()


def gone_soon(processes_of, text):
    deadline = time.monotonic() + 5
    while processes_of(text) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(text) == []


PYTHON_AGENT = """
import os, raygent
async def answer(task, model):
    print(0.9)
    raygent.emit_reward(0.5, components={"rows": 1})
    with raygent.span("tool", kind="tool", query="x") as attributes:
        attributes["hits"] = 2
    return {"task": task, "url": model.base_url, "ray": [n for n in os.environ if n.startswith("RAY_")]}
def raises(task): raise LookupError("no table")
def ends(task): os._exit(0)
"""


def test_a_python_agent_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "secret")
    (tmp_path / "apart.py").write_text(PYTHON_AGENT)
    ended, recorder = run(config_of(tmp_path, run="apart.py:answer", **{"in": "subprocess"}), {"q": 1})
    assert ended.value == {"task": {"q": 1}, "url": ENDPOINT.base_url, "ray": []}
    assert recorder.emitted() == 0.5
    assert {span.kind for span in recorder.spans} == {"stdout", "tool"}
    ended, _ = run(config_of(tmp_path, run="apart.py:raises", **{"in": "subprocess"}))
    assert ended.how == "raised" and "LookupError: no table" in ended.error
    ended, _ = run(config_of(tmp_path, run="apart.py:ends", **{"in": "subprocess"}))
    assert ended.how == "raised" and "before the agent returned" in ended.error


def test_an_events_file_is_the_agents_to_write_what_it_likes():
    good = b'{"table": "rewards", "value": 1}'
    assert read_events(
        b"[" * 3000 + b"\n" + good + b'\n[1]\n\xff\xfe\n{"table": "seal"}\n{"table": "rewards", "va'
    ) == [json.loads(good)]


def test_events_beyond_the_limit_are_left_out_the_result_is_not(monkeypatch):
    lines = [json.dumps({"table": table, "value": 1}) for table in ["spans"] * 9 + ["result"]]
    monkeypatch.setattr("raygent.actors.subprocess_agent.EVENTS_BYTES", 3 * (len(lines[0]) + 1))
    found = read_events(("\n".join(lines) + "\n").encode())
    assert [event["table"] for event in found] == ["spans"] * 3 + ["result"]
