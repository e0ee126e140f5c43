"""The matrix: API x stream x tools x n x thinking, stop strings, split UTF-8, hang-ups, each by the vendor's own client. What
was recorded, read with vLLM's own parsers of whole replies, is what the client put together, streamed or not.

One engine with both parsers, as a run of Qwen3 has it, on a tiny model that was taught what to think and to say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from attempts import REPLIES, SECRET, TOOLS, Attempt, engine_config
from clients import ASK, Reply, ask_chat, recorded_reply, text_of
from tiny_model import make_tiny_model, teach
from transformers import AutoTokenizer

from raygent.actors.engine_handle import EngineHandle
from raygent.algorithms.batch import to_samples
from raygent.algorithms.trajectory import build
from raygent.cluster.parts import NAMESPACE
from raygent.cluster.serve_app import delete_app, start_app

PARSERS = {"tool_parser": "hermes", "reasoning_parser": "qwen3"}
THOUGHT = "Hm, 想 🤔.\n"
THINKS = f"<think>\n{THOUGHT}</think>\n\n"
THOUGHT_TOKENS = len(f"\n{THOUGHT}\n\n".encode()) + 2  # a byte is a token
WIDE = "漢字 👩‍👩‍👧‍👦 🇩🇪 é!"
SAID = REPLIES | {"wide": WIDE, "long": "la 漢 " * 12}
CALLED = {"call": [("add", {"a": 1, "b": 2})], "both": [("add", {"a": 3, "b": 4}), ("add", {"a": 5, "b": 6})]}
PROMPT = "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"  # for Completions, which has no messages
NO_THINKING = {"enable_thinking": False}

NAMED = {"type": "function", "function": {"name": "add"}}
CHOICES = {  # as each API writes them
    "chat": {"auto": "auto", "required": "required", "named": NAMED, "none": "none"},
    "responses": {"auto": "auto", "required": "required", "named": {"type": "function", "name": "add"}, "none": "none"},
    "messages": {
        "auto": {"type": "auto"},
        "required": {"type": "any"},
        "named": {"type": "tool", "name": "add"},
        "none": {"type": "none"},
    },
}
LEFT_OUT = {
    "completions x tools, thinking": "the API has neither: a reply is its text",
    "responses, messages x n": "the APIs have no n",
    "messages x include_stop_str_in_output": "the API leaves the stop sequence out",
    "hang-up x no stream": "nothing is received before the end; test_apis.py has the hang-up before a reply",
    "named choice x two calls": "a named choice is one call",
}


@dataclass(frozen=True)
class Cell:
    """A request by an API's own client, and what is to come of it: `said` to the letter ("" where that is open)."""

    api: str
    stream: bool
    asked: str
    choice: str = ""  # of tools; "": none are offered
    n: int = 1
    thinking: bool = False
    stop: str = ""
    with_stop: bool = False
    cut: int = 0  # the reply ends after so many bytes of what was taught
    hang_up: int = 0
    warm: bool = False  # sampled at temperature 1: what comes is open, choices differ

    def __str__(self) -> str:
        words = [
            self.api,
            "stream" if self.stream else "whole",
            self.asked,
            f"tools={self.choice}" if self.choice else "",
            f"n={self.n}" if self.n > 1 else "",
            "thinking" if self.thinking else "",
            f"stop={self.stop.strip()}" if self.stop else "",
            "with_stop" if self.with_stop else "",
            f"cut={self.cut}" if self.cut else "",
            f"hang_up={self.hang_up}" if self.hang_up else "",
            "warm" if self.warm else "",
        ]
        return "-".join(word for word in words if word)


def cells() -> Iterator[Cell]:
    for api, stream in product(ASK, (False, True)):
        thinks = (False,) if api == "completions" else (False, True)
        for thinking in thinks:
            yield Cell(api, stream, "say", thinking=thinking)
            yield Cell(api, stream, "say", thinking=thinking, warm=True)
            yield Cell(api, stream, "wide", thinking=thinking)
            for cut in (8, 30):  # in the middle of an emoji
                yield Cell(api, stream, "wide", thinking=thinking, cut=cut)
            for with_stop in (False,) if api == "messages" else (False, True):
                yield Cell(api, stream, "say", thinking=thinking, stop="🙂 all", with_stop=with_stop)
            if stream:
                yield Cell(api, stream, "long", thinking=thinking, hang_up=5)
            if api in ("chat", "completions"):
                yield Cell(api, stream, "say", n=3, thinking=thinking)
                yield Cell(api, stream, "say", n=3, thinking=thinking, warm=True)
            if api == "completions":
                continue
            for asked, choice in TOOL_USE:
                yield Cell(api, stream, asked, choice, thinking=thinking)
            for asked, choice in TOOL_USE if api == "chat" else ():
                yield Cell(api, stream, asked, choice, 3, thinking)
            if thinking:
                yield Cell(api, stream, "say", thinking=True, stop="想")
    yield Cell("chat", True, "both", "auto", hang_up=12)
    yield Cell("chat", True, "say", n=3, hang_up=20)


