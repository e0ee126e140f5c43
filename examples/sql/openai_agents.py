"""The SQL agent in OpenAI's Agents SDK: a triage agent hands the question to a SQL agent, which has the tool `run_sql`.

Each agent has a model of its own, and the names of the models are all that tells them apart. In production TRIAGE_MODEL
and SQL_MODEL name a vendor's.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sql_tool
from agent import CORRECTIONS, query_in
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    RunContextWrapper,
    Runner,
    function_tool,
    handoff,
)
from agents.extensions import handoff_filters
from agents.mcp import MCPServerStdio
from openai import AsyncOpenAI

TRIAGE, SQL = os.environ.get("TRIAGE_MODEL", "triage"), os.environ.get("SQL_MODEL", "sql")
MOST_TURNS = 3 + CORRECTIONS  # the handoff, a query and its corrections, the answer
SERVER = Path(__file__).with_name("sql_server.py")
client = AsyncOpenAI(base_url="http://127.0.0.1", api_key="each run brings its own")


@dataclass
class Context:
    database: str


@function_tool
async def run_sql(context: RunContextWrapper[Context], sql: str) -> str:
    """Run a query: its rows, or the error and the columns."""
    return await asyncio.to_thread(sql_tool.run_sql, context.context.database, sql)


def build(triage: Model, sql: Model, **tools: Any) -> Agent[Context]:
    settings = ModelSettings(temperature=0)
    expert = Agent[Context](
        name="SQL agent",
        instructions="Try a query with run_sql, then answer with it.",
        model=sql,
        model_settings=settings,
        **tools,
    )
    return Agent[Context](
        name="Triage agent",
        instructions="Hand off questions of data.",
        model=triage,
        model_settings=settings,
        handoffs=[handoff(expert, input_filter=handoff_filters.remove_all_tools)],
    )


async def run(agent: Agent[Context], task: dict[str, str]) -> str:
    result = await Runner.run(
        agent,
        f"{task['schema']}\n{task['question']}",
        context=Context(task["database"]),
        max_turns=MOST_TURNS,
        run_config=RunConfig(tracing_disabled=True),
    )
    return query_in(result.final_output)


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`, as agent.py's, through Chat Completions."""
    at = client.with_options(base_url=model.base_url, api_key=model.api_key)
    triage, sql = (OpenAIChatCompletionsModel(name, at) for name in (TRIAGE, SQL))
    return await run(build(triage, sql, tools=[run_sql]), task)


async def answer_by_responses(task: dict[str, str], model: Any) -> str:
    """The same through the Responses API."""
    at = client.with_options(base_url=model.base_url, api_key=model.api_key)
    triage, sql = (OpenAIResponsesModel(name, at) for name in (TRIAGE, SQL))
    return await run(build(triage, sql, tools=[run_sql]), task)


async def answer_with_mcp(task: dict[str, str], model: Any) -> str:
    """The same with the tool of an MCP server, sql_server.py, a process of its own."""
    at = client.with_options(base_url=model.base_url, api_key=model.api_key)
    triage, sql = (OpenAIChatCompletionsModel(name, at) for name in (TRIAGE, SQL))
    parameters: Any = {"command": sys.executable, "args": [str(SERVER), task["database"]]}
    async with MCPServerStdio(parameters, client_session_timeout_seconds=60) as server:
        return await run(build(triage, sql, mcp_servers=[server]), task)
