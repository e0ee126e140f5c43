"""A Python agent in a process of its own: agent.in = "subprocess". Started by subprocess_agent alone, for one attempt or, with
--persistent, for one after the other (persistent_agent.py).

The result of one attempt goes to the events file, so that the agent may print what it likes. An exception ends the process with its
traceback on stderr and exit code 1.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from raygent.callables import AGENT_OFFERS, TEXT, ModelEndpoint, arguments, awaited, load_callable, plain
from raygent.config import ConfigError
from raygent.emit import EVENTS_BYTES, EVENTS_FILE, append_event
from raygent.prompts import prompts_here


def main() -> int:
    try:
        append_event(os.environ[EVENTS_FILE], {"table": "result", "value": answer()})
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def answer() -> Any:
    """What the agent returns for what the environment tells. Raises ConfigError where there is no such agent, and what the agent
    raises."""
    agent = _agent(os.environ["RAYGENT_AGENT"])
    endpoint = ModelEndpoint(
        os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], os.environ["RAYGENT_MODEL"], prompts_here()
    )
    values = (json.loads(os.environ["RAYGENT_TASK"]), endpoint)
    positional, named = arguments(agent, AGENT_OFFERS, values, "agent.run")
    value = agent(*positional, **named)
    if inspect.isawaitable(value):
        value = asyncio.run(awaited(value))
    value = plain(value)
    if len(json.dumps(value)) > EVENTS_BYTES - 100:  # with what stands around it
        raise ValueError(f"the agent returned more than {EVENTS_BYTES >> 20} MiB; return what the grader needs alone")
    return value


@cache
def _agent(run: str) -> Callable[..., Any]:
    return load_callable(run, Path.cwd(), "agent.run")


def answer_all() -> None:
    """Until the input ends. What the agent prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        os.environ.update(json.loads(line))
        try:
            told = {"output": answer()}
        except BaseException:  # noqa: BLE001 - the user's code may raise anything, and it is the answer
            told = {"error": traceback.format_exc()[-TEXT:]}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    if "--persistent" in sys.argv:
        answer_all()
    else:
        sys.exit(main())
