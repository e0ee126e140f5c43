"""Exact continuation: a conversation goes on from the tokens it was run with, not from a second rendering of them.

An agent sends its whole conversation with every call, as messages. Rendered again, a reply may get other tokens than those
that were sampled: its text is cut differently, a template writes tool calls its own way or leaves out earlier thinking. The
prompt would be one that no sampled token stood in, and the calls would be branches of the trajectory.

Here the rendered prompt is compared with what the same agent's earlier calls ran on, turn by turn (a turn ends with the
model's end token). Turns have to be equal to the token; a turn that was sampled has to say the same: the content and the
tool calls that vLLM's own parser finds in both, JSON compared as JSON, white space at the ends aside; thinking may be
lacking. Then the prompt is the earlier call's own tokens and the rendering of what was added. Else it was edited: the
prompt stays as it was rendered, and the trajectory shows a branch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reply:
    """What a turn says. `calls`: name and arguments (parsed JSON, or the text where it is none) of each tool call."""

    reasoning: str
    content: str
    calls: list[tuple[str, Any]]


@dataclass(frozen=True)
class Run:
    """The tokens of an earlier call, prompt and response, int32; `starts`: where its replies begin, in order."""

    tokens: np.ndarray
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """What to run a call on. `own`: how many of its first tokens come from an earlier call instead of the rendering (0: the
    prompt is as it was rendered). `starts` as in Run."""

    tokens: np.ndarray
    own: int = 0
    starts: tuple[int, ...] = ()


def continued(
    rendered: Sequence[int], earlier: list[Run], ends: Sequence[int], read: Callable[[list[int]], Reply]
) -> Prompt:
    """The prompt that goes on from the longest of the `earlier` calls whose conversation `rendered` begins with.

    ends: the tokens that end a turn. read: what the tokens of a reply say.
    """
    tokens = np.asarray(rendered, np.int32)
    borders = _borders(tokens, ends)
    for run in sorted(earlier, key=lambda run: -len(run.tokens)):
        after = _said_by(run, tokens, borders, ends, read)
        if after is not None:
            whole = len(run.tokens)
            if np.array_equal(run.tokens, tokens[:whole]):
                return Prompt(tokens, 0, run.starts)
            # A reply that was cut off at its limit has no end token of its own: the rendering's one
            rest = after if run.tokens[-1] in ends else after - 1
            return Prompt(np.concatenate([run.tokens, tokens[rest:]]), whole, run.starts)
    return Prompt(tokens)


def _borders(tokens: np.ndarray, ends: Sequence[int]) -> list[int]:
    """0 and the place behind each end token."""
    return [0, *(np.flatnonzero(np.isin(tokens, ends)) + 1).tolist()]


def _said_by(
    run: Run, tokens: np.ndarray, borders: list[int], ends: Sequence[int], read: Callable[[list[int]], Reply]
) -> int | None:
    """Where in the rendered `tokens` that which `run` holds has ended; None where they do not begin with it."""
    ours = _borders(run.tokens, ends)
    if ours[-1] < len(run.tokens):
        ours.append(len(run.tokens))
    if len(ours) > len(borders):
        return None
    starts = list(run.starts)
    for (first, last), (begin, end) in zip(pairwise(ours), pairwise(borders), strict=False):
        own, theirs = run.tokens[first:last], tokens[begin:end]
        start = next((start for start in starts if first <= start < last), None)
        if np.array_equal(own, theirs):
            continue
        if start is None or not _same_reply(own, theirs, start - first, ends, read):
            return None
    return borders[len(ours) - 1]


def _same_reply(
    own: np.ndarray, theirs: np.ndarray, start: int, ends: Sequence[int], read: Callable[[list[int]], Reply]
) -> bool:
    """Whether the turn `theirs` says what `own` says, of which all from `start` on was sampled."""
    head = min(start, len(theirs))
    unlike = np.flatnonzero(own[:head] != theirs[:head])
    common = (
        int(unlike[0]) if len(unlike) else head
    )  # of the turn's header: a template may open the thinking in one alone
    ours, rendered = (read([token for token in turn[common:].tolist() if token not in ends]) for turn in (own, theirs))
    return (
        ours.content == rendered.content and ours.calls == rendered.calls and rendered.reasoning in ("", ours.reasoning)
    )


def reader(parser_class: Any, tokenizer: Any, tools: list[dict[str, Any]]) -> Callable[[list[int]], Reply]:
    """Reads replies with vLLM's own parser of the model's family (None: a reply is its text), offered `tools` as Chat
    Completions has them."""

    def read(tokens: list[int]) -> Reply:
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        if parser_class is None:
            return Reply("", text.strip(), [])
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], model="policy", tools=tools or None)
        parser = parser_class(tokenizer, request.tools)
        reasoning, content, found = parser.parse(text, request, enable_auto_tools=True)
        if content is None and not found and "</" not in text:
            reasoning, content = None, reasoning  # to some parsers what never ends its thinking is thinking
        calls = [(call.name, _json(call.arguments)) for call in found or []]
        return Reply((reasoning or "").strip(), (content or "").strip(), calls)

    return read


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def tools_of(request: str) -> list[dict[str, Any]]:
    """The functions that a request's body offers, whichever API's, as Chat Completions has them."""
    found = json.loads(request).get("tools")
    named = [tool.get("function", tool) for tool in found or [] if isinstance(tool, dict)]
    return [
        {
            "type": "function",
            "function": {"name": tool["name"], "parameters": tool.get("parameters") or tool.get("input_schema") or {}},
        }
        for tool in named
        if isinstance(tool, dict) and isinstance(tool.get("name"), str)
    ]
