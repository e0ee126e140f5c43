"""What an agent and a grader are to raygent: callables of the user's, found by name, called with what they ask for."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raygent.config import POLICY, ConfigError
from raygent.emit import finite, scalar

TEXT = 4000  # characters of an error of the user's code that are kept, from its end

# What an agent and a grader are offered, in this order; the names by which a parameter can ask for each.
AGENT_OFFERS = (("task", "input", "task_input"), ("model", "endpoint"))
VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
POSITIONAL_ONLY, KEYWORD_ONLY = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
GRADER_OFFERS = (("input", "task", "task_input"), ("private", "gold"), ("output", "answer"))


@dataclass(frozen=True)
class ModelEndpoint:
    """Where this attempt's model is: give `base_url`, `api_key` and `model` to any OpenAI-compatible client.

    The key is good for this attempt alone, and ends with it.
    """

    base_url: str  # .../v1
    api_key: str
    model: str = POLICY
    prompts: dict[str, str] = field(default_factory=dict, hash=False)  # those of [prompts], in the versions under trial

    def agent(self, name: str) -> ModelEndpoint:
        """The same model for the agent `name`: its calls are recorded, rewarded and trained under that name."""
        # Quoted twice: servers undo one before they look for the slashes of a path.
        root = self.base_url.removesuffix("/v1").partition("/agent/")[0]
        return replace(self, base_url=f"{root}/agent/{quote(quote(name, safe=''))}/v1")

    @property
    def anthropic_base_url(self) -> str:
        """The Anthropic clients add /v1 themselves."""
        return self.base_url.removesuffix("/v1")


def load_callable(run: str, folder: Path, key: str) -> Callable[..., Any]:
    """The callable of "file.py:function" or "package.module:function"; `folder` goes on sys.path.

    An object with a method `run`, or a class of such objects (made without arguments), will do as well.
    Raises ConfigError, naming `key`, where it cannot be imported or called.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module_name, _, name = run.partition(":")
    try:
        module = _import(module_name, folder)
        if not hasattr(module, name):
            near = difflib.get_close_matches(name, vars(module), 1)
            there = [its for its, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(there) or 'no functions'}"
            raise ConfigError(f"{key}: {module_name} has no {name!r}; {mend}")
        found = getattr(module, name)
        if inspect.isclass(found):
            found = found()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(f"{key}: {run} cannot be imported: {type(error).__name__}: {str(error)[:300]}") from error
    if not callable(found):
        found = getattr(found, "run", None)
    if not callable(found):
        raise ConfigError(f"{key}: {run} is {type(getattr(module, name)).__name__}, not a function; name a callable")
    return found


def _import(module_name: str, folder: Path) -> Any:
    if not module_name.endswith(".py"):
        return importlib.import_module(module_name)
    file = (folder / module_name).resolve()
    loaded = sys.modules.get(file.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    if loaded is None:
        sys.modules[file.stem] = module  # pickling and dataclasses look modules up here
    spec.loader.exec_module(module)
    return module


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def awaited(value: Any) -> Any:
    """For asyncio.run, which takes a coroutine and no other awaitable."""
    return await value


def arguments(
    function: Callable[..., Any], offers: tuple[tuple[str, ...], ...], values: tuple[Any, ...], key: str
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `function`: by name what it names as offered, the rest by place.

    By place an agent's first other parameter takes the task, with a default too, and its next one without takes the model. A
    grader's go by name alone: nobody agrees on their order. Raises ConfigError, naming `key`, where that does not fit.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:  # some of those written in C
        raise ConfigError(f"{key}: its parameters are not to be seen ({error}); name a function in Python") from error
    named = {name: value for names, value in zip(offers, values, strict=True) for name in names}
    kinds = {parameter.kind for parameter in parameters}
    asked = [parameter for parameter in parameters if parameter.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
    required = [parameter for parameter in asked if parameter.default is parameter.empty]
    if VAR_POSITIONAL in kinds and len(required) <= len(values):
        return list(values), {}
    if not asked and VAR_KEYWORD in kinds:
        return [], {names[0]: value for names, value in zip(offers, values, strict=True)}
    taken = {p.name: named[p.name] for p in asked if p.name in named and p.kind is not POSITIONAL_ONLY}
    free = [p for p in asked if p.name not in taken and p.kind is not KEYWORD_ONLY]
    swapped = any(p.name in taken and p.name not in names for p, names in zip(required, offers, strict=False))
    by_place: list[Any] = []
    if offers is not GRADER_OFFERS and not (swapped and set(free) & set(required)):
        for names, value in zip(offers, values, strict=True):
            if free and not taken.keys() & set(names) and (names is offers[0] or free[0] in required):
                if (parameter := free.pop(0)).kind is POSITIONAL_ONLY:
                    by_place.append(value)
                else:
                    taken[parameter.name] = value
    left = [p for p in required if p.name not in taken][len(by_place) :]
    if left or (asked and not taken and not by_place):
        offered = ", ".join(names[0] for names in offers)
        raise ConfigError(
            f"{key}: takes ({', '.join(p.name for p in asked)}); it is called with ({offered}): name those it wants so"
        )
    return by_place, taken


@dataclass(frozen=True)
class Verdict:
    """A reward as an agent or a grader gave it, and those of single agents, by name, and of single calls, from 0 on."""

    value: float
    components: dict[str, float] = field(default_factory=dict)
    agents: dict[str, float] = field(default_factory=dict)
    calls: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As read_verdict() reads it."""
        return {"reward": self.value, "agents": self.agents, "calls": self.calls} | self.components


def read_verdict(value: Any, who: str) -> Verdict | None:
    """A number, or a dict whose "reward" is one and whose other numbers are components; None where it is neither. Its "agents" and
    "calls", if they are dicts, hold the rewards of single ones: {"reward": 1, "agents": {"writer": 0}, "calls": {0: 0.5}}.

    True and False are 1 and 0. Raises ValueError or TypeError for a reward that is no finite number, or of a call that is none.
    """
    value = scalar(value)
    if isinstance(value, numbers.Real):
        return Verdict(finite(value, f"the reward {who} gave"))
    if not isinstance(value, dict) or "reward" not in value:
        return None
    parts = {str(name): scalar(part) for name, part in value.items() if name != "reward"}
    agents, calls = (parts[name] if isinstance(parts.get(name), dict) else {} for name in ("agents", "calls"))
    if wrong := [call for call in calls if not (str(call).isdecimal() and len(str(call)) < 10)]:
        raise ValueError(f'"calls" {who} gave: {wrong[0]!r} is no number of a call from 0 on')
    return Verdict(
        finite(value["reward"], f"the reward {who} gave"),
        {
            name: finite(part, f"component {name!r} {who} gave")
            for name, part in parts.items()
            if isinstance(part, numbers.Real)
        },
        {str(name): finite(part, f"the reward of agent {name!r} {who} gave") for name, part in agents.items()},
        {int(call): finite(part, f"the reward of call {call} {who} gave") for call, part in calls.items()},
    )


def plain(value: Any) -> Any:
    """`value` as JSON has it (tuples become lists, numpy's and torch's numbers Python's). Raises TypeError or ValueError where
    it is nothing of the kind."""
    try:
        return json.loads(json.dumps(value, default=_number))
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _number(value: Any) -> Any:
    if (number := scalar(value)) is value:
        raise TypeError(f"{type(value).__name__} is no JSON value")
    return number
