"""The SQL agent as a chat of two AutoGen agents: a writer of queries, and a reviewer who runs them with `run_sql`.

What the reviewer's tool said goes to the chat, and the writer corrects the query, until there are rows. Each agent has a
model of its own; in production WRITER_MODEL and REVIEWER_MODEL name a vendor's.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import sql_tool
from agent import CORRECTIONS, query_in
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelFamily
from autogen_ext.models.openai import OpenAIChatCompletionClient

WRITER, REVIEWER = os.environ.get("WRITER_MODEL", "writer"), os.environ.get("REVIEWER_MODEL", "reviewer")
ABILITIES: Any = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "structured_output": False,
    "family": ModelFamily.UNKNOWN,
}


def build(
    writer: OpenAIChatCompletionClient, reviewer: OpenAIChatCompletionClient, database: str
) -> RoundRobinGroupChat:
    async def run_sql(sql: str) -> str:
        """Run a query: its rows, or the error and the columns."""
        return await asyncio.to_thread(sql_tool.run_sql, database, sql)

    agents = [
        AssistantAgent("writer", writer, system_message="Write a query."),
        AssistantAgent("reviewer", reviewer, system_message="Run the query with run_sql.", tools=[run_sql]),
    ]
    over = TextMentionTermination("rows:", sources=["reviewer"]) | MaxMessageTermination(1 + 2 * (1 + CORRECTIONS))
    return RoundRobinGroupChat(agents, termination_condition=over)


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`, as agent.py's: the writer's last."""
    writer, reviewer = (
        OpenAIChatCompletionClient(
            model=name, base_url=model.base_url, api_key=model.api_key, model_info=ABILITIES, temperature=0
        )
        for name in (WRITER, REVIEWER)
    )
    try:
        chat = await build(writer, reviewer, task["database"]).run(task=f"{task['schema']}\n{task['question']}")
    finally:
        await asyncio.gather(writer.close(), reviewer.close())
    return query_in([said.to_text() for said in chat.messages if said.source == "writer"][-1])
