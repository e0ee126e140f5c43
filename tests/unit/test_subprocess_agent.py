"""Agents as processes: what they find, what they give back, and that nothing of them is left."""

import asyncio
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from raygent.actors.agent_runner import AgentRunner, AttemptRecorder
from raygent.actors.outcomes import outcome_of
from raygent.actors.subprocess_agent import SUPERVISOR, TASK_BYTES, Tail, last_line, read_events, scrubbed_environment
from raygent.callables import ModelEndpoint
from raygent.config import Config
from raygent.jobs.check import _check_command

NODE_AGENT = """#!/usr/bin/env node
const { spawn } = require("node:child_process");
spawn("sleep", ["7353"], { detached: true, stdio: "ignore" }).unref();
if (process.env.RAYGENT_TASK === '"hangs"') setInterval(() => {}, 1000);
else console.log(process.env.OPENAI_BASE_URL);
"""
PERSISTENT = """
import json, os, sys, time
print("loading takes long", file=sys.stderr)
for line in sys.stdin:
    variables = json.loads(line)
    os.environ.update(variables)
    task = json.loads(os.environ["RAYGENT_TASK"])
    print("said", task)
    if task == "raises":
        print(json.dumps({"error": "ValueError: no table"}), flush=True)
        continue
    if task == "exits":
        sys.exit("gone")
    if task == "hangs":
        time.sleep(60)
    if task == "hog":
        hog = b"x" * (400 << 20)
        time.sleep(60)
    with open(os.environ["RAYGENT_EVENTS"], "a") as events:
        events.write(json.dumps({"table": "rewards", "value": 0.5}) + "\\n")
    print(json.dumps({"output": [task, os.getpid(), os.environ["OPENAI_API_KEY"]]}), flush=True)
"""
PERSISTENT_PYTHON = """
import os, sys
import raygent
calls = []
def answer(task, model):
    calls.append(task)
    print("printed, and no line ends it", end="")
    raygent.emit_reward(0.25)
    if task == "raises":
        raise LookupError("no table")
    if task == "exits":
        sys.exit(3)
    return [task, os.getpid(), model.api_key, calls]
"""
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
    recorder = AttemptRecorder("rollout", 1, "worker")
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
    assert found["RAYGENT_REWARD_URL"] == ENDPOINT.base_url + "/rewards"
    assert json.loads(found["RAYGENT_TASK"]) == {"question": "how many?"}
    assert "secret" not in found.values()
    assert not [name for name in found if name.startswith("RAY_")]
    span = recorder.spans[0]
    assert span.kind == "stdout" and json.loads(span.attributes)["stdout"].startswith("thinking\n")


@pytest.mark.skipif(shutil.which("npx") is None, reason="npx is not installed; it comes with Node")
@pytest.mark.parametrize(("task", "timeout_s"), [("answers", 120.0), ("hangs", 8.0)])
def test_a_package_by_npx_is_one_more_command(tmp_path, processes_of, task, timeout_s):
    """npx is a process, the package's program another, which may start more: all of them are gone at the end."""
    package, bin_folder = tmp_path / "node_modules" / "some-agent", tmp_path / "node_modules" / ".bin"
    for folder in (package, bin_folder):
        folder.mkdir(parents=True)
    (tmp_path / "package.json").write_text('{"name": "own", "version": "1.0.0"}')
    (package / "package.json").write_text('{"name": "some-agent", "version": "1.0.0", "bin": "agent.js"}')
    (package / "agent.js").write_text(NODE_AGENT)
    (package / "agent.js").chmod(0o755)
    (bin_folder / "some-agent").symlink_to("../some-agent/agent.js")
    config = config_of(tmp_path, timeout_s=timeout_s, command=["npx", "--no-install", "some-agent"])
    ended, _ = run(config, task)
    assert (ended.how, ended.value) == (("returned", ENDPOINT.base_url) if task == "answers" else ("timeout", None))
    assert processes_of("sleep 7353") == []


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no autogroups")
def test_its_session_is_as_nice_as_its_worker(tmp_path):
    """Else its share of the cores is a whole session's, whatever Ray's RAY_worker_niceness."""
    ours, life = socket.socketpair()
    with ours, life:
        command = [sys.executable, "-I", "-S", SUPERVISOR, str(life.fileno()), "0", "0", "cat", "/proc/self/autogroup"]
        told = subprocess.check_output(["nice", "-n", "7", *command], pass_fds=[life.fileno()], text=True)
    assert told.split()[-1] == str(os.nice(0) + 7)


