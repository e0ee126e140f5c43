"""RolloutWorker and WorkerPool on a real Ray, with the real store and gateway; the model alone is a stand-in."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_engine import start_tiny_engine

from raygent.actors.outcomes import UNANSWERED
from raygent.actors.replay_store import ReplayStore
from raygent.actors.rollout_worker import make_worker
from raygent.actors.working_folder import localised, working_folder
from raygent.cluster.worker_pool import WorkerPool
from raygent.config import Config
from raygent.records import Rollout

SECRET = "secret"
AGENT = """
import asyncio, functools, os, subprocess, time
import httpx
import raygent

def body(text):
    return {"messages": [{"role": "user", "content": text}]}

async def ask(model, text="hello"):
    async with httpx.AsyncClient(timeout=30, verify=False) as client:
        reply = await client.post(f"{model.base_url}/chat/completions", json=body(text))
        if reply.status_code >= 400:
            raise httpx.HTTPStatusError(f"{reply.status_code} {reply.text}", request=reply.request, response=reply)
        return reply.json()["choices"][0]["message"]["content"]

async def answer(task, model):
    if task == "no call":
        return "yes"
    if task == "other model":
        raise ConnectionError("refused")
    if task == "named":
        return await ask(model.agent("planner"))
    if task == "greedy":
        return [await ask(model) for _ in range(9)]
    if task == "swallows":
        try:
            return await ask(model, "overflow")
        except httpx.HTTPStatusError:
            return "yes"
    if task == "unanswered":
        asyncio.get_running_loop().create_task(ask(model, "slow"))
        await asyncio.sleep(0.3)
        return "yes"
    said = await ask(model, task if task in ("overflow", "break", "judge", "slow") else "hello")
    if task == "raises":
        raise LookupError("no table")
    if task == "hangs":
        await asyncio.sleep(60)
    if task == "no json":
        return {1, 2}
    if task == "deep":
        return functools.reduce(lambda inner, _: [inner], range(3000), [])
    return said

async def rewarded(task, model):
    await ask(model)
    if task == "emits":
        raygent.emit_reward(0.25, name="reward", components={"rows": 1})
        raygent.emit_reward(0.125, name="style")
        return None
    if task in ("sends", "sends and returns"):
        async with httpx.AsyncClient(base_url=model.anthropic_base_url) as client:
            for reward in ({"value": 0.5}, {"value": 0.375, "components": {"rows": 1}}, {"value": 2, "agent": "planner"}):
                (await client.post("/v1/rewards", json=reward)).raise_for_status()
            assert (await client.post("/v1/rewards", json={"value": "high"})).status_code == 400
        return 0.75 if task == "sends and returns" else None
    return {"number": 0.5, "bool": True, "dict": {"reward": 0.75, "rows": 1}, "nan": float("nan"), "none": None}[task]

async def waits(task, model):
    try:
        return await ask(model, task)
    except httpx.HTTPError:
        await asyncio.sleep(3600)

def blocks(task, model):
    reply = httpx.post(f"{model.base_url}/chat/completions", json=body("hello"), timeout=30)
    time.sleep(task)
    return reply.status_code == 200

def hangs_in_thread(task, model):
    time.sleep(8)
"""
GRADER = """
def grade(private, output):
    if private == "bad":
        raise ValueError("bad gold")
    return {"reward": float(output == private), "length": len(output)}
