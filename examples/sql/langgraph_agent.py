"""The SQL agent as a LangGraph graph of two agents: a writer, and a rewriter that corrects what went wrong.

    write -> execute -> (it failed or gave no row) rewrite -> execute ...

Plain LangGraph and LangChain: each agent has a chat model of its own, and the names of the models are all that tells them
apart. In production WRITER_MODEL and REWRITER_MODEL name a vendor's.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any, TypedDict

from agent import query_in, try_query
from langchain_core.messages import AnyMessage, HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph

CORRECTIONS = 2


class State(TypedDict):
    database: str
    messages: Annotated[list[AnyMessage], add_messages]
    sql: str
    failed: bool
    corrections: int


def build(writer: ChatOpenAI, rewriter: ChatOpenAI) -> CompiledStateGraph:
    async def write(state: State) -> dict[str, Any]:
        reply = await writer.ainvoke(state["messages"])
        return {"messages": [reply], "sql": query_in(reply.text), "corrections": 0}

    async def rewrite(state: State) -> dict[str, Any]:
        reply = await rewriter.ainvoke(state["messages"])
        return {"messages": [reply], "sql": query_in(reply.text), "corrections": state["corrections"] + 1}

    async def execute(state: State) -> dict[str, Any]:
        complaint = await asyncio.to_thread(try_query, state["database"], state["sql"])
        return {"messages": [HumanMessage(complaint)], "failed": True} if complaint else {"failed": False}

    def after(state: State) -> str:
        return "rewrite" if state["failed"] and state["corrections"] < CORRECTIONS else END

    graph = StateGraph(State)
    for node in (write, rewrite, execute):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "write")
    graph.add_edge("write", "execute")
    graph.add_edge("rewrite", "execute")
    graph.add_conditional_edges("execute", after)
    return graph.compile()


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`, as agent.py's. `model`: where the chat models are, by `base_url` and `api_key`."""
    writer, rewriter = (
        ChatOpenAI(model=os.environ.get(name, default), base_url=model.base_url, api_key=model.api_key, temperature=0)
        for name, default in (("WRITER_MODEL", "writer"), ("REWRITER_MODEL", "rewriter"))
    )
    question = HumanMessage(f"{task['schema']}\n{task['question']}")
    final = await build(writer, rewriter).ainvoke({"database": task["database"], "messages": [question]})
    return final["sql"]
