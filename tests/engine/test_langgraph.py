"""Exact continuation against the real engine: a LangGraph agent whose tool calls the template writes otherwise than the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import SECRET, Attempt, engine_config
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, convert_to_openai_messages
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from tiny_model import make_tiny_model, teach_texts
from transformers import AutoTokenizer

from raygent.actors.engine_handle import EngineHandle
from raygent.algorithms.trajectory import build
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app

ASKS = [(1, 2), (3, 4), (5, 6), (7, 8)]  # each two calls of the model: the tool call and the answer


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def conversation(tokenizer: Any, call: str) -> list[tuple[str, bool]]:
    """The whole conversation, in pieces, with tool calls written as `call`; what the model is to say is marked."""
    tools, first = [convert_to_openai_tool(add)], [{"role": "user", "content": ""}]
    whole = tokenizer.apply_chat_template(first, tools=tools, tokenize=False)
    pieces = [(whole[: whole.index("<|im_start|>user")], False)]
    for a, b in ASKS:
        pieces += [(f"<|im_start|>user\n{a} and {b}?<|im_end|>\n<|im_start|>assistant\n", False)]
        pieces += [(f"<tool_call>\n{call % (a, b)}\n</tool_call><|im_end|>", True)]
        pieces += [(f"\n<|im_start|>tool\n{a + b}<|im_end|>\n<|im_start|>assistant\n", False)]
        pieces += [(f"It is {a + b}.<|im_end|>", True), ("\n", False)]
    return pieces


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that writes tool calls without the spaces that the template puts there, and knows its own way alone."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), context=2048)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return teach_texts(folder, [conversation(tokenizer, '{"name":"add","arguments":{"a":%d,"b":%d}}')], 300)


@pytest.fixture(scope="module")
def engine(store: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHandle]:
    config = engine_config("continuation", tmp_path_factory.mktemp("run"), model, continuation="exact")
    yield start_app(config, SECRET, "engine-tests-store", NAMESPACE, 0, str(model))
    delete_app(config)


def graph(attempt: Attempt) -> Any:
    """The agent as LangGraph's documentation teaches it."""
    model = ChatOpenAI(model="policy", base_url=f"{attempt.base_url}/v1", api_key=attempt.key).bind_tools([add])

    def ask(state: MessagesState) -> dict[str, list[AnyMessage]]:
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("ask", ask)
    builder.add_node("tools", ToolNode([add]))
    builder.add_edge(START, "ask")
    builder.add_conditional_edges("ask", tools_condition)
    builder.add_edge("tools", "ask")
    return builder.compile()


def rendered(tokenizer: Any, request: dict[str, Any]) -> list[int]:
    """The prompt without continuation: what the chat template makes of the messages."""
    messages = request["messages"]
    for one in (one for message in messages for one in message.get("tool_calls") or []):
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])  # as vLLM hands it to templates
    text = tokenizer.apply_chat_template(messages, tools=request["tools"], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_langgraph_extends_every_call(engine: EngineHandle, store: Any, model: Path) -> None:
    attempt = Attempt(engine, store, "train", 600.0)
    agent, messages = graph(attempt), []
    for a, b in ASKS:
        messages = agent.invoke({"messages": [*messages, ("user", f"{a} and {b}?")]})["messages"]
        assert messages[-1].content == f"It is {a + b}."
    calls = attempt.calls()
    assert len(calls) == 2 * len(ASKS)
    (trajectory,) = build(calls)
    assert trajectory.branches == 0
    assert all(node.parent is before for node, before in zip(trajectory.nodes[1:], trajectory.nodes, strict=False))
    before: list[int] = []
    for call in calls:
        assert call["own_tokens"] in (0, len(before))
        before = call["prompt_token_ids"] + call["response_token_ids"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [rendered(tokenizer, json.loads(call["request"])) for call in calls]
    assert prompts[0] == calls[0]["prompt_token_ids"]
    ran = [prompt + call["response_token_ids"] for prompt, call in zip(prompts, calls, strict=True)]
    alike = sum(after[: len(one)] == one for one, after in zip(ran, prompts[1:], strict=False))
    print(f"of {len(ran) - 1} calls all extend the one before; rendered by the template {alike} would")
    assert alike < len(ran) - 1  # the template writes tool calls otherwise


def test_an_edited_conversation_is_a_branch(engine: EngineHandle, store: Any, model: Path) -> None:
    attempt = Attempt(engine, store, "train", 600.0)
    agent, (a, b) = graph(attempt), ASKS[0]
    *before, answer = agent.invoke({"messages": [("user", f"{a} and {b}?")]})["messages"]
    edited = AIMessage(answer.content + " No, more.")
    attempt.openai.chat.completions.create(
        model="policy",
        messages=convert_to_openai_messages([*before, edited, HumanMessage("Well?")]),
        tools=[convert_to_openai_tool(add)],
        max_tokens=5,
    )
    first, second, third = attempt.calls()
    assert third["own_tokens"] == len(first["prompt_token_ids"]) + len(first["response_token_ids"])
    (trajectory,) = build([first, second, third])
    assert trajectory.branches == 1
    assert trajectory.nodes[2].parent is trajectory.nodes[0]
