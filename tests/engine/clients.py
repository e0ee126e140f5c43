"""The vendors' own clients, each API asked and its reply put together as an agent has it; and what a record says of it."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from attempts import TOOLS, Attempt

FLAT_TOOLS = [{"type": "function"} | tool["function"] for tool in TOOLS]
ANTHROPIC_TOOLS = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (tool["function"] for tool in TOOLS)
]
FINISHED = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
FINISHED |= {"completed": "stop", "incomplete": "length"}


@dataclass
class Reply:
    """What a client received of one choice: text, tool calls as (name, arguments), why it ended, and its thinking."""

    content: str = ""
    tools: list = field(default_factory=list)
    finish: str = ""
    thinking: str = ""

    def size(self) -> int:
        """Characters received."""
        return len(self.content) + len(self.thinking) + sum(len(str(arguments)) for _, arguments in self.tools)


# Each of these asks `prompt`: one Reply a choice. With `hang_up` a stream is left after so many characters of the first.


def ask_chat(attempt: Attempt, prompt, stream=False, tools=None, hang_up=None, **more) -> list[Reply]:
    if tools:
        more["tools"] = tools
    reply = attempt.openai.chat.completions.create(
        model="policy", messages=[{"role": "user", "content": prompt}], stream=stream, **more
    )
    if not stream:
        return [chat_reply(choice) for choice in reply.choices]
    found: dict[int, Reply] = {}
    parts: dict[int, dict[int, list[str]]] = {}
    for chunk in reply:
        for choice in chunk.choices:
            so_far = found.setdefault(choice.index, Reply())
            so_far.content += choice.delta.content or ""
            so_far.thinking += getattr(choice.delta, "reasoning", None) or ""
            so_far.finish = choice.finish_reason or so_far.finish
            for call in choice.delta.tool_calls or []:
                part = parts.setdefault(choice.index, {}).setdefault(call.index, ["", ""])
                part[0] += call.function.name or ""
                part[1] += call.function.arguments or ""
            so_far.tools = [(name, read_json(text)) for name, text in parts.get(choice.index, {}).values()]
        if hang_up and found and found[min(found)].size() >= hang_up:
            reply.close()
            break
    return [found[index] for index in sorted(found)]


def chat_reply(choice) -> Reply:
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    thinking = getattr(choice.message, "reasoning", None) or ""
    return Reply(choice.message.content or "", calls, choice.finish_reason, thinking)


def read_json(text: str) -> Any:
    """The value of JSON; what is not whole as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def ask_completions(attempt: Attempt, prompt, stream=False, tools=None, hang_up=None, **more) -> list[Reply]:
    asked = {"model": "policy", "prompt": prompt, "max_tokens": 60} | more
    reply = attempt.openai.completions.create(stream=stream, **asked)
    if not stream:
        return [Reply(choice.text, [], choice.finish_reason) for choice in reply.choices]
    found: dict[int, Reply] = {}
    for chunk in reply:
        for choice in chunk.choices:
            so_far = found.setdefault(choice.index, Reply())
            so_far.content += choice.text
            so_far.finish = choice.finish_reason or so_far.finish
        if hang_up and found and found[min(found)].size() >= hang_up:
            reply.close()
            break
    return [found[index] for index in sorted(found)]


def ask_responses(attempt: Attempt, prompt, stream=False, tools=None, hang_up=None, **more) -> list[Reply]:
    if tools:
        more["tools"] = FLAT_TOOLS
    reply = attempt.openai.responses.create(model="policy", input=prompt, stream=stream, **more)
    if not stream:
        return [response_reply(reply)]
    so_far, arguments = Reply(), {}
    for event in reply:
        so_far.content += event.delta if event.type == "response.output_text.delta" else ""
        so_far.thinking += event.delta if event.type == "response.reasoning_text.delta" else ""
        if event.type == "response.function_call_arguments.delta":
            arguments[event.output_index] = arguments.get(event.output_index, "") + event.delta
        if event.type in ("response.completed", "response.incomplete"):
            done = response_reply(event.response)
        if hang_up and so_far.size() >= hang_up:
            reply.close()
            return [so_far]
    blank = bool(done.tools) and not so_far.content.strip()  # see test_matrix.differs
    assert (so_far.content, so_far.thinking) == (so_far.content if blank else done.content, done.thinking)
    assert not (blank and done.content.strip())
    assert [json.loads(text) for text in arguments.values()] == [call for _, call in done.tools]
    return [replace(done, content=so_far.content)]


