"""One attempt of a Python agent in a process of its own: agent.in = "subprocess". Started by subprocess_agent alone.

The result goes to the events file, so that the agent may print what it likes. An exception ends the process with its
traceback on stderr and exit code 1.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from pathlib import Path

from raygent.callables import AGENT_OFFERS, ModelEndpoint, arguments, awaited, load_callable, plain
from raygent.config import ConfigError
from raygent.emit import EVENTS_BYTES, EVENTS_FILE, append_event
from raygent.prompts import prompts_here


def main() -> int:
    try:
        agent = load_callable(os.environ["RAYGENT_AGENT"], Path.cwd(), "agent.run")
        endpoint = ModelEndpoint(
            os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], os.environ["RAYGENT_MODEL"], prompts_here()
        )
        values = (json.loads(os.environ["RAYGENT_TASK"]), endpoint)
        positional, named = arguments(agent, AGENT_OFFERS, values, "agent.run")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    value = agent(*positional, **named)
    if inspect.isawaitable(value):
        value = asyncio.run(awaited(value))
    value = plain(value)
    if len(json.dumps(value)) > EVENTS_BYTES - 100:  # with what stands around it
        raise ValueError(f"the agent returned more than {EVENTS_BYTES >> 20} MiB; return what the grader needs alone")
    append_event(os.environ[EVENTS_FILE], {"table": "result", "value": value})
    return 0


if __name__ == "__main__":
    sys.exit(main())
