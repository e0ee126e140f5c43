"""What users write: agents and graders by name, their parameters, their returns, what they emit."""

import asyncio
import contextvars
import functools
import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest

import raygent
from raygent.actors import agent_runner, grading
from raygent.actors.agent_runner import AgentRunner, AttemptRecorder
from raygent.actors.grading import Grader, GraderError, grade_once
from raygent.actors.rollout_worker import RolloutWorker
from raygent.actors.subprocess_agent import read_events
from raygent.callables import (
    AGENT_OFFERS,
    GRADER_OFFERS,
    ModelEndpoint,
    Verdict,
    arguments,
    awaited,
    is_async,
    load_callable,
    plain,
    read_verdict,
)
from raygent.config import Config, ConfigError
from raygent.emit import EVENTS_FILE, sink
from raygent.records import Lease, Rollout

ENDPOINT = ModelEndpoint("http://127.0.0.1:1/app/a/rg-key.sig/v1", "rg-key.sig")


def config_of(folder, agent="a.py:f", grader=None, **agent_keys):
    return Config.model_validate(
        {
            "path": str(folder / "raygent.toml"),
            "model": {"path": "m/m"},
            "agent": {"run": agent} | agent_keys,
            "grader": {"run": grader, "timeout_s": 1.0} if grader else {},
            "data": {"train": "tasks.jsonl"},
        }
    )


def run_agent(config, task="task"):
    recorder = AttemptRecorder("rollout", 1, "worker")
    return asyncio.run(AgentRunner(config).run(task, ENDPOINT, recorder)), recorder


def test_endpoint_of_a_named_agent():
    named = ENDPOINT.agent("sql writer").agent("plan/ner")
    assert named.base_url == "http://127.0.0.1:1/app/a/rg-key.sig/agent/plan%252Fner/v1"
    assert named.anthropic_base_url == "http://127.0.0.1:1/app/a/rg-key.sig/agent/plan%252Fner"
    assert (named.api_key, named.model) == ("rg-key.sig", "policy")


def test_load_callable_of_files_packages_objects_and_classes(tmp_path):
    (tmp_path / "helper_of_test.py").write_text("WORD = 'helped'\n")
    (tmp_path / "loaded_of_test.py").write_text(
        "from helper_of_test import WORD\n"
        "def function(task): return WORD\n"
        "class WithRun:\n    async def run(self, task, model): return 1\n"
        "class WithCall:\n    async def __call__(self, task, model): return 1\n"
        "made = WithRun()\nnothing = 3\n"
    )
    assert load_callable("loaded_of_test.py:function", tmp_path, "agent.run")("x") == "helped"
    assert load_callable("loaded_of_test:function", tmp_path, "agent.run")("x") == "helped"
    for name in ("WithRun", "WithCall", "made"):
        assert is_async(load_callable(f"loaded_of_test.py:{name}", tmp_path, "agent.run"))
    for wrong in ("loaded_of_test.py:absent", "loaded_of_test.py:nothing", "no_such_package:function"):
        with pytest.raises(ConfigError, match=r"^agent\.run: .*(absent|int, not a function|no_such_package)"):
            load_callable(wrong, tmp_path, "agent.run")


def test_a_module_that_exits_when_imported_is_an_error_not_an_end(tmp_path):
    (tmp_path / "exits_of_test.py").write_text("import sys\nsys.exit(4)\n")
    with pytest.raises(ConfigError, match=r"grader\.run: .*SystemExit: 4"):
        load_callable("exits_of_test.py:f", tmp_path, "grader.run")


