"""A stand-in for the model that improves prompts: Chat Completions on this machine, answered by rule.

    python benchmarks/prompt_stub.py PORT

It knows nothing of the tasks and the rewards. Asked for a critique it makes one of its COMPLAINTS, asked for a
new prompt it does to the old one what the critique says, or some complaint where there is none; which one, the request's hash
decides, not what it was shown. Three of the five undo what makes the example's first prompt strange to its model, the others do
harm: so this tries the search, its selection and the way there, and not how well a model criticises.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def swap_lines(lines: list[str]) -> list[str]:
    return [*lines[1:2], *lines[:1], *lines[2:]]


def strip_label(lines: list[str]) -> list[str]:
    """The first line with a placeholder and other words loses these."""
    for place, line in enumerate(lines):
        found = re.findall(r"\{\w+\}", line)
        if found and line.strip() != " ".join(found):
            return [*lines[:place], " ".join(found), *lines[place + 1 :]]
    return lines


def drop_plain(lines: list[str]) -> list[str]:
    """The last line without a placeholder goes."""
    plain = [place for place, line in enumerate(lines) if "{" not in line]
    return lines if not plain else [line for place, line in enumerate(lines) if place != plain[-1]]


COMPLAINTS: dict[str, Callable[[list[str]], list[str]]] = {
    "The order of the lines confuses it: let the first two change places.": swap_lines,
    "A label stands before what is filled in: leave the label out.": strip_label,
    "There is an instruction without content: drop the last of these.": drop_plain,
    "It answers too hastily: tell it to think step by step.": lambda lines: [*lines, "Think step by step."],
    "It does not know its role: tell it first.": lambda lines: ["You are an expert.", *lines],
}


def answer(request: str) -> str:
    chosen = list(COMPLAINTS)[int(hashlib.sha256(request.encode()).hexdigest(), 16) % len(COMPLAINTS)]
    if "Give one reason" in request:
        return chosen
    complaint = next((complaint for complaint in COMPLAINTS if complaint in request), chosen)
    fenced = re.search(r"```\n(.*?)\n```", request, re.DOTALL)
    lines = fenced.group(1).splitlines() if fenced else []
    return "```\n" + "\n".join(COMPLAINTS[complaint](lines)) + "\n```"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": answer(body["messages"][-1]["content"])}
        told = {
            "id": "stub",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(port: int = 0) -> Iterator[str]:
    """Yields the base_url."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    with serving(int(sys.argv[1])) as url:
        print(f"answering at {url}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
