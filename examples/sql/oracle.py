"""A stand-in for a vendor that knows the tasks: OpenAI's Chat Completions and Responses and Anthropic's Messages, by rule.

It hands off where it can, tries the best query that one can write who has not seen the columns, corrects it with the
gold query when it hears an error, and answers with the query that gave rows. So any agent here runs on it as on a
vendor's model, and what it was asked and said is a demonstration in that agent's own prompts. The API key of a request names the
task.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Row = dict[str, Any]


class Oracle(ThreadingHTTPServer):
    """`tasks`: by id. `seen`: what it was asked, as `task`, `model`, `messages`, `tools` and its `reply`, all in the shape
    of Chat Completions, with the arguments of tool calls as dicts."""

    daemon_threads = True

    def __init__(self, tasks: list[Row]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tasks = {task["id"]: task for task in tasks}
        self.seen: list[Row] = []

    @property
    def url(self) -> str:
        """For Anthropic's clients; OpenAI's want /v1 behind it."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1
    server: Oracle

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = self.headers["x-api-key"] or self.headers["authorization"].removeprefix("Bearer ")
        read, write = APIS[self.path.split("?")[0]]
        messages, tools = read(body)
        reply = decide(self.server.tasks[key]["private"], messages, [tool["function"]["name"] for tool in tools])
        self.server.seen.append(
            {"task": key, "model": body["model"], "messages": messages, "tools": tools, "reply": reply}
        )
        told = json.dumps(write(reply, uuid.uuid4().hex, body["model"])).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def oracle_of(tasks: list[Row]) -> Iterator[Oracle]:
    with Oracle(tasks) as oracle:
        threading.Thread(target=oracle.serve_forever, daemon=True).start()
        yield oracle
        oracle.shutdown()


def decide(private: Row, messages: list[Row], tools: list[str]) -> Row:
    """The assistant's message that comes next."""
    if "Final Answer:" in messages[0]["content"]:
        return text(think_and_act(private, messages))
    said = [message for message in messages if message["role"] == "assistant"]
    last = messages[-1]
    for name in tools:
        if name.startswith("transfer_to_"):
            return call(name)
    if last["content"].startswith("SELECT"):  # another agent's query, to be run or checked
        return call("run_sql", sql=last["content"]) if tools else text("OK")
    if not tools:
        return text(private["sql"] if said else private["guess"])
    if last["role"] != "tool":
        return call("run_sql", sql=private["guess"])
    if "rows:" in last["content"]:
        return text(said[-1]["tool_calls"][0]["function"]["arguments"]["sql"])
    return call("run_sql", sql=private["sql"])


def think_and_act(private: Row, messages: list[Row]) -> str:
    """The same for agents that call tools in text (ReAct, as CrewAI has it)."""
    has_tools, (*_, last) = "Action Input:" in messages[0]["content"], messages
    before, observed, observation = last["content"].rpartition("\nObservation:")
    if not has_tools or ("rows:" in observation and observed):
        sql = json.loads(before.rpartition("Action Input: ")[2])["sql"] if has_tools else private["guess"]
        return f"Thought: I now can give a great answer\nFinal Answer: {sql}"
    sql = private["sql"] if observed else private["guess"]
    return f"Thought: run it\nAction: run_sql\nAction Input: {json.dumps({'sql': sql})}"


def text(content: str) -> Row:
    return {"role": "assistant", "content": content}


def call(name: str, **arguments: str) -> Row:
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [called]}


def content_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content or [])


def read_chat(body: Row) -> tuple[list[Row], list[Row]]:
    messages = []
    for message in body["messages"]:
        plain: Row = {"role": message["role"], "content": content_of(message.get("content"))}
        for made in message.get("tool_calls") or []:
            function = made["function"]
            plain.setdefault("tool_calls", []).append(call(function["name"], **json.loads(function["arguments"]))["tool_calls"][0])  # fmt: skip
        messages.append(plain)
    return messages, body.get("tools") or []


def read_responses(body: Row) -> tuple[list[Row], list[Row]]:
    messages = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    items = body["input"]
    for item in [{"role": "user", "content": items}] if isinstance(items, str) else items:
        if item.get("type") == "function_call":
            messages.append(call(item["name"], **json.loads(item["arguments"])))
        elif item.get("type") == "function_call_output":
            messages.append({"role": "tool", "content": content_of(item["output"])})
        else:
            messages.append({"role": item["role"], "content": content_of(item["content"])})
    tools = [tool for tool in body.get("tools") or [] if tool["type"] == "function"]
    return messages, [{"type": "function", "function": tool} for tool in tools]


def read_anthropic(body: Row) -> tuple[list[Row], list[Row]]:
    messages = [{"role": "system", "content": content_of(body["system"])}] if body.get("system") else []
    for message in body["messages"]:
        blocks = message["content"]
        for block in [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks:
            if block["type"] == "tool_use":
                messages.append(call(block["name"], **block["input"]))
            elif block["type"] == "tool_result":
                messages.append({"role": "tool", "content": content_of(block["content"])})
            else:
                messages.append({"role": message["role"], "content": block["text"]})
    tools = [
        {"type": "function", "function": tool | {"parameters": tool["input_schema"]}} for tool in body.get("tools", [])
    ]
    return messages, tools


def write_chat(reply: Row, identity: str, model: str) -> Row:
    message = dict(reply)
    if "tool_calls" in reply:
        (made,) = reply["tool_calls"]
        function = made["function"] | {"arguments": json.dumps(made["function"]["arguments"])}
        message["tool_calls"] = [{"id": f"call_{identity}", "type": "function", "function": function}]
    reason = "tool_calls" if "tool_calls" in reply else "stop"
    return {
        "id": f"chatcmpl-{identity}",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def write_responses(reply: Row, identity: str, model: str) -> Row:
    item: Row
    if "tool_calls" in reply:
        function = reply["tool_calls"][0]["function"]
        arguments = json.dumps(function["arguments"])
        item = {
            "type": "function_call",
            "call_id": f"call_{identity}",
            "name": function["name"],
            "arguments": arguments,
        }
    else:
        part = {"type": "output_text", "text": reply["content"], "annotations": []}
        item = {"type": "message", "role": "assistant", "content": [part]}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    return {
        "id": f"resp_{identity}",
        "object": "response",
        "created_at": 1,
        "status": "completed",
        "model": model,
        "output": [item | {"id": f"item_{identity}", "status": "completed"}],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
        "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2} | details,
    }


def write_anthropic(reply: Row, identity: str, model: str) -> Row:
    block: Row = {"type": "text", "text": reply["content"]}
    if "tool_calls" in reply:
        function = reply["tool_calls"][0]["function"]
        block = {
            "type": "tool_use",
            "id": f"toolu_{identity}",
            "name": function["name"],
            "input": function["arguments"],
        }
    return {
        "id": f"msg_{identity}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [block],
        "stop_reason": "tool_use" if "tool_calls" in reply else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


APIS = {
    "/v1/chat/completions": (read_chat, write_chat),
    "/v1/responses": (read_responses, write_responses),
    "/v1/messages": (read_anthropic, write_anthropic),
}
