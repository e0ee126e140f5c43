"""Prompts from inside an agent: the version that is under trial in this run.

    text = raygent.prompt("writer", default="Write one SQL query.")

Within a run it is found as rewards and spans are (emit.py): by a context variable, in a subprocess by the variable
RAYGENT_PROMPTS, a JSON object of names and texts. Outside a run it is `default`.
"""

from __future__ import annotations

import json
import os
from contextvars import ContextVar

PROMPTS_VARIABLE = "RAYGENT_PROMPTS"

expected = False  # whether agents of this process have prompts on trial: a worker sets it
on_trial: ContextVar[dict[str, str] | None] = ContextVar("raygent_prompts", default=None)


def prompt(name: str, default: str | None = None) -> str:
    """The text of the prompt `name` of [prompts]. Raises LookupError where the run has none of that name, and there is no
    `default` either."""
    if expected and on_trial.get() is None:
        raise LookupError(
            f"raygent.prompt({name!r}): asked outside the agent's own call, where the version under trial is not known; ask "
            "within it, and in threads that the agent starts by contextvars.copy_context().run"
        )
    texts = prompts_here()
    if name in texts:
        return texts[name]
    if default is None:
        there = (
            f"there are {', '.join(sorted(texts))}" if texts else "there are none here (outside a run there never are)"
        )
        raise LookupError(
            f'raygent.prompt({name!r}): no prompt of that name, {there}; add {name} = "FILE" to [prompts], or give a default'
        )
    return default


def prompts_here() -> dict[str, str]:
    """All prompts of the running rollout, name to text; none outside a run."""
    texts = on_trial.get()
    return json.loads(os.environ.get(PROMPTS_VARIABLE, "{}")) if texts is None else texts