"""


class Setup:
    """A store, an engine, and workers of one config, as the driver has them."""

    def __init__(self, folder, name, run, grader=None, workers=None, **agent):
        (folder / "worked.py").write_text(AGENT)
        (folder / "graded.py").write_text(GRADER)
        tree = {
            "path": str(folder / "raygent.toml"),
            "model": {"path": "m/m"},
            "agent": {"run": f"worked.py:{run}", "timeout_s": 20.0, "max_calls": 5} | agent,
            "grader": {"run": grader, "failed_reward": -1.0} if grader else {"failed_reward": -1.0},
            "data": {"train": "tasks.jsonl"},
            "workers": {"cpus": 0.1, "lease_s": 2.0, "max": 3} | (workers or {}),
        }
        self.config = Config.model_validate(tree)
        self.name, self.folder = name, folder
        self.store = (
            ray.remote(ReplayStore)
            .options(num_cpus=0)
            .remote(str(folder / "store"), self.config.workers.lease_s, self.config.workers.max_attempts)
        )
        self.engine, self.port = start_tiny_engine(name, SECRET, self.store, 5)
        self.made = 0

    def worker(self):
        self.made += 1
        worker = make_worker(self.config, self.store, self.engine, SECRET, f"worker-{self.made}")
        return worker, worker.run.remote()

    def pool(self):
        return WorkerPool(self.config, self.store, self.engine, SECRET)

    def ask(self, inputs, private=None):
        rollouts = [
            Rollout(f"r{place}-{task}", str(place), f"g{place}", "train", 0, 0, task, private and private[place])
            for place, task in enumerate(inputs)
        ]
        ray.get(self.store.add_rollouts.remote(rollouts))
        return [rollout.rollout_id for rollout in rollouts]

    def ended(self, timeout_s=180):
        """By rollout's input: its row, with its winning attempt's error and its rewards."""
        assert ray.get(self.store.wait.remote(0, "train", timeout_s)) == 0
        tables = {name: table.to_pylist() for name, table in ray.get(self.store.take.remote(0, "train")).items()}
        rows = {}
        for row in tables["rollouts"]:
            of = {name: [r for r in tables[name] if r["rollout_id"] == row["rollout_id"]] for name in tables}
            rows[json.loads(row["input"])] = row | {"calls": of["calls"], "rewards": of["rewards"]} | {
                "error": of["attempts"][0]["error"] if of["attempts"] else ""
            }  # fmt: skip
        return rows

    def all_attempts(self):
        ray.get(self.store.close.remote())
        return pq.read_table(self.folder / "store" / "attempts").to_pylist()

    def close(self):
        ray.kill(ray.get_actor(self.name))
        ray.kill(self.store)


@pytest.fixture
def setup(cluster, tmp_path):
    made = []

    def make(*arguments, **keys):
        made.append(Setup(tmp_path, f"engine-{tmp_path.name}-{len(made)}", *arguments, **keys))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_outcomes_with_a_grader(setup):
    tasks = ["fine", "wrong", "ungradable", "named", "no call", "raises", "hangs", "overflow", "greedy"]
    tasks += ["no json", "deep", "swallows", "other model"]
    private = ["yes", "no", "bad", *["yes"] * 10]
    on = setup("answer", grader="graded.py:grade", timeout_s=15.0)
    worker, running = on.worker()
    on.ask(tasks, private)
    ended = on.ended()
    found = {task: (row["status"], row["outcome"], row["reward"]) for task, row in ended.items()}
    assert found == {
        "fine": ("succeeded", "succeeded", 1.0),
        "wrong": ("succeeded", "succeeded", 0.0),
        "named": ("succeeded", "succeeded", 1.0),
        "ungradable": ("failed", "grader_error", -1.0),
        "no call": ("failed", "no_call", -1.0),
        "raises": ("failed", "agent_error", -1.0),
        "hangs": ("failed", "timeout", -1.0),
        "overflow": ("failed", "context_overflow", -1.0),
        "greedy": ("failed", "max_calls", -1.0),
        "no json": ("failed", "agent_error", -1.0),
        "deep": ("failed", "agent_error", -1.0),
        "swallows": ("failed", "context_overflow", -1.0),
        "other model": ("failed", "agent_error", -1.0),
    }
    assert all(row["attempts"] == 1 for row in ended.values())
    assert [call["agent"] for call in ended["named"]["calls"]] == ["planner"]
    assert len(ended["greedy"]["calls"]) == 5
    assert json.loads(ended["fine"]["rewards"][0]["components"]) == {"length": 3.0}
    for task, words in {"no call": "base_url", "raises": "LookupError: no table", "ungradable": "bad gold"}.items():
        assert words in ended[task]["error"]
    assert [task for task, row in ended.items() if UNANSWERED in row["error"]] == ["other model"]
    assert ended["other model"]["error"].endswith(f"ConnectionError: refused {UNANSWERED}")
    ray.get(worker.stop.remote())
    assert ray.get(running) == "stopped"


def test_rewards_without_a_grader(setup):
    on = setup("rewarded", timeout_s=30.0)
    on.worker()
    on.ask(["number", "bool", "dict", "emits", "sends", "sends and returns", "nan", "none"])
    ended = on.ended()
    assert {task: (row["outcome"], row["reward"]) for task, row in ended.items()} == {
        "number": ("succeeded", 0.5),
        "bool": ("succeeded", 1.0),
        "dict": ("succeeded", 0.75),
        "emits": ("succeeded", 0.25),
        "sends": ("succeeded", 0.375),
        "sends and returns": ("succeeded", 0.75),
        "nan": ("agent_error", -1.0),
        "none": ("no_reward", -1.0),
    }
    assert [(row["name"], row["value"]) for row in ended["emits"]["rewards"]] == [("reward", 0.25), ("style", 0.125)]
    by_http = [(row["value"], row["agent"], row["components"]) for row in ended["sends"]["rewards"]]
    assert by_http == [(0.5, "", "{}"), (0.375, "", '{"rows":1.0}'), (2.0, "planner", "{}")]
    assert [row["value"] for row in ended["sends and returns"]["rewards"]] == [0.5, 0.375, 2.0, 0.75]


def test_a_call_still_in_flight_at_the_end_is_cut_off(setup):
    on = setup("answer", grader="graded.py:grade")
    on.worker()
    on.ask(["unanswered"], ["yes"])
    assert on.ended()["unanswered"]["outcome"] == "no_call"


def test_what_the_engine_broke_in_a_process_is_tried_again_too(setup):
    on = setup("answer", grader="graded.py:grade", workers={"max_attempts": 2}, timeout_s=60.0, **{"in": "subprocess"})
    on.worker()
    on.ask(["break", "raises"], ["yes", "yes"])
    ended = on.ended()
    assert ended["raises"]["outcome"] == "agent_error"
    assert ended["break"]["status"] == "lost"
    outcomes = [row["outcome"] for row in on.all_attempts() if "break" in row["rollout_id"]]
    assert outcomes == ["engine_lost", "engine_lost"]


def test_what_the_engine_broke_is_tried_again(setup):
    on = setup("answer", grader="graded.py:grade", workers={"max_attempts": 2})
    on.worker()
    on.ask(["break"], ["yes"])
    assert on.ended()["break"]["status"] == "lost"
    attempts = on.all_attempts()
    assert [row["outcome"] for row in attempts] == ["engine_lost"] * 2
    assert "the engine broke" in attempts[0]["error"]


def test_what_an_upstream_failed_is_tried_again_and_stops_nobody(setup):
    workers = {"max_attempts": 2, "rollouts_each": 1, "lease_s": 20.0}
    on = setup("answer", grader="graded.py:grade", timeout_s=30.0, workers=workers)
    on.worker()
    on.ask(["judge", "fine"], ["yes", "yes"])
    ended = on.ended()
    assert {task: row["status"] for task, row in ended.items()} == {"judge": "lost", "fine": "succeeded"}
    first, fine, again = sorted(on.all_attempts(), key=lambda row: row["started"])
    assert [row["outcome"] for row in (first, fine, again)] == ["upstream_lost", "succeeded", "upstream_lost"]
    assert "upstream.vendor: HTTP 500" in first["error"]
    assert again["started"] >= first["finished"] > first["started"] + 3  # the upstream has had some time
    assert fine["started"] < first["finished"]  # in the one place that there is


@pytest.mark.parametrize("agent", ["answer", "waits"])  # that fails with its call, and that would go on for an hour
def test_an_engine_killed_and_replaced(setup, agent):
    on = setup(agent, grader="graded.py:grade", timeout_s=7200.0)
    on.worker()
    on.ask(["slow"], ["yes"])
    while ray.get(on.store.status.remote())["running"] < 1:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(on.engine.status()[0]["pid"], signal.SIGKILL)
    time.sleep(6)  # longer than three attempts that end at once
    start_tiny_engine_again(on)
    ended = on.ended()["slow"]
    assert (ended["status"], ended["winning_attempt"], ended["attempts"]) == ("succeeded", 2, 2)
    first, second = sorted(on.all_attempts(), key=lambda row: row["attempt"])
    assert [first["outcome"], second["outcome"]] == ["engine_lost", "succeeded"]
    assert ("serves no more" in first["error"]) == (agent == "waits")


def start_tiny_engine_again(on):
    deadline = time.monotonic() + 20
    while True:
        try:
            start_tiny_engine(on.name, SECRET, on.store, 5, on.port)
            return
        except ValueError:  # Ray has not seen yet that the old one is dead
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_heartbeats_go_on_while_sync_agents_block(setup):
    on = setup("blocks", workers={"lease_s": 1.0}, timeout_s=20.0)
    on.worker()
    on.ask([5, 5.5])
    ended = on.ended()
    assert {(row["outcome"], row["attempts"], row["reward"]) for row in ended.values()} == {("succeeded", 1, 1.0)}


def test_a_lost_lease_stops_the_agent_and_what_it_started(setup, processes_of):
    on = setup("answer")
    on.config.agent.run, on.config.agent.command = None, ["sh", "-c", "setsid sleep 7551 & sleep 7551"]
    on.worker()
    names = on.ask(["command"])
    wait_for(lambda: len(processes_of("sleep 7551")) == 2)
    ray.get(on.store.cancel.remote(names))
    wait_for(lambda: not processes_of("sleep 7551"))


INSTRUMENTED = """
import os, httpx
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
with provider.get_tracer("agent").start_as_current_span("search", attributes={"hits": 3, "words": ["a", "b"]}):
    body = {"messages": [{"role": "user", "content": "hello"}]}
    httpx.post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json=body, timeout=30).raise_for_status()