def response_reply(response) -> Reply:
    texts = [part.text for item in response.output if item.type == "message" for part in item.content]
    thoughts = [part.text for item in response.output if item.type == "reasoning" for part in item.content or []]
    calls = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
    finish = "tool_calls" if calls else FINISHED[response.status]
    return Reply("".join(texts), calls, finish, "".join(thoughts))


def ask_messages(attempt: Attempt, prompt, stream=False, tools=None, hang_up=None, **more) -> list[Reply]:
    if tools:
        more["tools"] = ANTHROPIC_TOOLS
    extra = {name: more.pop(name) for name in ("temperature",) if name in more}  # the client no longer has it
    asked = {"model": "policy", "max_tokens": 200, "messages": [{"role": "user", "content": prompt}]} | more
    asked["extra_body"] = extra | more.get("extra_body", {})
    if not stream:
        return [message_reply(attempt.anthropic.messages.create(**asked))]
    with attempt.anthropic.messages.stream(**asked) as events:
        for _ in events:
            so_far = message_reply(events.current_message_snapshot)
            if hang_up and so_far.size() >= hang_up:
                break
    return [so_far]


def message_reply(message) -> Reply:
    texts = [block.text for block in message.content if block.type == "text"]
    thoughts = [block.thinking for block in message.content if block.type == "thinking"]
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    return Reply("".join(texts), calls, FINISHED.get(message.stop_reason, ""), "".join(thoughts))


ASK = {"chat": ask_chat, "completions": ask_completions, "responses": ask_responses, "messages": ask_messages}


def text_of(call: dict, tokenizer, special: bool = False) -> str:
    """What vLLM's own detokenizer makes of the recorded ids; `special`: special tokens too."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    stop, request = json.loads(call["sampling"])["stop"], json.loads(call["request"])
    with_stop = request.get("include_stop_str_in_output", False)
    params = SamplingParams(stop=stop, skip_special_tokens=not special, include_stop_str_in_output=with_stop)
    ids = call["response_token_ids"]
    asked = EngineCoreRequest("id", call["prompt_token_ids"], None, params, None, 0.0, None, None, None)
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, asked)
    for place, token in enumerate(ids):
        last = place == len(ids) - 1
        detokenizer.update([token], last and call["finish_reason"] == "stop" and token == tokenizer.eos_token_id)
    return detokenizer.get_next_output_text(True, False)


def recorded_reply(call: dict, tokenizer, parser_class=None, tools=None, choice="auto", template=None) -> Reply:
    """The Reply that vLLM's own detokenizer and `parser_class`, its parser of whole replies, make of what was recorded, for
    a request of `tools`, the tool `choice` and `template` arguments."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    text = text_of(call, tokenizer, special=parser_class is not None)
    if parser_class is None:
        return Reply(text, [], call["finish_reason"])
    asked = {"tools": tools, "tool_choice": choice} if tools else {}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "-"}], model="policy", **asked)
    parser = parser_class(tokenizer, request.tools, chat_template_kwargs=template or {})
    thinking, content, found = parser.parse(
        text, request, enable_auto_tools=True, model_output_token_ids=call["response_token_ids"]
    )
    calls = [(each.name, json.loads(each.arguments)) for each in found or []]
    named = not isinstance(choice, str) and call["api"] != "responses"  # then it is "stop"; Responses tells no reason
    finish = "tool_calls" if calls and not named else call["finish_reason"]
    return Reply(content or "", calls, finish, thinking or "")
