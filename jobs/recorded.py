"""Batches that nobody has to sample: of another run's rollouts (`data.rollouts`), or of chats (`data.chats`)."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raygent.actors.segments import StoreDamaged
from raygent.actors.store_state import read_store, reader_of_winners
from raygent.algorithms.batch import agent_rewards
from raygent.cluster.task_choice import due
from raygent.config import Config, ConfigError
from raygent.data_files import read_rows
from raygent.records import SCHEMAS, only, to_batch

ELSEWHERE = -1  # the policy version of what no policy of this run sampled
KEYS = {"messages", "tools", "agent"}
ROLES = ("system", "developer", "user", "assistant", "tool")


def batch_of(config: Config, step: int) -> dict[str, pa.Table]:
    """The tables of the `algorithm.tasks_per_step` groups or chats that are due at driver step `step`, as the store would hand
    them over; in an order that depends on run.seed alone. Raises ConfigError where there is nothing to be trained on.
    """
    if config.data.rollouts:
        tables, groups = _rollouts(config.data.rollouts), _groups(config.data.rollouts)
        chosen = {name for place in due(config, len(groups), step) for name in groups[place]}
        return only(tables, chosen)
    assert config.data.chats
    chats = read_chats(config.data.chats)
    places = dict.fromkeys(due(config, len(chats), step))  # where there are fewer than a step takes, each once
    return _tables_of_chats(config, [(place, *chats[place]) for place in places])


def check_rollouts(config: Config) -> None:
    """Raises ConfigError where nothing in `data.rollouts` can be trained on."""
    run, threshold = config.data.rollouts, config.algorithm.threshold
    assert run
    tables = _rollouts(run)
    agents = sorted(tables["calls"]["agent"].unique().to_pylist())
    if not any(map(config.trains, agents)):
        raise ConfigError(
            f"agent.train: names none of the agents that {run} has recorded, {', '.join(agents)}; write the names of some"
        )
    rewards = [*tables["rollouts"]["reward"].to_pylist(), *agent_rewards(tables["rewards"]).values()]
    best = max((reward for reward in rewards if reward is not None), default=0.0)
    if threshold is not None and best < threshold:
        raise ConfigError(f"algorithm.threshold: {threshold:g}, and the best reward in {run} is {best:g}; lower it")


@cache
def _rollouts(run: str) -> dict[str, pa.Table]:
    """All that the run's train rollouts won with."""
    folder = Path(run) / "store"
    try:
        state, _, rolled = read_store(folder)
        found = [reader_of_winners(folder, state, rolled, key)() for key in sorted(state.steps) if key[0] == "train"]
    except (StoreDamaged, FileNotFoundError) as error:
        raise ConfigError(f"data.rollouts: {error}; see `raygent store verify {run}`") from error
    if not sum(len(tables["calls"]) for tables in found):
        raise ConfigError(f"data.rollouts: {run} has no rollouts of training that ended; give a run that has some")
    tables = {name: pa.concat_tables([tables[name] for tables in found]) for name in found[0]}
    place = tables["calls"].schema.get_field_index("policy_versions")
    versions = tables["calls"]["policy_versions"].combine_chunks()
    elsewhere = pa.array(np.full(len(versions.values), ELSEWHERE, np.int32))
    column = pa.ListArray.from_arrays(versions.offsets, elsewhere)
    tables["calls"] = tables["calls"].set_column(place, tables["calls"].schema.field(place), column)
    return tables


@cache
def _groups(run: str) -> list[list[str]]:
    """The rollouts of each group, by their ids."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in _rollouts(run)["rollouts"].select(["rollout_id", "group_id"]).to_pylist():
        groups[row["group_id"]].append(row["rollout_id"])
    return [groups[name] for name in sorted(groups)]


# chats


@cache
def read_chats(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of the file, each with the words for its place. Raises ConfigError for one that is no chat."""
    rows = read_rows(path, "data.chats")
    if path.endswith(".parquet"):
        rows = [(place, _without_nulls(row)) for place, row in rows]
    for place, row in rows:
        where = f"data.chats: {path} {place}"
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise ConfigError(f'{where} needs "messages", a list of {{"role": ..., "content": ...}}')
        if unknown := sorted(row.keys() - KEYS):
            raise ConfigError(f"{where} has {unknown[0]!r}; a chat has {', '.join(sorted(KEYS))}")
        if not isinstance(row.get("agent") or "", str):
            raise ConfigError(f'{where} has "agent": {row["agent"]!r}; write its name as text, or leave it out')
        for number, one in enumerate(messages, 1):
            _check_message(one, f"{where}: message {number}")
        if not any(one["role"] == "assistant" for one in messages[1:]):
            raise ConfigError(f"{where} has no message of the assistant behind another one, so nothing to be learnt")
    if not rows:
        raise ConfigError(f'data.chats: {path} holds no chat; a line is {{"messages": [...]}}')
    return rows


def _check_message(message: dict[str, Any], where: str) -> None:
    """Raises ConfigError for what templates would leave out, or write as Python does."""
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise ConfigError(f"{where} has the role {role!r}; there are {', '.join(ROLES)}")
    if role == "assistant" and not any(value for name, value in message.items() if name not in ("role", "name")):
        raise ConfigError(f"{where} of the assistant says nothing; give it content or tool_calls")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if content is None and role == "assistant":
        texts = []
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f'{where} of the {role} has the content {content!r:.80}; give a text, or parts {{"type": "text", "text": ...}}'
        )
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise ConfigError(f"{where} holds half of a surrogate pair, which is no text; write the whole character")
    if not isinstance(calls or [], list) or not all(map(_is_tool_call, calls or [])):
        raise ConfigError(
            f'{where}: its tool_calls are no list of {{"function": {{"name": ..., "arguments": ...}}}}, the arguments an object, or '
            "one as a text of JSON"
        )


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return False
    return isinstance(arguments, dict)