def test_parameters_by_name_and_by_place():
    def call(function, offers=AGENT_OFFERS, values=("T", "M")):
        positional, named = arguments(function, offers, values, "agent.run")
        return function(*positional, **named)

    assert call(lambda task, model: (task, model)) == ("T", "M")
    assert call(lambda model, task: (task, model)) == ("T", "M")
    assert call(lambda question, llm: (question, llm)) == ("T", "M")
    assert call(lambda question: question) == "T"
    assert call(lambda x, y, temperature=0.5: (x, y, temperature)) == ("T", "M", 0.5)
    assert call(lambda *all_of_it: all_of_it) == ("T", "M")
    assert call(lambda question="What is 2 + 2?": question) == "T"
    assert call(lambda prompt="x", model=None: (prompt, model)) == ("T", "M")
    assert call(lambda prompt, model=None: (prompt, model)) == ("T", "M")
    assert call(lambda task, verbose=False: (task, verbose)) == ("T", False)
    assert call(lambda model, *, verbose=False: (model, verbose)) == ("M", False)
    assert call(lambda **named: named) == {"task": "T", "model": "M"}
    assert call(lambda: "alone") == "alone"
    graded = ("I", "P", "O")
    assert call(lambda output, private: (output, private), GRADER_OFFERS, graded) == ("O", "P")
    assert call(lambda *all_of_it: all_of_it, GRADER_OFFERS, graded) == graded
    assert call(lambda output, strict=True: (output, strict), GRADER_OFFERS, graded) == ("O", True)
    assert call(lambda **named: named, GRADER_OFFERS, graded) == {"input": "I", "private": "P", "output": "O"}
    own = (lambda output, expected: 0, lambda predicted, gold, question: 0, lambda a, b, c: 0, lambda predicted="": 0)
    for unlike in own:
        with pytest.raises(ConfigError, match=r"it is called with \(input, private, output\)"):
            arguments(unlike, GRADER_OFFERS, graded, "grader.run")
    with pytest.raises(ConfigError, match=r"takes \(llm, task\)"):
        arguments(lambda llm, task: None, AGENT_OFFERS, (1, 2), "agent.run")
    with pytest.raises(ConfigError, match=r"grader\.run: its parameters are not to be seen"):
        arguments(max, GRADER_OFFERS, graded, "grader.run")
    with pytest.raises(ConfigError, match=r"agent\.run: takes \(a, b, c\); it is called with \(task, model\)"):
        arguments(lambda a, b, c: None, AGENT_OFFERS, (1, 2), "agent.run")


DEEP = functools.reduce(lambda inner, _: [inner], range(3000), [])


def test_verdicts():
    assert read_verdict(True, "the agent").value == 1.0
    assert read_verdict(False, "the agent").value == 0.0
    assert read_verdict(3, "the agent").value == 3.0
    numbers = {"reward": np.float32(0.5), "rows": np.int64(2), "right": np.bool_(True)}
    assert plain([np.float32(1), numbers]) == [1.0, {"reward": 0.5, "rows": 2, "right": True}]
    with pytest.raises(TypeError, match="set is no JSON value"):
        plain({1})
    scored = read_verdict({"reward": 0.5, "rows": 1, "why": "text"}, "the grader")
    assert (scored.value, scored.components) == (0.5, {"rows": 1.0})
    assert read_verdict("0.5", "the agent") is None
    assert read_verdict({"answer": 1}, "the agent") is None
    assert read_verdict(None, "the agent") is None
    for wrong in (float("nan"), float("inf"), {"reward": float("nan")}):
        with pytest.raises(ValueError, match="finite"):
            read_verdict(wrong, "the agent")
    with pytest.raises(TypeError, match="not str"):
        read_verdict({"reward": "high"}, "the agent")
    assert read_verdict(np.bool_(True), "the grader").value == 1.0
    scored = read_verdict({"reward": np.float32(0.5), "rows": np.int64(2), "right": np.array(True)}, "the grader")
    assert (scored.value, scored.components) == (0.5, {"rows": 2.0, "right": 1.0})
    with pytest.raises(ValueError, match="finite"):
        read_verdict(10**400, "the agent")
    with pytest.raises(ValueError, match="nested"):
        plain(DEEP)
    assert plain({"rows": [(1, "a")]}) == {"rows": [[1, "a"]]}
    with pytest.raises(TypeError):
        plain({1, 2})


def test_verdicts_of_single_agents_and_calls():
    verdict = read_verdict(
        {"reward": 1, "rows": 2, "agents": {"writer": np.float32(0.5)}, "calls": {0: 0.25, "3": True}}, "the grader"
    )
    assert verdict == Verdict(1.0, {"rows": 2.0}, {"writer": 0.5}, {0: 0.25, 3: 1.0})
    assert read_verdict(json.loads(json.dumps(verdict.to_dict())), "the grader") == verdict
    counted = read_verdict({"reward": 1, "agents": 3, "calls": 2}, "the agent")
    assert counted == read_verdict(counted.to_dict(), "the agent") == Verdict(1.0, {"agents": 3.0, "calls": 2.0})
    for call in ("-1", "first", 1.5, True, "9" * 10):
        with pytest.raises(ValueError, match=r'"calls" the grader gave: .* is no number of a call from 0 on'):
            read_verdict({"reward": 1, "calls": {call: 1.0}}, "the grader")
    with pytest.raises(ValueError, match=r"the reward of agent 'writer' the grader gave .*finite"):
        read_verdict({"reward": 1, "agents": {"writer": float("nan")}}, "the grader")
    recorder = AttemptRecorder("rollout", 1, "worker")
    recorder.verdict(verdict)
    told = [(one.value, one.agent, one.call_sequence, json.loads(one.components)) for one in recorder.rewards]
    assert told == [(1, "", -1, {"rows": 2}), (0.5, "writer", -1, {}), (0.25, "", 0, {}), (1, "", 3, {})]


