"""A SQL agent in plain Python: the model writes a query, the agent runs it, and hands back what went wrong.

It knows nothing of training: it takes a task and a model endpoint, calls it with the stock `openai` client, and returns
the query it settled on.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import openai
from database import try_query

CORRECTIONS = 2
client = openai.AsyncOpenAI(base_url="http://127.0.0.1", api_key="each call brings its own", max_retries=2)


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`: a dict of `database` (path of a SQLite file), `schema` and `question` (text for the model)."""
    return await converse(task, model, f"{task['schema']}\n{task['question']}")


async def converse(task: dict[str, str], model: Any, asked: str) -> str:
    """`asked`: the first message to the model."""
    chat = client.with_options(base_url=model.base_url, api_key=model.api_key).chat.completions
    messages: list[Any] = [{"role": "user", "content": asked}]
    for _ in range(1 + CORRECTIONS):
        reply = await chat.create(model=model.model, messages=messages, temperature=0)
        text = reply.choices[0].message.content or ""
        sql = query_in(text)
        complaint = await asyncio.to_thread(try_query, task["database"], sql)
        if complaint is None:
            break
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": complaint}]
    return sql


def query_in(text: str) -> str:
    """The query in a reply: what stands in its first code block, or else all of it."""
    block = re.search(r"```(?:sql|sqlite)?\s*(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return (block.group(1) if block else text).strip()
