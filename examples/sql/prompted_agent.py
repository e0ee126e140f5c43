"""The SQL agent of agent.py with a prompt that raygent can improve: `raygent.prompt("sql")`, outside a run PROMPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent import converse

import raygent

PROMPT = (Path(__file__).parent / "prompts" / "sql.txt").read_text()


async def answer(task: dict[str, str], model: Any) -> str:
    """The SQL for `task`, as agent.py's."""
    text = raygent.prompt("sql", PROMPT).replace("{schema}", task["schema"]).replace("{question}", task["question"])
    return await converse(task, model, text)