def test_emitting_outside_a_run_does_nothing():
    raygent.emit_reward(1)
    raygent.emit_reward(float("nan"))
    with raygent.span("search", query="x") as attributes:
        attributes["hits"] = 3


def test_what_a_process_emits_is_read_back_whatever_it_is(tmp_path, monkeypatch):
    file = tmp_path / "events.jsonl"
    file.touch()
    monkeypatch.setenv(EVENTS_FILE, str(file))

    class Untold:
        def __str__(self):
            raise LookupError("no words")

    for told in ("half \ud800", 10**5000, DEEP, Untold()):
        with raygent.span("told", what=told):
            pass
    first, *others = [event["attributes"] for event in read_events(file.open("rb"))]
    assert first == {"what": "half \ud800"}
    assert [other["not_json"].partition(":")[0] for other in others] == ["ValueError", "RecursionError", "LookupError"]
    recorder = AttemptRecorder("rollout", 1, "worker")
    recorder.note("told", what=Untold())
    assert "LookupError" in recorder.spans[0].attributes
    with raygent.span("named", name="x"):
        pass
    file.unlink()
    raygent.emit_reward(1.0)  # lost, and the agent goes on


def test_emitted_records_of_tasks_threads_and_decorators():
    recorder = AttemptRecorder("rollout", 2, "worker")

    @raygent.span("decorated", kind="tool")
    def tool():
        raise KeyError("gone")

    async def agent():
        sink.set(recorder)
        raygent.emit_reward(0.25, components={"rows": True})
        await asyncio.to_thread(raygent.emit_reward, 0.75)
        await asyncio.gather(asyncio.create_task(asyncio.to_thread(raygent.emit_reward, 9.0, agent="planner")))
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(raygent.emit_reward, 5.0, name="style"))
        thread.start()
        thread.join()
        with pytest.raises(KeyError):
            tool()
        with pytest.raises(ValueError, match="finite"):
            raygent.emit_reward(float("nan"))

    asyncio.run(agent())
    assert [reward.value for reward in recorder.rewards] == [0.25, 0.75, 9.0, 5.0]
    assert [reward.source_sequence for reward in recorder.rewards] == [0, 1, 2, 3]
    late = {"value": 7.0, "name": "reward", "agent": "", "components": {}, "time": recorder.rewards[0].time - 1}
    recorder("rewards", late)  # by HTTP, before the others
    recorder.order_rewards()
    assert [reward.value for reward in recorder.rewards] == [7.0, 0.25, 0.75, 9.0, 5.0]
    assert [reward.source_sequence for reward in recorder.rewards] == [0, 1, 2, 3, 4]
    recorder.rewards = recorder.rewards[1:]
    assert json.loads(recorder.rewards[0].components) == {"rows": 1.0}
    assert recorder.emitted() == 0.75
    assert recorder.spans[0].kind == "tool" and "gone" in json.loads(recorder.spans[0].attributes)["error"]
    recorder.close()
    recorder.verdict(Verdict(1.0))
    assert len(recorder.rewards) == 4


