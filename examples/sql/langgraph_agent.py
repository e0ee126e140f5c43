"""The SQL agent as a LangGraph graph of three agents: a writer, a checker, and a rewriter that corrects what went wrong.

    write -> check -> execute -> (it failed or gave no row) rewrite -> check -> execute ...

Plain LangGraph and LangChain: each agent has a chat model of its own, and the names of the models are all that tells them
apart. In production WRITER_MODEL, CHECKER_MODEL and REWRITER_MODEL name a vendor's.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any, TypedDict

from agent import CORRECTIONS, query_in
from database import try_query
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph

CHECK = SystemMessage("Check the query. Say OK, or write a better one.")


class State(TypedDict):
    database: str
    messages: Annotated[list[AnyMessage], add_messages]
    sql: str
    failed: bool
    corrections: int


def build(writer: ChatOpenAI, checker: ChatOpenAI, rewriter: ChatOpenAI) -> CompiledStateGraph:
    async def write(state: State) -> dict[str, Any]:
        reply = await writer.ainvoke(state["messages"])
        return {"messages": [reply], "sql": query_in(reply.text), "corrections": 0}

    async def check(state: State) -> dict[str, Any]:
        reply = await checker.ainvoke([CHECK, state["messages"][0], HumanMessage(state["sql"])])
        return {"sql": query_in(reply.text)} if "SELECT" in reply.text.upper() else {}

    async def execute(state: State) -> dict[str, Any]:
        complaint = await asyncio.to_thread(try_query, state["database"], state["sql"])
        return {"messages": [HumanMessage(complaint)], "failed": True} if complaint else {"failed": False}

    async def rewrite(state: State) -> dict[str, Any]:
        reply = await rewriter.ainvoke(state["messages"])
        return {"messages": [reply], "sql": query_in(reply.text), "corrections": state["corrections"] + 1}

    def after(state: State) -> str:
        return "rewrite" if state["failed"] and state["corrections"] < CORRECTIONS else END

    graph = StateGraph(State)
    for node in (write, check, execute, rewrite):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "write")
    graph.add_edge("write", "check")
    graph.add_edge("check", "execute")
    graph.add_edge("rewrite", "check")
    graph.add_conditional_edges("execute", after)
    return graph.compile()


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`, as agent.py's. `model`: where the chat models are, by `base_url` and `api_key`."""
    writer, checker, rewriter = (
        ChatOpenAI(
            model=os.environ.get(f"{name.upper()}_MODEL", name),
            base_url=model.base_url,
            api_key=model.api_key,
            temperature=0,
        )
        for name in ("writer", "checker", "rewriter")
    )
    question = HumanMessage(f"{task['schema']}\n{task['question']}")
    final = await build(writer, checker, rewriter).ainvoke({"database": task["database"], "messages": [question]})
    return final["sql"]