def test_a_program_finds_nothing_of_rays_in_its_environment(cluster, tmp_path):
    """In a worker of a job with a working_dir: what is not as Ray itself was started with is the job's own."""

    def environments():
        raylet = Path(f"/proc/{os.environ['RAY_RAYLET_PID']}/environ").read_bytes()
        return raylet.decode(), dict(os.environ), scrubbed_environment()

    def of_worker(**env_vars):
        runtime_env = {"working_dir": f"file://{files}", "env_vars": env_vars}
        return ray.get(ray.remote(environments).options(num_cpus=0.5, runtime_env=runtime_env).remote())

    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "file").touch()
    files = shutil.make_archive(str(tmp_path / "files"), "zip", tmp_path, "job")
    raylet, worker, program = of_worker(OWN="1")
    assert worker["PYTHONBREAKPOINT"].startswith("ray.") and "working_dir_files" in worker["PYTHONPATH"]
    assert {"OMP_NUM_THREADS", "SPT_NOENV"} <= worker.keys()
    new = {name for name, value in program.items() if f"{name}={value}" not in raylet.split("\0")}
    assert new - {"PWD", "OLDPWD"} == {"OWN"}
    own = {"PYTHONBREAKPOINT": "own.debugger", "OMP_NUM_THREADS": "3"}
    _, worker, program = of_worker(**own, PYTHONPATH="/own:/too")
    assert worker["PYTHONBREAKPOINT"].startswith("ray.") and not worker["PYTHONPATH"].startswith("/own")
    assert program | own == program and program["PYTHONPATH"].startswith("/own:/too")


def test_the_largest_task_is_what_linux_lets_a_variable_hold(tmp_path):
    config = config_of(tmp_path, command=["sh", "-c", 'printf %s "$RAYGENT_TASK" | wc -c'])
    largest = "x" * (TASK_BYTES - len('""'))
    assert run(config, largest)[0].value == TASK_BYTES
    ended, _ = run(config, largest + "x")
    assert ended.how == "raised" and "Argument list too long" in ended.error


def test_what_a_command_gives_back(tmp_path):
    assert last_line("a\n\n 0.5 \n\n") == 0.5
    assert last_line('a\n{"reward": 1}\n') == {"reward": 1}
    assert last_line("SELECT 1\n") == "SELECT 1"
    assert last_line(" \n") is None
    assert last_line('{"answer": "a\u2028b\x85c"}\r\n') == {"answer": "a\u2028b\x85c"}
    assert last_line("[" * 3000) == "[" * 3000
    ended, _ = shell(tmp_path, "echo more >&2; echo trace >&2; exit 3")
    assert ended.how == "raised" and ended.error == (
        "more\ntrace\nthe agent's process ended with exit code 3; it last wrote: trace"
    )
    ended, _ = shell(tmp_path, "exit 3")
    assert ended.error == "the agent's process ended with exit code 3"
    ended, _ = run(config_of(tmp_path, command=["no-such-program-of-test"]))
    assert ended.how == "raised" and "no-such-program-of-test: No such file or directory" in ended.error
    ended, _ = shell(tmp_path, "yes | head -c 5000000; echo; echo 0.25")
    assert ended.value == 0.25
    ended, _ = shell(tmp_path, "yes | head -c 3000000 | tr -d '\\n'")
    assert ended.how == "raised" and "over 1 MiB" in ended.error
    ended, _ = run(config_of(tmp_path, command=["sh", "-c", 'printf %s "$RAYGENT_TASK"']), "half \ud800, 漢")
    assert ended.value == "half \ud800, 漢"


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
        task = asyncio.create_task(runner.run("t", ENDPOINT, AttemptRecorder("r", 1, "w")))
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
from raygent.actors.agent_runner import AgentRunner, AttemptRecorder
runner = AgentRunner(config_of(Path({folder!r}), command=["sh", "-c", "setsid sleep 7443 & sleep 7443"]))
asyncio.run(runner.run("t", ENDPOINT, AttemptRecorder("r", 1, "w")))
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