def _without_nulls(value: Any) -> Any:
    """Without the keys that hold nothing: Parquet gives the objects of a column each other's keys."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def check_chats(config: Config, longest: int) -> None:
    """Raises ConfigError for a chat of an agent that is not trained, that the template refuses, or that is over `longest` tokens."""
    assert config.data.chats
    for place, row in read_chats(config.data.chats):
        where, agent = f"data.chats: {config.data.chats} {place}", row.get("agent") or "agent"
        if not config.trains(agent):
            raise ConfigError(
                f'{where}: agent.train and agent.policies leave out its agent, {agent!r}; add "agent" with the name of one '
                "that is trained"
            )
        tokens = max(len(prompt) + len(response) for prompt, response in tokens_of(config, place, row))
        if longest and tokens > longest:
            raise ConfigError(
                f"{where}: {tokens} tokens, and the model takes {longest}; shorten it, or raise model.context"
            )


def _tables_of_chats(config: Config, chats: list[tuple[int, str, dict[str, Any]]]) -> dict[str, pa.Table]:
    """Each chat as a rollout with reward 1, and each message of the assistant as the call that sampled it."""
    rollouts, calls = [], []
    for number, place, row in chats:
        name = f"chat-{number:06d}"
        rollouts.append(
            dict.fromkeys(SCHEMAS["rollouts"].names)
            | {"rollout_id": name, "task_id": name, "group_id": name, "mode": "train", "status": "succeeded"}
            | {"outcome": "succeeded", "reward": 1.0, "attempts": 1, "winning_attempt": 1}
        )
        for sequence, (prompt, response) in enumerate(tokens_of(config, place, row)):
            calls.append(
                dict.fromkeys(SCHEMAS["calls"].names)
                | {"rollout_id": name, "attempt": 1, "sequence": sequence, "agent": row.get("agent") or "agent"}
                | {"prompt_token_ids": prompt, "response_token_ids": response, "logprobs": [0.0] * len(response)}
                | {"policy_versions": [ELSEWHERE] * len(response), "temperature": 1.0, "trainable": True}
                | {"policy": "", "own_tokens": 0, "cost": 0.0}
            )
    made = {"rollouts": rollouts, "calls": calls, "rewards": []}
    return {name: pa.Table.from_batches([to_batch(SCHEMAS[name], rows)]) for name, rows in made.items()}


def tokens_of(config: Config, place: str, chat: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """For each message of the assistant the tokens before it and its own, as the chat template renders them; where the chat begins
    with one, as with a greeting, not for that: nobody is asked for it.

    Raises ConfigError where the template does not go on from the one to the other.
    """
    tokenizer, where = _tokenizer(config), f"data.chats: {config.data.chats} {place}"
    messages, tools, found = chat["messages"], chat.get("tools"), []
    for role in sorted({message["role"] for message in messages}):
        if not _takes(config.model.path, config.model.chat_template, role):
            raise ConfigError(
                f"{where}: the chat template leaves out what the role {role} says; give a model.chat_template that has it"
            )
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        prompt = _rendered(tokenizer, messages[:number], tools, where, True)
        whole = _rendered(tokenizer, messages[: number + 1], tools, where, False)
        if whole[: len(prompt)] != prompt:
            raise ConfigError(
                f"{where}: message {number + 1} is rendered otherwise than what the model is asked for at that place ends; "
                "change the message, or give a model.chat_template that goes on"
            )
        response = whole[len(prompt) :]
        ends = [end + 1 for end, token in enumerate(response) if token == tokenizer.eos_token_id]
        found.append((prompt, response[: ends[-1]] if ends else response))
    return found


def _rendered(tokenizer: Any, messages: list[Any], tools: Any, where: str, ask: bool) -> list[int]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [_as_templates_want(message) for message in messages],
            tools=tools,
            add_generation_prompt=ask,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{where}: the chat template refuses it: {error}") from error


def _as_templates_want(message: dict[str, Any]) -> dict[str, Any]:
    """Without keys that hold nothing, parts of a text as one, and with the arguments of its tool calls as objects (vLLM gives them
    so), not as texts of JSON."""
    message = {name: value for name, value in message.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(part["text"] for part in message["content"])  # as vLLM does
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append(call | {"function": call["function"] | {"arguments": parsed}})
    return message | {"tool_calls": calls}


@cache
def _tokenizer_at(path: str, template: str | None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if template:
        tokenizer.chat_template = Path(template).read_text()
    return tokenizer


@cache
def _takes(path: str, template: str | None, role: str) -> bool:
    """Whether the template renders what the role says; one that refuses it where it stands here may take it elsewhere."""
    from jinja2 import TemplateError

    def rendered(text: str) -> str:
        asks, says = {"role": "user", "content": "a"}, {"role": role, "content": text}
        messages = [says, asks] if role == "system" else [asks, says]
        return _tokenizer_at(path, template).apply_chat_template(messages, tokenize=False)

    try:
        return rendered("b") != rendered("c")
    except (TemplateError, TypeError, KeyError, ValueError):
        return True


def _tokenizer(config: Config) -> Any:
    return _tokenizer_at(config.model.path, config.model.chat_template)
