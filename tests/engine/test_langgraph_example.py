"""The LangGraph example: the same file against a vendor's endpoint and against raygent, which trains the agents it is told to."""

import asyncio
import importlib
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conversations import config, rollout, tables
from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from vendor import CHAT, serving

from raygent.actors.agent_runner import AgentRunner, AttemptRecorder
from raygent.algorithms.batch import make_samples
from raygent.callables import ModelEndpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "sql"
MODULES = ("database", "agent", "langgraph_agent")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("langgraph_agent")
    sys.path.remove(str(EXAMPLE))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def task(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE items (name TEXT); INSERT INTO items VALUES ('pen')")
    connection.close()
    return {"database": str(path), "schema": "shop : items", "question": "which items ?"}


def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
    """A vendor's, whose writer is wrong and whose checker agrees."""
    texts = {"writer": "SELECT title FROM items", "rewriter": "```sql\nSELECT name FROM items\n```"}
    message = {"role": "assistant", "content": texts.get(request["model"], request["messages"][-1]["content"])}
    return 200, CHAT | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}, {}


def test_it_knows_nothing_of_raygent() -> None:
    assert all("raygent" not in (EXAMPLE / f"{name}.py").read_text() for name in MODULES)


def test_a_vendors_endpoint_will_do(example, task) -> None:
    with serving() as vendor:
        vendor.answers = [reply]
        sql = asyncio.run(example.answer(task, SimpleNamespace(base_url=vendor.base_url, api_key="sk")))
    assert sql == "SELECT name FROM items"
    got = [request["body"] for request in vendor.requests]
    assert [request["model"] for request in got] == ["writer", "checker", "rewriter", "checker"]
    assert "no such column" in got[2]["messages"][-1]["content"]


@pytest.mark.parametrize("train", [["writer"], ["rewriter"], ["writer", "rewriter"]])
def test_the_agents_that_are_named_are_trained(example, task, attempt, train) -> None:
    attempts = [attempt() for _ in range(2)]
    calls = []
    for one in attempts:
        endpoint = SimpleNamespace(base_url=f"{one.base_url}/v1", api_key=one.key)
        asyncio.run(example.answer(task, endpoint))  # the model knows no SQL: each query fails
        calls += one.calls()
    assert [call["agent"] for call in calls] == ["writer", "checker", "rewriter", "checker", "rewriter", "checker"] * 2
    batch = tables([rollout(one.id, "group", reward) for one, reward in zip(attempts, (1.0, 0.0), strict=True)], calls)
    settings = config(agent={"run": "agent:run", "train": train})
    samples, metrics = make_samples(batch, settings)
    assert {sample.agent for sample in samples} == set(train)
    sampled = sum(len(call["response_token_ids"]) for call in calls if call["agent"] in train)
    assert metrics["tokens_trained"] == sum(int(sample.loss_mask.sum()) for sample in samples) == sampled
    assert metrics["tokens_sampled"] == sum(len(call["response_token_ids"]) for call in calls)


@pytest.fixture
def instrumented() -> Iterator[None]:
    """As OpenInference's documentation has it, but without an exporter."""
    trace.set_tracer_provider(TracerProvider())
    LangChainInstrumentor().instrument()
    yield
    LangChainInstrumentor().uninstrument()


async def test_an_instrumented_graph_shows_its_nodes_in_the_spans_of_its_own_attempt(
    example, task, instrumented
) -> None:
    """Two attempts at once, in one process and under one tracer provider."""
    settings = config(agent={"run": "langgraph_agent.py:answer"})
    settings.path = str(EXAMPLE / "run.toml")
    runner, questions = AgentRunner(settings), ["which items ?", "which pens ?"]
    recorders = [AttemptRecorder(question, 1, "worker") for question in questions]
    with serving() as vendor:
        vendor.answers = [reply]
        model = ModelEndpoint(vendor.base_url, "sk")
        await asyncio.gather(
            *(
                runner.run(task | {"question": question}, model, recorder)
                for question, recorder in zip(questions, recorders, strict=True)
            )
        )
    for question, recorder, other in zip(questions, recorders, reversed(questions), strict=True):
        spans = {span.name: json.loads(span.attributes) for span in recorder.spans if span.kind == "otlp"}
        assert spans.keys() >= {"LangGraph", "write", "check", "execute", "rewrite", "ChatOpenAI"}
        assert spans["write"]["otlp.trace_id"] == spans["LangGraph"]["otlp.trace_id"]
        assert question in json.dumps(spans) and other not in json.dumps(spans)
