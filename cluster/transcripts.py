"""What was said in a rollout, as text for people and for models that read it: from the rows of the table `calls`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from raygent.config import Config
from raygent.records import UPSTREAM

Row = dict[str, Any]
SAID = ("content", "text", "reasoning_content", "thinking", "name", "arguments", "partial_json")  # of a reply's JSON
MOST_SHOWN = 6000  # characters of one transcript, from its end


def tokenizer_of(config: Config) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model.path)


def conversations(calls: list[Row], tokenizer: Any) -> list[str]:
    """The lines of each agent's conversations in one attempt, what they have in common told once."""
    calls = sorted(calls, key=lambda call: call["sequence"])
    said = [messages_of(json.loads(call["request"])) for call in calls]
    lines = []
    for place, call in enumerate(calls):
        agent, mine = call["agent"], said[place]
        later = zip(calls[place + 1 :], said[place + 1 :], strict=True)
        if any(other["agent"] == agent and more[: len(mine)] == mine for other, more in later):
            continue  # a later call of the agent's has it all
        of = f" of agent {agent}" if len({one["agent"] for one in calls}) > 1 else ""
        reply = (
            reply_of(call["response"])
            if call["policy"].startswith(UPSTREAM)
            else tokenizer.decode(call["response_token_ids"], skip_special_tokens=True)
        )
        lines += [f"[conversation{of}]", *mine, f"assistant: {reply}"]
    return lines


def end_of(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else "..." + text[-MOST_SHOWN:]


def reply_of(response: str) -> str:
    """What an upstream said: the texts of its reply, or of a stream's pieces; the body itself where it holds none."""
    events = [line.removeprefix("data:") for line in response.splitlines() if line.startswith("data:")]
    told = []
    for text in events or [response]:
        try:
            told.append(json.loads(text))
        except ValueError:  # [DONE]
            continue
    ends = [
        event["response"] for event in told if isinstance(event, dict) and event.get("type") == "response.completed"
    ]
    return ("" if events and not ends else " ").join(_texts(ends or told)) or response


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, str) and name in SAID:
                yield inner
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def messages_of(request: Row) -> list[str]:
    """The conversation in a request's body, a text a message, whatever the API."""
    found = [f"{name}: {_text(request[name])}" for name in ("system", "instructions") if request.get(name)]
    rest = request.get("messages") or request.get("input") or request.get("prompt") or []
    of_tokens = isinstance(rest, list) and rest != [] and all(isinstance(item, int) for item in rest)
    for item in rest if isinstance(rest, list) and not of_tokens else [rest]:
        if not isinstance(item, dict):
            found.append(f"user: {_text(item)}")
            continue
        told = {name: value for name, value in item.items() if name not in ("role", "content", "type") and value}
        extra = f" {json.dumps(told, ensure_ascii=False)}" if told else ""
        found.append(f"{item.get('role') or item.get('type')}: {_text(item.get('content'))}{extra}")
    if request.get("tools"):
        found.append(f"tools: {json.dumps(request['tools'], ensure_ascii=False)}")
    return found


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
