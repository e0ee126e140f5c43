"""The SQL agent on Anthropic's client: a loop of tool use with the tool `run_sql`."""

from __future__ import annotations

import asyncio
from typing import Any

from agent import CORRECTIONS, query_in
from anthropic import AsyncAnthropic
from sql_tool import run_sql

INSTRUCTIONS = "Try a query with run_sql, then answer with it."
TOOLS: list[Any] = [
    {
        "name": "run_sql",
        "description": "Run a query: its rows, or the error and the columns.",
        "input_schema": {"type": "object", "properties": {"sql": {"type": "string"}}, "required": ["sql"]},
    }
]
MOST_TURNS = 2 + CORRECTIONS
client = AsyncAnthropic(base_url="http://127.0.0.1", api_key="each run brings its own")


async def answer(task: dict[str, str], model: Any) -> str | None:
    """The SQL for `task`, as agent.py's; None where the model called its tool to the last turn."""
    at = client.with_options(base_url=model.anthropic_base_url, api_key=model.api_key)
    messages: list[Any] = [{"role": "user", "content": f"{task['schema']}\n{task['question']}"}]
    for _ in range(MOST_TURNS):
        reply = await at.messages.create(
            model=model.model, max_tokens=1024, system=INSTRUCTIONS, tools=TOOLS, messages=messages
        )
        if reply.stop_reason != "tool_use":
            return query_in("".join(block.text for block in reply.content if block.type == "text"))
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": await use(task["database"], block.input)}
            for block in reply.content
            if block.type == "tool_use"
        ]
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    return None


async def use(database: str, given: Any) -> str:
    """What the tool says to the model's arguments."""
    if not isinstance(given, dict) or not isinstance(given.get("sql"), str):
        return "error: run_sql takes one argument, sql"
    return await asyncio.to_thread(run_sql, database, given["sql"])
