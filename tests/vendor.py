"""A vendor's endpoint on this machine: an HTTP server that answers as it is told to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
COUNTED = {"input_tokens": 1000, "output_tokens": 10}
MESSAGE = {"role": "assistant", "content": "well said"}
CHAT = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "big",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
    "usage": USAGE,
}


def sse(*events: Any, named: bool = False) -> list[bytes]:
    """Events of a stream: dicts as JSON, texts as they are; `named` as Responses and Messages have them."""
    told = [event if isinstance(event, str) else json.dumps(event) for event in events]
    names = [f"event: {event['type']}\n" if named else "" for event in events]
    return [f"{name}data: {data}\n\n".encode() for name, data in zip(names, told, strict=True)]


def chunk(choices: list[Any], **fields: Any) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "big", "choices": choices} | fields


def delta(text: str, end: str | None = None) -> dict[str, Any]:
    return chunk([{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": end}])


CHAT_STREAM = sse(delta("well "), delta("said", "stop"), chunk([], usage=USAGE), "[DONE]")


class Vendor:
    """`answers` are given one after the other, the last of them from then on: (status, body, headers), or a function of the
    request's body that returns such. A body of bytes is sent as it is; one that is a list is a stream: bytes, seconds to wait, an Event to wait for, or
    None: the connection breaks."""

    def __init__(self) -> None:
        self.answers: list[Any] = [(200, CHAT, {})]
        self.requests: list[dict[str, Any]] = []  # "path", "headers" (lower case), "body" (of a GET None), "time"
        self.at_once = self.most_at_once = 0
        self.base_url = ""
        self.lock = threading.Lock()

    def take(self, path: str, headers: dict[str, str], body: Any) -> Any:
        with self.lock:
            self.requests.append({"path": path, "headers": headers, "body": body, "time": time.monotonic()})
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer(body) if callable(answer) else answer

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1


@contextmanager
def serving() -> Iterator[Vendor]:
    vendor = Vendor()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):
                with vendor.counted():  # until the answer is out but for its last piece: then its client may ask again
                    *most, last = self.begin() or [None]
                    for piece in most:
                        self.go_on(piece)
                self.go_on(last)

        do_GET = do_POST

        def begin(self) -> list[Any]:
            """Send the head; the pieces that come after it."""
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null")
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, told, more = vendor.take(self.path, headers, body)
            stream = isinstance(told, list)
            self.send_response(status)
            kind = "text/event-stream; charset=utf-8" if stream else "application/json"
            data = b"" if stream else told if isinstance(told, bytes) else json.dumps(told).encode()
            length = {"content-length": "1000000" if None in told else ""} if stream else {"content-length": len(data)}
            for name, value in ({"content-type": kind} | length | more).items():
                if value != "":
                    self.send_header(name, str(value))
            self.end_headers()
            return told if stream else [data]

        def go_on(self, piece: Any) -> None:
            if isinstance(piece, threading.Event):
                piece.wait(20)
            elif isinstance(piece, int | float):
                time.sleep(piece)
            elif piece is not None:
                self.wfile.write(piece)
                self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    vendor.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    yield vendor
    server.shutdown()
    server.server_close()
