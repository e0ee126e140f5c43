"""The examples in their frameworks: the same files against a vendor's stand-in and against raygent, which trains the agents
that their TOMLs name. One model for all, taught within seconds what the stand-in answered, and one learner."""

import asyncio
import importlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attempts import SECRET, Attempt, engine_config
from conversations import config, rollout, tables
from ray import cloudpickle

from raygent.actors.engine_handle import EngineHandle
from raygent.actors.learner import Learner, LearnerGroup
from raygent.algorithms.batch import make_samples
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app

EXAMPLES = Path(__file__).parents[2] / "examples" / "sql"
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the learner's process cannot import it


@dataclass
class Example:
    """`models`: the names of those that its agents ask for, in the order of a task whose first query fails."""

    name: str
    models: list[str]
    toml: str = ""
    run: str = ""  # in the place of the TOML's
    files: list[str] = field(default_factory=list)

    @property
    def agent(self) -> dict[str, Any]:
        settings = tomllib.loads((EXAMPLES / f"{self.toml or self.name}.toml").read_text())["agent"]
        return settings | ({"run": self.run} if self.run else {})


HANDED_OFF = ["triage", "sql", "sql", "sql"]
ALL = [
    Example("train", ["policy"] * 2, files=["agent.py", "database.py"]),
    Example("openai_agents", HANDED_OFF, files=["openai_agents.py"]),
    Example("responses", HANDED_OFF, "openai_agents", "openai_agents.py:answer_by_responses", ["openai_agents.py"]),
    Example("mcp", HANDED_OFF, files=["openai_agents.py", "sql_server.py"]),
    Example("anthropic_agent", ["policy"] * 3, files=["anthropic_agent.py"]),
    Example("node", ["sql"] * 3, files=["node/agent.mjs"]),
    Example("langgraph", ["writer", "checker", "rewriter", "checker"], files=["langgraph_agent.py"]),
    Example("autogen_chat", ["writer", "reviewer"] * 2, files=["autogen_chat.py"]),
    Example("crew", ["author", "tester", "tester", "tester"], files=["crew.py"]),
]
examples = pytest.mark.parametrize("example", ALL, ids=[example.name for example in ALL])
TRIES = 5  # of a rollout until it is right
QUERIES = [  # question, the query with main names, the right one
    ("which items ?", "SELECT title FROM items", "SELECT name FROM items"),
    ("what costs 3 ?", "SELECT title FROM items WHERE price = 3", "SELECT name FROM items WHERE price = 3"),
]


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the examples' folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EXAMPLES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("shop") / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE items (name TEXT, price INTEGER); INSERT INTO items VALUES ('pen', 3), ('ink', 5)"
    )
    connection.close()
    return [
        {
            "id": f"task-{number}",
            "input": {"database": str(path), "schema": "shop : items", "question": question},
            "private": {"guess": guess, "sql": sql, "ordered": False},
        }
        for number, (question, guess, sql) in enumerate(QUERIES)
    ]