HOG = "import time; x = b'x' * (300 << 20); time.sleep(30)"
FORKS = """
import os, sys, time
x = b'x' * (100 << 20)
children = []
for _ in range(3):
    if (pid := os.fork()) == 0:
        time.sleep(0.6)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
print(1)
"""


KILLS_BUT_ONE = """
import os, signal, subprocess, sys
sys.path.insert(0, {folder!r})
import supervisor
supervisor.prctl(supervisor.PR_SET_CHILD_SUBREAPER, 1)
other, mine = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
kill = os.kill
def refused(pid, number):
    if pid == other.pid:
        raise PermissionError(pid)
    kill(pid, number)
os.kill = refused
supervisor.kill_descendants()
print(len(supervisor.descendants(os.getpid())), mine.poll() is not None, other.poll() is None)
kill(other.pid, signal.SIGKILL)
"""


def test_what_has_become_another_users_does_not_spare_the_rest():
    """An agent that has started something by sudo."""
    script = KILLS_BUT_ONE.format(folder=str(Path(SUPERVISOR).parent))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "1 True True\n"


def test_too_much_memory_kills_the_whole_tree(tmp_path, processes_of):
    hog = f'{sys.executable} -c "{HOG}"'
    for script in (f"{hog} & setsid sleep 7444 & sleep 7444", f"(setsid {hog} &); setsid sleep 7444 & exec sleep 7444"):
        ended, recorder = shell(tmp_path, f"echo trace >&2; {script}", memory_mb=150)
        assert ended.how == "over_memory" and ended.error.startswith(
            "trace\nagent.memory_mb: the agent's processes took"
        )
        assert "MiB, over the limit of 150" in ended.error and outcome_of(ended, {}) == "over_memory"
        assert processes_of("sleep 7444") == [] and processes_of(f"{sys.executable} -c {HOG}") == []
        assert recorder.spans[0].kind == "stdout"


def test_memory_is_that_of_all_processes_and_shared_pages_count_once(tmp_path):
    ended, _ = run(config_of(tmp_path, command=[sys.executable, "-c", FORKS], memory_mb=200))
    assert (ended.how, ended.value) == ("returned", 1)
    small = HOG.replace("300", "60")
    ended, _ = shell(tmp_path, f'for i in 1 2 3; do {sys.executable} -c "{small}" & done; wait', memory_mb=150)
    assert ended.how == "over_memory"


def test_too_many_processes_kill_the_whole_tree(tmp_path, processes_of):
    bomb = "for i in $(seq 30); do (setsid sleep 7445 &); done; sleep 7445"
    ended, _ = shell(tmp_path, bomb, processes=8)
    assert ended.how == "over_processes" and "agent.processes: the agent had " in ended.error
    assert "over the limit of 8" in ended.error and outcome_of(ended, {}) == "over_processes"
    assert processes_of("sleep 7445") == []
    # Daemons that have ended are no processes any more, though nobody waits for them.
    ended, _ = shell(tmp_path, "for i in $(seq 30); do (true &); done; sleep 0.5; echo 1", processes=8)
    assert (ended.how, ended.value) == ("returned", 1)


def test_an_agent_within_its_limits_ends_as_it_does(tmp_path):
    limits = {"memory_mb": 500, "processes": 8}
    ended, _ = shell(tmp_path, "sleep 0.3; echo 0.5; exit 4", **limits)
    assert ended.how == "raised" and "exit code 4" in ended.error
    ended, _ = shell(tmp_path, "sleep 9", timeout_s=0.4, **limits)
    assert ended.how == "timeout"
    (tmp_path / "within.py").write_text("import time\ndef answer(task):\n    time.sleep(0.3)\n    return task\n")
    ended, _ = run(config_of(tmp_path, run="within.py:answer", **limits, **{"in": "subprocess"}), {"q": 1})
    assert ended.value == {"q": 1}
    (tmp_path / "within.py").write_text(f"def answer(task):\n    {HOG}\n")
    ended, _ = run(config_of(tmp_path, run="within.py:answer", **limits | {"memory_mb": 200}, **{"in": "subprocess"}))
    assert ended.how == "over_memory"