def test_a_decorated_coroutine_is_an_event_from_its_call_to_its_end():
    recorder = AttemptRecorder("rollout", 1, "worker")

    @raygent.span("slow", kind="tool")
    async def slow(seconds):
        await asyncio.sleep(seconds)
        raise KeyError("gone")

    async def agent():
        sink.set(recorder)
        await asyncio.gather(slow(0.1), slow(0.2), return_exceptions=True)

    asyncio.run(agent())
    assert inspect.iscoroutinefunction(slow)
    for span, seconds in zip(recorder.spans, (0.1, 0.2), strict=True):
        assert span.finished - span.started >= seconds and "gone" in json.loads(span.attributes)["error"]

    class Tool:
        async def __call__(self):
            return raygent.headers()

    tagged = {"x-raygent-agent": "a"}
    sink_token = sink.set(recorder)
    before = len(recorder.spans)
    for called in (raygent.agent("a")(Tool()), raygent.agent("a")(lambda: Tool()())):
        assert asyncio.run(awaited(called())) == tagged
    assert [(span.kind, span.name, span.attributes) for span in recorder.spans[before:]] == [("agent", "a", "{}")] * 2
    sink.reset(sink_token)
    with pytest.raises(TypeError, match=r"@span: .*steps is a generator"):

        @raygent.span("steps")
        async def steps():
            yield 1


def test_the_reward_of_agents_alone_is_their_mean():
    recorder = AttemptRecorder("rollout", 1, "worker")
    for agent, value in (("a", 0.0), ("a", 1.0), ("b", 0.0)):
        recorder("rewards", {"value": value, "name": "reward", "agent": agent, "components": {}, "time": 0.0})
    assert recorder.emitted() == 0.5


@raygent.agent("planner")
async def plans(ask):
    raygent.emit_reward(0.5)
    inner = await writes(ask)
    return [raygent.headers(), inner, await ask(), await ask(extra_headers={"x-raygent-agent": "own"})]


@raygent.agent("writer")
async def writes(ask):
    await asyncio.sleep(0)
    return await ask()


@raygent.agent("checker")
def checks(ask):
    if ask is None:
        raise LookupError("nothing to check")
    return ask()