provider.shutdown()
print(0.5)
"""


def test_an_instrumented_programs_traces_are_its_spans(setup):
    on = setup("answer", timeout_s=30.0)
    (on.folder / "instrumented.py").write_text(INSTRUMENTED)
    on.config.agent.run, on.config.agent.command = None, [sys.executable, "instrumented.py"]
    on.worker()
    on.ask(["traced"])
    row = on.ended()["traced"]
    assert (row["outcome"], row["reward"], len(row["calls"])) == ("succeeded", 0.5, 1)
    ray.get(on.store.close.remote())
    (span,) = [span for span in pq.read_table(on.folder / "store" / "spans").to_pylist() if span["kind"] == "otlp"]
    attributes = json.loads(span["attributes"])
    assert span["name"] == "search" and attributes | {"hits": 3, "words": ["a", "b"]} == attributes
    assert len(attributes["otlp.trace_id"]) == 32 and len(attributes["otlp.span_id"]) == 16
    assert span["started"] <= row["calls"][0]["started"] <= row["calls"][0]["finished"] <= span["finished"]


LIMITED = """
import json, os, subprocess, sys, time, urllib.request

def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=30).read()

post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
post(os.environ["RAYGENT_REWARD_URL"], {"value": 0.625})
task = json.loads(os.environ["RAYGENT_TASK"])
if task == "memory":
    hog = subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * (300 << 20); time.sleep(60)"])
    hog.wait()