@pytest.mark.skipif(shutil.which("node") is None, reason="V8 is what this is about")
def test_a_memory_limit_is_not_one_of_addresses(tmp_path):
    """V8 reserves more addresses than RLIMIT_AS of such a size gives."""
    script = "setTimeout(() => console.log(0.5), 500)"
    ended, _ = run(config_of(tmp_path, command=["node", "-e", script], memory_mb=300, processes=2))
    assert (ended.how, ended.value) == ("returned", 0.5)


def test_a_program_of_an_environment_of_its_own(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (site,) = tmp_path.glob(".venv/lib/python*/site-packages")
    (site / "only_here.py").write_text("WORD = 'here'\n")
    (tmp_path / "agent.py").write_text("import only_here, sys\nprint([only_here.WORD, sys.prefix])\n")
    config = config_of(tmp_path, command=[".venv/bin/python", "agent.py"])
    _check_command(config)
    ended, _ = run(config)
    assert ended.value == f"['here', '{tmp_path}/.venv']"


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
    raygent.emit_reward(-1.0, agent="planner", call=2)
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
    of_call = recorder.rewards[1]
    assert (of_call.value, of_call.agent, of_call.call_sequence) == (-1.0, "planner", 2)
    assert {span.kind for span in recorder.spans} == {"stdout", "tool"}
    ended, _ = run(config_of(tmp_path, run="apart.py:raises", **{"in": "subprocess"}))
    assert ended.how == "raised" and "LookupError: no table" in ended.error
    ended, _ = run(config_of(tmp_path, run="apart.py:ends", **{"in": "subprocess"}))
    assert ended.how == "raised" and "before the agent returned" in ended.error


def test_an_events_file_is_the_agents_to_write_what_it_likes():
    good = b'{"table": "rewards", "value": 1}'
    written = b"[" * 3000 + b"\n" + good + b'\n[1]\n\xff\xfe\n{"table": "seal"}\n{"table": "rewards", "va'
    assert read_events(io.BytesIO(written)) == [json.loads(good)]


def test_a_reward_in_the_events_file_needs_its_value_alone(tmp_path):
    lines = [{"value": 0.5}, {"value": 1, "call": 3, "name": "speed"}, {"value": 2, "call_sequence": 0, "time": 5}, {}]
    lines.append({"value": 9, "time": math.inf})
    told = "; ".join(f"echo '{json.dumps({'table': 'rewards'} | line)}' >> $RAYGENT_EVENTS" for line in lines)
    began = time.time()
    _, recorder = shell(tmp_path, f"{told}; echo done")
    found = [(reward.value, reward.name, reward.call_sequence) for reward in recorder.rewards]
    assert found == [(0.5, "reward", -1), (1.0, "speed", 3), (2.0, "reward", 0)]
    assert recorder.rewards[0].time >= began and recorder.rewards[2].time == 5.0
    assert [span.name for span in recorder.spans].count("malformed event") == 2


@pytest.mark.parametrize(
    "does", ["rm $E", "rm $E; mkdir $E", "rm $E; mkfifo $E", "rm $E; ln -s /dev/zero $E", "rm -r $(dirname $E)"]
)
def test_an_events_file_may_be_done_away_with(tmp_path, does):
    script = f"""E=$RAYGENT_EVENTS; echo '{{"table": "spans"}}' >> $E; {does}; echo 0.5"""
    ended, _ = shell(tmp_path, script, timeout_s=10.0)
    assert (ended.how, ended.value) == ("returned", 0.5)


def test_an_output_that_something_holds_open_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("raygent.actors.subprocess_agent.REST_S", 0.5)
    reader, writer = os.pipe()
    tail = Tail(os.fdopen(reader, "rb"))
    os.write(writer, b"said")
    assert tail.text() == "said"
    os.close(writer)


def test_what_was_written_is_there_to_take_at_once():
    reader, writer = os.pipe()
    tail = Tail(os.fdopen(reader, "rb"))
    for number in range(2000):
        os.write(writer, b"%d" % number)
        assert tail.take() == str(number)
    os.close(writer)
    tail.thread.join()
    assert tail.take() == "" and tail.stream.closed


def test_events_beyond_the_limit_are_left_out_the_result_is_not(monkeypatch):
    lines = [json.dumps({"table": table, "value": 1}) for table in ["spans"] * 9 + ["result"]]
    monkeypatch.setattr("raygent.actors.subprocess_agent.EVENTS_BYTES", 3 * (len(lines[0]) + 1))
    found = read_events(io.BytesIO(("\n".join(lines) + "\n").encode()))
    assert [event["table"] for event in found] == ["spans"] * 3 + ["result"]


def in_turn(config, tasks):
    """One runner's ends and records of these tasks, one after the other, each with a key of its own."""

    async def all_of_them():
        for number, task in enumerate(tasks):
            recorder = AttemptRecorder(f"rollout-{number}", 1, "worker")
            endpoint = ModelEndpoint(ENDPOINT.base_url, f"key-{number}")
            yield await runner.run(task, endpoint, recorder), recorder

    async def gathered():
        return [one async for one in all_of_them()]

    runner = AgentRunner(config)
    try:
        return asyncio.run(gathered())
    finally:
        runner.close()


@pytest.fixture
def persistent(tmp_path):
    (tmp_path / "stays.py").write_text(PERSISTENT)
    return lambda **keys: config_of(tmp_path, command=[sys.executable, "stays.py"], persistent=True, **keys)


def test_a_persistent_program_has_one_rollout_after_the_other(persistent):
    told = in_turn(persistent(), ["a", "raises", "b", "exits", "c"])
    (a, of_a), (failed, _), (b, of_b), (gone, _), (c, _) = told
    assert [one.value[::2] for one in (a, b, c)] == [["a", "key-0"], ["b", "key-2"], ["c", "key-4"]]
    assert a.value[1] == b.value[1] != c.value[1]  # the pid
    assert (failed.how, failed.error) == ("raised", "ValueError: no table")
    assert gone.how == "raised" and "gone" in gone.error and "exit code 1, before it answered" in gone.error
    assert [reward.value for reward in of_a.rewards] == [reward.value for reward in of_b.rewards] == [0.5]
    said = [json.loads(recorder.spans[0].attributes) for recorder in (of_a, of_b)]
    assert [span["stdout"] for span in said] == ["said a\n", "said b\n"] and said[1]["stderr"] == ""


@pytest.mark.parametrize(("task", "keys", "how"), [
    ("hangs", {"timeout_s": 5.0}, "timeout"), ("hog", {"memory_mb": 300}, "over_memory")
])  # fmt: skip
def test_a_persistent_program_over_a_limit_is_another_one_afterwards(persistent, task, keys, how):
    (a, _), (over, _), (b, _) = in_turn(persistent(**keys), ["a", task, "b"])
    assert (a.how, over.how, b.how) == ("returned", how, "returned") and a.value[1] != b.value[1]


def test_persistent_programs_are_as_many_as_rollouts_at_once_and_end_with_the_worker(persistent, processes_of):
    async def at_once():
        runner = AgentRunner(persistent())
        recorders = [AttemptRecorder(f"rollout-{number}", 1, "worker") for number in range(3)]
        ended = await asyncio.gather(*(runner.run("a", ENDPOINT, recorder) for recorder in recorders))
        assert len(processes_of(f"{sys.executable} stays.py")) == 3
        runner.close()
        return {one.value[1] for one in ended}

    assert len(asyncio.run(at_once())) == 3
    deadline = time.monotonic() + 20
    while processes_of(f"{sys.executable} stays.py") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(f"{sys.executable} stays.py") == []


def test_a_python_agent_in_a_persistent_process_is_loaded_once(tmp_path):
    (tmp_path / "stays_loaded.py").write_text(PERSISTENT_PYTHON)
    config = config_of(tmp_path, run="stays_loaded.py:answer", **{"in": "subprocess"}, persistent=True)
    (a, of_a), (failed, of_failed), (exited, _), (b, _) = in_turn(config, ["a", "raises", "exits", "b"])
    assert a.value[::2] == ["a", "key-0"] and a.value[3] == ["a"]
    assert b.value[2] == "key-3" and b.value[1] == a.value[1] and b.value[3] == ["a", "raises", "exits", "b"]
    assert failed.how == exited.how == "raised" and "LookupError: no table" in failed.error
    assert [reward.value for recorder in (of_a, of_failed) for reward in recorder.rewards] == [0.25, 0.25]
    assert "printed, and no line" in json.loads(of_a.spans[0].attributes)["stderr"]