@pytest.fixture
def asked_of():
    """A vendor's endpoint that answers with the agent's name in the request."""

    class Vendor(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            message = {"role": "assistant", "content": self.headers.get("x-raygent-agent", "nobody")}
            body = json.dumps({"id": "1", "choices": [{"index": 0, "message": message}]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Vendor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "k"}
    hooks = {"event_hooks": {"request": [raygent.tag]}}
    question = {"model": "policy", "messages": [{"role": "user", "content": "who?"}]}
    client = openai.OpenAI(**at, http_client=httpx.Client(**hooks))

    async def ask(**more):
        async with openai.AsyncOpenAI(**at, http_client=httpx.AsyncClient(**hooks)) as asynchronous:
            reply = await asynchronous.chat.completions.create(**question, **more)
            return reply.choices[0].message.content

    yield ask, lambda: client.chat.completions.create(**question).choices[0].message.content
    client.close()
    server.shutdown()
    server.server_close()


def test_calls_within_an_agents_function_are_the_agents(asked_of):
    ask, ask_now = asked_of
    recorder = AttemptRecorder("rollout", 1, "worker")

    async def run():
        sink.set(recorder)
        found = await asyncio.gather(plans(ask), writes(ask), asyncio.to_thread(checks, ask_now), ask())
        with pytest.raises(LookupError):
            checks(None)
        return [*found, raygent.headers()]

    planned = [{"x-raygent-agent": "planner"}, "writer", "planner", "own"]
    assert asyncio.run(run()) == [planned, "writer", "checker", "nobody", {}]
    spans = [(span.kind, span.name, json.loads(span.attributes)) for span in recorder.spans]
    assert sorted(spans, key=str) == [
        ("agent", "checker", {"error": "LookupError: nothing to check"}),
        ("agent", "checker", {}),
        ("agent", "planner", {}),
        ("agent", "writer", {}),
        ("agent", "writer", {}),
    ]
    assert [(reward.value, reward.agent) for reward in recorder.rewards] == [(0.5, "")]


def test_an_agents_function_outside_a_run_is_the_function(asked_of):
    ask, ask_now = asked_of
    assert asyncio.run(plans(ask)) == [{}, "nobody", "nobody", "own"]
    assert checks(ask_now) == "nobody" and checks.__name__ == "checks"
    assert inspect.iscoroutinefunction(plans) and plans.__name__ == "plans"


def test_an_agents_name_and_function_are_checked():
    for name in ("", "plan\nner", "pläner", " planner"):
        with pytest.raises(ValueError, match="HTTP header"):
            raygent.agent(name)
    with pytest.raises(TypeError, match=r"steps is a generator; mark the function"):

        @raygent.agent("planner")
        def steps():
            yield 1


AGENTS = """
import asyncio, sys, threading, time
import raygent

def sync(task, model):
    raygent.emit_reward(0.5)
    return {"task": task, "url": model.base_url, "thread": threading.current_thread().name}

async def coroutine(task, model):
    raygent.emit_reward(0.25)
    await asyncio.sleep(0)
    return [task, model.model]

def awaitable(task): return coroutine(task, raygent.ModelEndpoint("u/v1", "k"))
def raises(task): raise LookupError("no such table")
async def raises_in_task(task): raise LookupError("no such table")
def exits(task): sys.exit(3)
async def exits_in_task(task): sys.exit(3)
def hangs(task): time.sleep(4)
async def hangs_in_task(task): await asyncio.sleep(60)
async def part(task): sys.exit(2)
async def exits_in_a_part(task): await asyncio.gather(part(task), asyncio.sleep(60))
async def cancels_itself(task): asyncio.current_task().cancel(); await asyncio.sleep(1)
async def blocks(task): time.sleep(14)
"""


def test_how_agents_in_the_worker_end(tmp_path):
    (tmp_path / "agents_of_test.py").write_text(AGENTS)

    def run(name, timeout_s=30.0):
        return run_agent(config_of(tmp_path, f"agents_of_test.py:{name}", timeout_s=timeout_s))

    ended, recorder = run("sync")
    assert ended.value == {"task": "task", "url": ENDPOINT.base_url, "thread": "agent"}
    assert recorder.emitted() == 0.5
    ended, recorder = run("coroutine")
    assert (ended.value, recorder.emitted()) == (["task", "policy"], 0.25)
    ended, recorder = run("awaitable")
    assert (ended.value, recorder.emitted()) == (["task", "policy"], 0.25)
    for name in ("raises", "raises_in_task"):
        ended, recorder = run(name)
        assert ended.how == "raised" and ended.error.rstrip().endswith("LookupError: no such table")
        assert recorder.spans[-1].kind == "exception"
    for name in ("exits", "exits_in_task"):
        ended, _ = run(name)
        assert ended.how == "raised" and "sys.exit(3)" in ended.error
    assert run("cancels_itself")[0].how == "raised"
    for name in ("hangs", "hangs_in_task"):
        ended, _ = run(name, timeout_s=0.3)
        assert ended.how == "timeout" and "agent.timeout_s = 0.3" in ended.error


def test_an_exit_in_a_part_of_one_agent_ends_no_other(tmp_path):
    (tmp_path / "agents_of_test.py").write_text(AGENTS)

    async def both():
        runner = AgentRunner(config_of(tmp_path, "agents_of_test.py:exits_in_a_part"))
        other = asyncio.create_task(runner.on_agents_loop(asyncio.sleep(0.2, "done"), 30))
        ended = await runner.run("t", ENDPOINT, AttemptRecorder("r", 1, "w"))
        assert ended.how == "raised" and "sys.exit(2)" in ended.error
        assert await other == "done" and not runner.stuck

    asyncio.run(both())


def test_abandoned_threads_and_a_blocked_loop_wear_a_worker_out(tmp_path):
    (tmp_path / "agents_of_test.py").write_text(AGENTS)

    async def many():
        runner = AgentRunner(config_of(tmp_path, "agents_of_test.py:hangs", timeout_s=0.3))
        await asyncio.gather(*(runner.run("t", ENDPOINT, AttemptRecorder(str(n), 1, "w")) for n in range(3)))
        assert runner.worn(3) and not runner.worn(4)
        blocked = AgentRunner(config_of(tmp_path, "agents_of_test.py:blocks", timeout_s=0.3))
        ended = await blocked.run("t", ENDPOINT, AttemptRecorder("r", 1, "w"))
        assert ended.how == "timeout" and "blocked the event loop" in ended.error and blocked.worn(100)
        await asyncio.sleep(4)
        assert not runner.worn(1)

    asyncio.run(many())


GRADERS = """
import asyncio, os, sys, time

def exact(private, output):
    print("graders print")
    return output == private

async def judged(input, private, output):
    await asyncio.sleep(0.01)
    return {"reward": 0.5, "rows": 1}

def raises(private, output): raise ValueError("bad gold")
async def raises_in_task(private, output): raise ValueError("bad gold")
def dies(private, output): os._exit(9)
def text(private, output): return "good"
def nan(private, output): return float("nan")
def hangs(private, output):
    if private == "hang":
        os.system("sleep 7331")
    return 1
async def hangs_in_task(private, output): await asyncio.sleep(60)
async def blocks(private, output): time.sleep(4)
def process(private, output): return os.getpid()
"""


def test_graders(tmp_path):
    (tmp_path / "graders_of_test.py").write_text(GRADERS)

    def grade(name, private="gold", output="gold"):
        return grade_once(config_of(tmp_path, grader=f"graders_of_test.py:{name}"), "question", private, output).verdict

    assert grade("exact").value == 1.0
    assert grade("exact", output=None).value == 0.0
    assert grade("judged").components == {"rows": 1.0}
    for name in ("raises", "raises_in_task"):
        with pytest.raises(GraderError, match="ValueError: bad gold"):
            grade(name)
    with pytest.raises(GraderError, match="ended its process"):
        grade("dies")
    with pytest.raises(GraderError, match="gave 'good'"):
        grade("text")
    with pytest.raises(GraderError, match="finite"):
        grade("nan")
    for name in ("hangs", "hangs_in_task"):
        with pytest.raises(GraderError, match=r"grader\.timeout_s = 1 s"):
            grade(name, private="hang")


def test_an_async_grader_that_blocks_the_loop_is_told(tmp_path, monkeypatch):
    (tmp_path / "graders_of_test.py").write_text(GRADERS)
    monkeypatch.setattr(agent_runner, "CANCEL_S", 0.1)
    config = config_of(tmp_path, "graders_of_test.py:blocks", "graders_of_test.py:blocks")
    worker = SimpleNamespace(config=config, runner=AgentRunner(config))
    lease = Lease(Rollout("r", "1", "g", "train", 0, 0, "question", "gold"), 1)
    with pytest.raises(GraderError, match=r"graders_of_test.py:blocks: .*grader\.timeout_s = 1 s; .*blocked the event"):
        asyncio.run(RolloutWorker._grade(worker, Grader(config, 1), lease, "answer"))
    assert worker.runner.worn(100)


def test_hung_graders_are_killed_and_hold_up_nobody(tmp_path, processes_of):
    (tmp_path / "graders_of_test.py").write_text(GRADERS)

    async def many():
        grader = Grader(config_of(tmp_path, grader="graders_of_test.py:hangs"), 16)
        hung = [asyncio.create_task(grader.grade("q", "hang", "x")) for _ in range(10)]
        good = [asyncio.create_task(grader.grade("q", "gold", "x")) for _ in range(5)]
        done = await asyncio.gather(*hung, *good, return_exceptions=True)
        assert all(isinstance(one, GraderError) for one in done[:10])
        assert [one.verdict.value for one in done[10:]] == [1.0] * 5
        grader.close()

    asyncio.run(many())
    assert processes_of("sleep 7331") == []


def test_a_grader_process_that_cannot_be_started_keeps_no_place(tmp_path, monkeypatch):
    def no_process(*_, **__):
        raise BlockingIOError("no more processes")

    (tmp_path / "graders_of_test.py").write_text(GRADERS)
    monkeypatch.setattr(grading, "Supervised", no_process)
    grader = Grader(config_of(tmp_path, grader="graders_of_test.py:exact"), 1)
    with pytest.raises(BlockingIOError):
        asyncio.run(grader.grade("q", "gold", "x"))
    assert grader.started == 0


def test_a_grader_process_that_was_killed_while_it_was_idle_is_no_fault_of_the_next_output(tmp_path):
    (tmp_path / "graders_of_test.py").write_text(GRADERS)
    grader = Grader(config_of(tmp_path, grader="graders_of_test.py:exact"), 1)
    for _ in range(2):
        assert asyncio.run(grader.grade("q", "gold", "gold")).verdict.value == 1.0
        (idle,) = grader.idle.queue
        idle.supervised.process.kill()
        idle.supervised.process.wait()
    assert grader.started == 1
    grader.close()


def test_quick_graders_share_few_processes(tmp_path):
    (tmp_path / "graders_of_test.py").write_text(GRADERS)

    async def many():
        grader = Grader(config_of(tmp_path, grader="graders_of_test.py:process"), 16)
        graded = await asyncio.gather(*(grader.grade("q", "gold", "x") for _ in range(200)))
        grader.close()
        return {one.verdict.value for one in graded}

    assert len(asyncio.run(many())) <= 8