@pytest.fixture
def packages(example: Example) -> None:
    """What the program in JavaScript needs, as its lock file has it."""
    if example.name != "node":
        return
    if shutil.which("npm") is None:
        pytest.skip("node and npm are not installed; Node 20 or later has them")
    if not (EXAMPLES / "node/node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=EXAMPLES / "node", check=True, timeout=120)


async def run(module: Callable[[str], ModuleType], agent: dict[str, Any], task: dict[str, Any], at: Any) -> Any:
    """What the agent gives for the task's input, with its model at `at`."""
    if "command" in agent:
        variables = {"OPENAI_BASE_URL": at.base_url, "OPENAI_API_KEY": at.api_key}
        variables |= {"RAYGENT_TASK": json.dumps(task["input"])}
        persistent = agent.get("persistent", False)
        process = await asyncio.create_subprocess_exec(
            *agent["command"],
            cwd=EXAMPLES,
            env=os.environ | ({} if persistent else variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        told, _ = await process.communicate(json.dumps(variables).encode() + b"\n" if persistent else None)
        assert process.returncode == 0
        last = told.decode().splitlines()[-1]
        return json.loads(last)["output"] if persistent else last
    name, function = agent["run"].split(".py:")
    found = module(name)
    if hasattr(found, "client"):  # one for all calls, which belongs to the loop that it was used in
        importlib.reload(found)
    return await getattr(found, function)(task["input"], at)


@examples
def test_it_knows_nothing_of_raygent(example: Example) -> None:
    assert all("raygent" not in (EXAMPLES / name).read_text() for name in example.files)


@examples
async def test_a_vendor_will_do(example: Example, module, tasks, packages) -> None:
    with module("oracle").oracle_of(tasks) as oracle:
        found = await asyncio.gather(*(run(module, example.agent, task, vendor(oracle, task)) for task in tasks))
    assert found == [task["private"]["sql"] for task in tasks]
    for task in tasks:
        assert [call["model"] for call in oracle.seen if call["task"] == task["id"]] == example.models


def vendor(oracle: Any, task: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        base_url=f"{oracle.url}/v1", anthropic_base_url=oracle.url, api_key=task["id"], model="policy"
    )


@pytest.fixture(scope="module")
async def tool_model(module, tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As prepare_tools.py makes it, on a few tasks, all of which it knows by heart."""
    prepare, tools = module("prepare"), module("prepare_tools")
    folder = tmp_path_factory.mktemp("tool_model")
    talks = []
    for agent, _ in tools.RECORDED:
        talks += await tools.record(tasks, [(agent, len(tasks))])
    with module("oracle").oracle_of(tasks) as oracle:
        for example in (example for example in ALL if example.name in ("train", "crew")):
            await asyncio.gather(*(run(module, example.agent, task, vendor(oracle, task)) for task in tasks))
    in_text = [call | {"messages": [*call["messages"], call["reply"]]} for call in oracle.seen]
    tokenizer = tools.make_tokenizer(talks + in_text)
    tokenizer.save_pretrained(folder)
    prepare.settle()
    model = prepare.make_model(len(tokenizer), tokenizer.eos_token_id, tools.CONTEXT)
    known = [prepare.encode(tokenizer, talk["messages"], talk["tools"]) for talk in talks]
    encode_reply = module("prepare_crew").encode_reply
    known += [encode_reply(tokenizer, call["messages"]) for call in in_text]
    prepare.warm_up(model, known, known, 1.0, 200)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tool_model: Path, store: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHandle]:
    directory = tmp_path_factory.mktemp("run")
    # Cool enough that the model says what it was taught, warm enough that something is left to learn.
    settings = engine_config("examples", directory, tool_model, continuation="exact", temperature=0.5)
    settings.model.max_tokens = 80
    yield start_app(settings, SECRET, "engine-tests-store", NAMESPACE, 0, str(tool_model))
    delete_app(settings)


@pytest.fixture(scope="module")
def learners(cluster: None, tool_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerGroup]:
    group = LearnerGroup(
        config(
            run={"directory": str(tmp_path_factory.mktemp("runs")), "name": "examples", "steps": 100},
            model={"path": str(tool_model)},
            learner={"ranks": 1, "zero_stage": 0, "learning_rate": 1e-5, "weight_decay": 0.0},
        )
    )
    group.start(None)
    yield group
    group.stop()


def weights(learner: Learner) -> np.ndarray:
    return np.concatenate([value.detach().float().numpy().ravel() for value in learner.engine.module.parameters()])


async def one_that_is_right(example: Example, module, task, engine, store) -> Attempt:
    """The model knows the tasks by heart, but what it says is sampled."""
    for _ in range(TRIES):
        one = Attempt(engine, store, "train", 600.0)
        at = SimpleNamespace(
            base_url=f"{one.base_url}/v1", anthropic_base_url=one.base_url, api_key=one.key, model="policy"
        )
        if await run(module, example.agent, task, at) == task["private"]["sql"]:
            return one
        await asyncio.to_thread(one.calls)
    raise AssertionError(f"{example.name} says {task['private']['sql']} in none of {TRIES} runs")


@examples
async def test_a_step_trains_the_agents_that_are_named(
    example: Example, module, tasks, packages, engine, store, learners
) -> None:
    """Two rollouts, of different tasks so that they say different things, as a group: one with reward, one without."""
    attempts = [await one_that_is_right(example, module, task, engine, store) for task in tasks]
    calls = [call for one in attempts for call in await asyncio.to_thread(one.calls)]
    names = ["agent" if name == "policy" else name for name in example.models]
    assert [call["agent"] for call in calls] == names * len(tasks)

    trained = set(example.agent.get("train", names))
    settings = config(agent={"run": "agent:run", "train": sorted(trained)})
    rollouts = [rollout(one.id, "group", reward) for one, reward in zip(attempts, (1.0, 0.0), strict=True)]
    samples, _ = make_samples(tables(rollouts, calls), settings)
    assert {sample.agent for sample in samples} == trained & set(names)
    sampled = {name: [call["response_token_ids"] for call in calls if call["agent"] == name] for name in trained}
    for name, responses in sampled.items():
        masked = [sample.token_ids[sample.loss_mask.astype(bool)] for sample in samples if sample.agent == name]
        assert sorted(np.concatenate(masked)) == sorted(np.concatenate(responses))

    rank: Any = learners.ranks[0]
    before = await rank.__ray_call__.remote(weights)
    told = await asyncio.to_thread(learners.step, samples, 0)
    after = await rank.__ray_call__.remote(weights)
    assert told["gradient_norm"] > 1e-7
    assert (before != after).mean() > 0.1