TOOL_USE = [
    ("say", "auto"),
    ("call", "auto"),
    ("both", "auto"),
    ("call", "none"),
    ("call", "required"),
    ("call", "named"),
]
CELLS = list(cells())


def differs(cell: Cell) -> bool:
    """Where vLLM's own parsers make another reply of a stream than of the whole: they stream the white space before a first tool
    call, which they leave out of a whole reply."""
    return cell.stream and cell.thinking and (cell.asked, cell.choice) == ("call", "auto")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), thinking=True)
    return teach(folder, SAID, TOOLS, 60, THINKS)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def parser_class() -> Any:
    from vllm.parser import ParserManager

    return ParserManager.get_parser(PARSERS["tool_parser"], PARSERS["reasoning_parser"], True)


@pytest.fixture(scope="module")
def engine(store: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHandle]:
    config = engine_config("matrix", tmp_path_factory.mktemp("run"), model, continuation="exact")
    config.model.reasoning_parser = PARSERS["reasoning_parser"]
    yield start_app(config, SECRET, "engine-tests-store", NAMESPACE, 0, str(model))
    delete_app(config)


def ask(cell: Cell, attempt: Attempt) -> list[Reply]:
    """`cell`'s request by its API's client."""
    more: dict[str, Any] = {}
    extra: dict[str, Any] = {} if cell.api == "completions" or cell.thinking else {"chat_template_kwargs": NO_THINKING}
    if cell.choice:
        more["tool_choice"] = CHOICES[cell.api][cell.choice]
    if cell.n > 1:
        more["n"] = cell.n
    if cell.stop:
        name, value = ("stop_sequences", [cell.stop]) if cell.api == "messages" else ("stop", [cell.stop])
        if cell.api == "responses":
            extra[name] = value
        else:
            more[name] = value
    if cell.with_stop:
        extra["include_stop_str_in_output"] = True
    limit = "max_output_tokens" if cell.api == "responses" else "max_tokens"
    if cell.api == "completions":
        more[limit] = 200
    if cell.cut:
        more[limit] = cell.cut + THOUGHT_TOKENS * (cell.thinking or cell.api == "completions")
    if cell.hang_up and cell.api != "messages":
        extra["ignore_eos"] = True
        more[limit] = 1000
    if cell.warm and cell.api != "messages":
        extra["seed"] = 0
    more["temperature"] = 1.0 if cell.warm else 0.01 if cell.n > 1 else 0.0
    prompt = PROMPT % cell.asked if cell.api == "completions" else cell.asked
    tools = TOOLS if cell.choice else None
    return ASK[cell.api](attempt, prompt, cell.stream, tools, cell.hang_up or None, extra_body=extra, **more)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, attempt: Any, engine: EngineHandle, tokenizer: Any, parser_class: Any) -> None:
    one = attempt("eval")
    replies = ask(cell, one)
    calls = one.calls()
    assert [call["choice"] for call in calls] == list(range(cell.n))
    assert all(call["api"] == cell.api and len(call["response_token_ids"]) for call in calls)
    if cell.hang_up:
        for call, reply in zip(calls, replies, strict=False):
            assert reply.finish == "" and call["finish_reason"] == "abort"
            assert_begins(text_of(call, tokenizer, special=True), reply)
        return
    if cell.stream and any(has_stray_tag(text_of(call, tokenizer, special=True), cell) for call in calls):
        for call, reply in zip(calls, replies, strict=True):
            recorded = iter(text_of(call, tokenizer, special=True))
            assert all(character in recorded for character in reply.thinking + reply.content)  # in this order
        return
    template = {} if cell.thinking else NO_THINKING
    recorded = [
        recorded_reply(
            call,
            tokenizer,
            None if cell.api == "completions" else parser_class,
            TOOLS if cell.choice else None,
            CHOICES["chat"].get(cell.choice, "auto"),
            template,
        )
        for call in calls
    ]
    if differs(cell):
        assert all(reply.content and not reply.content.strip() for reply in replies)
        replies = [replace(reply, content="") for reply in replies]
    assert recorded == replies
    if cell.choice in ("required", "named"):  # a grammar forces it
        assert all(reply.tools[0][0] == "add" and not reply.content for reply in replies)
    elif not cell.warm:
        assert replies == [as_taught(cell)] * cell.n


