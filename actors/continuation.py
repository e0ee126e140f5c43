"""Exact continuation: a conversation goes on from the tokens it was run with, not from a second rendering of them.

An agent sends its whole conversation with every call, as messages. Rendered again, a reply may get other tokens than those
that were sampled: its text is cut differently, a template writes tool calls its own way or leaves out earlier thinking. The
prompt would be one that no sampled token stood in, and the calls would be branches of the trajectory.

Here the rendered prompt is compared with what the same agent's earlier calls ran on, turn by turn (a turn ends with one of
the model's end tokens). Turns have to be equal to the token; a turn that was sampled has to say the same: by vLLM's own
parser the same content and tool calls (arguments compared as JSON), the same text behind these, white space at the ends
aside; thinking may be lacking. Then the prompt is the earlier call's own tokens and the rendering of what was added. What
cannot be told, such as a reply that reads as nothing, counts as edited: the prompt stays as it was rendered, and the
trajectory shows a branch.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from raygent.config import POLICY

logger = logging.getLogger("raygent.engine")
OPENER = re.compile(r"<think(ing)?>\s*(</think(ing)?>)?")
ANY_TOOL = [{"type": "function", "function": {"name": "any", "parameters": {}}}]  # without one parsers read no calls


@dataclass(frozen=True)
class Said:
    """What a turn says. `calls`: name and arguments (JSON in one way of writing it) of each tool call; `tail`: the text
    behind the last of them; `text`: all of it."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    tail: str
    text: str


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
    rendered: Sequence[int], earlier: list[Run], ends: Sequence[int], read: Callable[[list[int]], Said | None]
) -> Prompt:
    """The prompt that goes on from the longest of the `earlier` calls whose conversation `rendered` begins with.

    ends: the tokens that end a turn. read: what the tokens of a reply say.
    """
    tokens = np.asarray(rendered, np.int32)
    borders = _borders(tokens, ends)
    turns = [_turns(run, ends) for run in earlier]
    order = [  # the longest first, before it the one that is equal, before it the newest
        (len(turns[place]), np.array_equal(run.tokens, tokens[: len(run.tokens)]), place)
        for place, run in enumerate(earlier)
    ]
    fitting = (
        (same, earlier[place], after)
        for _, same, place in sorted(order, reverse=True)
        if (after := _said_by(earlier[place], turns[place], tokens, borders, ends, read)) is not None
    )
    if (found := next(fitting, None)) is None:
        return Prompt(tokens)
    same, run, after = found
    if same:
        return Prompt(tokens, 0, run.starts)
    # A reply that was cut off at its limit has no end token of its own: the rendering's one
    rest = after if run.tokens[-1] in ends else after - 1
    return Prompt(np.concatenate([run.tokens, tokens[rest:]]), len(run.tokens), run.starts)


def _borders(tokens: np.ndarray, ends: Sequence[int]) -> list[int]:
    """0 and the place behind each end token."""
    return [0, *(np.flatnonzero(np.isin(tokens, ends)) + 1).tolist()]


def _turns(run: Run, ends: Sequence[int]) -> list[int]:
    """The borders of all its turns, of the last one too where it was cut off."""
    ours = _borders(run.tokens, ends)
    return ours if ours[-1] == len(run.tokens) else [*ours, len(run.tokens)]


def _said_by(
    run: Run,
    ours: list[int],
    tokens: np.ndarray,
    borders: list[int],
    ends: Sequence[int],
    read: Callable[[list[int]], Said | None],
) -> int | None:
    """Where in the rendered `tokens` that which `run`, with its turns between `ours`, holds has ended; None where they do not
    begin with it."""
    if len(ours) > len(borders):
        return None
    for (first, last), (begin, end) in zip(pairwise(ours), pairwise(borders), strict=False):
        own, theirs = run.tokens[first:last], tokens[begin:end]
        start = next((start for start in run.starts if first <= start < last), None)
        if np.array_equal(own, theirs):
            continue
        if start is None or not _same_reply(own, theirs, start - first, ends, read):
            return None
    return borders[len(ours) - 1]


def _same_reply(
    own: np.ndarray, theirs: np.ndarray, start: int, ends: Sequence[int], read: Callable[[list[int]], Said | None]
) -> bool:
    """Whether the turn `theirs` says what `own` says, of which all from `start` on was sampled."""
    if own[-1] in ends and own[-1] != theirs[-1]:
        return False  # of some models the end of a turn says whose the next is
    head = min(start, len(theirs))
    unlike = np.flatnonzero(own[:head] != theirs[:head])
    common = int(unlike[0]) if len(unlike) else head
    if common < start and not _opens_thinking(read, own[common:start].tolist()):
        return False  # what was not sampled is compared to the token
    ours, rendered = (read([token for token in turn[common:].tolist() if token not in ends]) for turn in (own, theirs))
    return (
        ours is not None
        and rendered is not None
        and bool(rendered.content or rendered.calls)
        and (ours.content, ours.calls, ours.tail) == (rendered.content, rendered.calls, rendered.tail)
        and rendered.reasoning in ("", ours.reasoning)
    )


def _opens_thinking(read: Callable[[list[int]], Said | None], tokens: list[int]) -> bool:
    """Whether all that `tokens`, the end of a turn's header, do is open the thinking, or open and close it."""
    reply = read(tokens)
    return reply is not None and OPENER.fullmatch(reply.text.strip()) is not None


def reader(
    parser_class: Any, tokenizer: Any, tools: list[dict[str, Any]], known: dict[tuple[str, bytes], Said | None]
) -> Callable[[list[int]], Said | None]:
    """Reads replies with vLLM's own parser of the model's family (None: a reply is its text), offered `tools` as Chat
    Completions has them. It gives None for what the parser fails at. `known` remembers what has been read, by the tools and the
    tokens: a long conversation has the same turns in each call."""
    offered = json.dumps(tools)

    def read(tokens: list[int]) -> Said | None:
        key = (offered, np.asarray(tokens, np.int32).tobytes())
        if key not in known:
            known[key] = parse(tokens)
        return known[key]

    def parse(tokens: list[int]) -> Said | None:
        # A character that the limit cut in two is never told to the client
        text = tokenizer.decode(tokens, skip_special_tokens=False).rstrip("\ufffd")
        if parser_class is None:
            return Said("", text.strip(), [], "", text)
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        messages = [{"role": "user", "content": ""}]
        try:
            request = ChatCompletionRequest(messages=messages, model=POLICY, tools=tools or ANY_TOOL)
            parser = parser_class(tokenizer, request.tools)
            reasoning, content, found = parser.parse(text, request, enable_auto_tools=True)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:  # it reads what was sampled
            logger.warning("a reply is not read: %s", error)
            return None
        if not content and "think" not in text.lower():
            reasoning, content = None, reasoning  # to some parsers what never ends its thinking is thinking
        calls = [(call.name, _json(call.arguments)) for call in found or []]
        tail = re.split("[}>]", text)[-1].strip() if calls else ""  # some parsers leave out what comes behind the calls
        return Said((reasoning or "").strip(), (content or "").strip(), calls, tail, text)

    return read


def _json(text: str) -> str:
    """One text for all writings of a JSON value; what is none as it is."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def tools_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions that a request's body offers, whichever API's, as Chat Completions has them."""
    tools = request.get("tools")
    named = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    found = []
    for tool in named:
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            parameters = tool.get("parameters") or tool.get("input_schema")
            function = {"name": tool["name"], "parameters": parameters if isinstance(parameters, dict) else {}}
            found.append({"type": "function", "function": function})
    return found