if task == "processes":
    for _ in range(30):
        subprocess.Popen(["sleep", "7552"])
    time.sleep(60)
"""


def test_a_program_rewarded_by_http_and_its_limits(setup, processes_of):
    on = setup("answer", timeout_s=30.0)
    (on.folder / "limited.py").write_text(LIMITED)
    on.config.agent.run, on.config.agent.command = None, [sys.executable, "limited.py"]
    on.config.agent.memory_mb, on.config.agent.processes = 200, 8
    on.worker()
    on.ask(["fine", "memory", "processes"])
    ended = on.ended()
    assert {task: (row["status"], row["outcome"], row["reward"], row["attempts"]) for task, row in ended.items()} == {
        "fine": ("succeeded", "succeeded", 0.625, 1),
        "memory": ("failed", "over_memory", -1.0, 1),
        "processes": ("failed", "over_processes", -1.0, 1),
    }
    assert "agent.memory_mb: " in ended["memory"]["error"] and "agent.processes: " in ended["processes"]["error"]
    assert processes_of("sleep 7552") == []


def test_a_worker_worn_out_by_hung_threads_is_replaced(setup):
    on = setup("hangs_in_thread", timeout_s=0.5, workers={"rollouts_each": 4})
    pool = on.pool()
    pool.start()
    on.ask([f"task {number}" for number in range(8)])
    ended = on.ended()
    assert {row["outcome"] for row in ended.values()} == {"timeout"}
    wait_for(lambda: pool.sizes()["workers_replaced"] >= 1)
    pool.stop()


def test_the_pool_follows_the_queue_and_replaces_the_dead(setup):
    on = setup("blocks", workers={"rollouts_each": 2, "idle_s": 1.0, "lease_s": 1.0}, timeout_s=30.0)
    pool = on.pool()
    pool.start()
    assert pool.sizes()["workers"] == 1
    on.ask([3 + place / 1000 for place in range(10)])
    wait_for(lambda: pool.sizes()["workers"] == 3)
    actor = next(iter(pool.workers.values()))[0]
    ray.kill(actor)
    wait_for(lambda: pool.sizes()["workers_replaced"] == 1)
    assert {(row["outcome"], row["error"]) for row in on.ended().values()} == {("succeeded", "")}
    wait_for(lambda: pool.sizes()["workers"] == 1)
    pool.stop()
    assert pool.sizes()["workers"] == 0


def test_paths_of_another_node(tmp_path, monkeypatch):
    (tmp_path / "copy" / "mine").mkdir(parents=True)
    (tmp_path / "copy" / "mine" / "raygent.toml").write_text("")
    monkeypatch.chdir(tmp_path / "copy")
    tree = {"model": {"path": "m/m"}, "agent": {"run": "a.py:f"}, "data": {"train": "t"}}
    config = Config.model_validate(tree | {"path": "/elsewhere/copy/mine/raygent.toml"})
    assert localised(config, "/elsewhere/copy").folder == tmp_path / "copy" / "mine"


def wait_for(true, timeout_s=40):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_working_folder_made_anew_is_gone_into(tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    folder.rmdir()
    folder.mkdir()
    (folder / "new").touch()
    assert working_folder() == folder and Path("new").exists()


def test_workers_that_cannot_start_are_not_made_for_ever(setup, monkeypatch):
    monkeypatch.setattr("raygent.cluster.worker_pool.MOST_SOON", 2)
    monkeypatch.setattr("raygent.cluster.worker_pool.FAILED_START_S", 0.1)
    pool = setup("no_such_function").pool()
    pool.start()
    deadline = time.monotonic() + 60
    while not pool.broken and time.monotonic() < deadline:
        time.sleep(0.2)
    pool.stop()
    assert "2 rollout workers in a row ended soon" in pool.broken and "no_such_function" in pool.broken
