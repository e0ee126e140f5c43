"""The SQL agent of agent.py with a prompt that raygent can improve: `raygent.prompt("sql")`, outside a run PROMPT."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
from agent import CORRECTIONS, query_in
from database import try_query

import raygent

PROMPT = (Path(__file__).parent / "prompts" / "sql.txt").read_text()
client = openai.AsyncOpenAI(base_url="http://127.0.0.1", api_key="each call brings its own", max_retries=2)


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`, as agent.py's."""
    chat = client.with_options(base_url=model.base_url, api_key=model.api_key).chat.completions
    text = raygent.prompt("sql", PROMPT).replace("{schema}", task["schema"]).replace("{question}", task["question"])
    messages: list[Any] = [{"role": "user", "content": text}]
    for _ in range(1 + CORRECTIONS):
        reply = await chat.create(model=model.model, messages=messages, temperature=0)
        said = reply.choices[0].message.content or ""
        sql = query_in(said)
        complaint = await asyncio.to_thread(try_query, task["database"], sql)
        if complaint is None:
            break
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": complaint}]
    return sql
