"""The algorithms by name: one file each, here or the user's own. A file has

    advantages(episodes: Episodes, settings: Algorithm) -> float32 [N, T]     what each token was worth
    loss(logprobs, old_logprobs, advantages, mask, weights, settings)         a scalar and its metrics; see loss.policy_loss

and may have

    DEFAULTS = {"clip_high": 0.28}     keys of [algorithm] in whose place nothing else was given
    COMPARES_GROUPS = False            rollouts are not compared with others of their task: groups may be of one
    CREDITS_TURNS = True               Episodes.rewards may hold rewards of turns (algorithm.credit = "turn")
    NEEDS_GREEDY = True                each group gets one more rollout, greedy and not trained, for Episodes.baselines
    MEASURES = ("reference",)          what the learners measure first, for the fields of Episodes of that name: "current",
                                       "reference", "values" (of a critic, which is then trained too)
    OFF_POLICY = True                  it learns from what others sampled as well: data.rollouts
    check(settings)                    raises ValueError, "algorithm.KEY: what is wrong; the mend", for keys that do not go together
    returns(episodes, settings) -> float32 [N, T]                             what the critic has to learn
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

NAMES = (
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "opo", "gpg", "reinforce_plus_plus", "remax", "ppo", "sft", "dpo",
    "distill",
)  # fmt: skip
MEASURES = {"current", "reference", "values"}
PROMPT_NAMES = ("apo", "gepa", "bootstrap_fewshot")  # these change prompts, and no weights: see prompt_search.py


class Advantages(Protocol):
    def __call__(self, episodes: Any, settings: Any) -> np.ndarray: ...


class Loss(Protocol):
    def __call__(
        self, logprobs: Any, old_logprobs: Any, advantages: Any, mask: Any, weights: Any, settings: Any
    ) -> tuple[Any, dict[str, float]]: ...


@dataclass(frozen=True)
class Named:
    """An algorithm's file, read."""

    advantages: Advantages
    loss: Loss
    defaults: dict[str, Any] = field(default_factory=dict)
    compares_groups: bool = True
    credits_turns: bool = False
    needs_greedy: bool = False
    measures: tuple[str, ...] = ()
    off_policy: bool = False
    check: Callable[[Any], None] | None = None
    returns: Advantages | None = None


@cache
def algorithm(name: str, folder: Path) -> Named:
    """The algorithm of that name, or of that file, which is relative to `folder`. Raises ValueError where there is none."""
    if name.endswith(".py"):
        module = _from_file(folder / name)
    elif name in NAMES:
        module = importlib.import_module(f"raygent.algorithms.{name}")
    elif name in PROMPT_NAMES:
        defaults = importlib.import_module(f"raygent.algorithms.{name}").DEFAULTS
        return Named(_no_weights, _no_weights, defaults, compares_groups=False)
    else:
        raise ValueError(
            f'algorithm.name: there is no {name!r}; use one of {", ".join(NAMES + PROMPT_NAMES)}, or a file of your own, as "mine.py"'
        )
    for function in ("advantages", "loss"):
        if not callable(getattr(module, function, None)):
            raise ValueError(
                f"algorithm.name: {name} has no function {function}; see docs/algorithms.md for what it must have"
            )
    return Named(
        module.advantages,
        module.loss,
        getattr(module, "DEFAULTS", {}),
        getattr(module, "COMPARES_GROUPS", True),
        getattr(module, "CREDITS_TURNS", False),
        getattr(module, "NEEDS_GREEDY", False),
        getattr(module, "MEASURES", ()),
        getattr(module, "OFF_POLICY", False),
        getattr(module, "check", None),
        getattr(module, "returns", None),
    )


def _no_weights(*_: Any, **__: Any) -> Any:
    raise TypeError("an algorithm that changes prompts trains no weights")


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"algorithm.name: no file {path}; paths are relative to the TOML")
    spec = importlib.util.spec_from_file_location(f"raygent_algorithm_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise ValueError(
            f"algorithm.name: {path} cannot be imported: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    return module