def has_stray_tag(text: str, cell: Cell) -> bool:
    """Whether an open text has by chance what vLLM's parsers read otherwise in a stream than in the whole."""
    return (
        cell.warm and cell.api != "completions" and ("<tool_call>" in text or text.count("think>") > 2 * cell.thinking)
    )


def as_taught(cell: Cell) -> Reply:
    """What the client should have of the reply that the model was taught."""
    said, calls = SAID[cell.asked], CALLED.get(cell.asked, []) if cell.choice == "auto" else []
    if cell.cut:
        said = said.encode()[: cell.cut].decode(errors="ignore")
    thinking, content = "", said.partition("<tool_call>")[0] if calls else said
    if cell.api == "completions":
        content = THINKS + content
    elif cell.thinking:
        thinking, content = f"\n{THOUGHT}", f"\n\n{content}"
    if cell.stop and cell.stop in thinking:
        thinking, content = thinking.partition(cell.stop)[0], ""
    if cell.stop and cell.stop in content:
        content = content.partition(cell.stop)[0] + cell.stop * cell.with_stop
    finish = "tool_calls" if calls else "length" if cell.cut else "stop"
    return Reply("" if calls and not content.strip() else content, calls, finish, thinking)


def assert_begins(text: str, reply: Reply) -> None:
    """`text` has all that `reply` has, in its order, from its beginning on."""
    place = 0
    for piece in (reply.thinking, reply.content, *(word for call in reply.tools for word in call)):
        if isinstance(piece, str) and piece:
            found = text.index(piece, place)
            assert place or found <= len("<think>")
            place = found + len(piece)


def test_thinking_is_continued_and_trained(attempt: Any, engine: EngineHandle, tokenizer: Any) -> None:
    """The client sends back no thinking, the template would leave it out: it stays in the prompt, and every token of it
    is trained."""
    one = attempt()
    (first,) = ask_chat(one, "say")
    assert first.thinking
    messages = [
        {"role": "user", "content": "say"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "say"},
    ]
    one.openai.chat.completions.create(model="policy", messages=messages, max_tokens=60)
    before, after = one.calls()
    ran = before["prompt_token_ids"] + before["response_token_ids"]
    assert after["prompt_token_ids"][: len(ran)] == ran and after["own_tokens"] == len(ran)
    assert "</think>" in tokenizer.decode(before["response_token_ids"])
    (trajectory,) = build([before, after])
    (sample,) = to_samples(trajectory, "group", 1.0)
    trained = sample.token_ids[sample.loss_mask].tolist()
    assert trained == before["response_token_ids"] + after["response_token_ids"]


IMAGE = "data:image/png;base64,iVBORw0KGgo="
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
SHOWN = {
    "chat": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}],
    "responses": [{"role": "user", "content": [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}]}],
    "messages": [{"role": "user", "content": [{"type": "image", "source": SOURCE}]}],
    "messages, by a tool": [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "add", "input": {}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": SOURCE}]},
            ],
        },
    ],
}


@pytest.mark.parametrize("where", SHOWN)
def test_an_image_is_refused_by_a_model_of_text_alone(attempt: Any, where: str) -> None:
    one, shown = attempt(), SHOWN[where]
    with pytest.raises((openai.BadRequestError, anthropic.BadRequestError), match=r"takes text alone, no \w*image"):
        if where == "chat":
            one.openai.chat.completions.create(model="policy", messages=shown)
        elif where == "responses":
            one.openai.responses.create(model="policy", input=shown)
        else:
            one.anthropic.messages.create(model="policy", max_tokens=9, messages=shown)
    assert one.calls() == []


def test_the_matrix_is_whole() -> None:
    assert len({str(cell) for cell in CELLS}) == len(CELLS) >= 60
    print(f"{len(CELLS)} cells; left out:")
    for what, why in LEFT_OUT.items():
        print(f"  {what}: {why}")
