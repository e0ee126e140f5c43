"""A replica's own HTTP server, over real connections."""

import asyncio
import json

import pytest

from raygent.actors.front_door import FrontDoor


async def echo(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("apart", [False, True])
async def test_a_client_that_offers_http_2_is_answered_by_1_1(apart):
    """As Java's own client does."""
    door = FrontDoor(echo, "127.0.0.1")
    door.open()
    while not door.server.started:
        await asyncio.sleep(0.01)
    body = json.dumps({"messages": ["h2c"]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\n"
    offer = b"HTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA\r\nUpgrade: h2c\r\n\r\n"
    reader, writer = await asyncio.open_connection(*door.socket.getsockname())
    for _ in range(2):  # on one connection
        for part in (head % len(body) + offer, body) if apart else (head % len(body) + offer + body,):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)
        told = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert told.startswith(b"HTTP/1.1 200") and await asyncio.wait_for(reader.readexactly(len(body)), 10) == body
    writer.close()
    door.server.should_exit = True
    await door.task
