"""A replica's own HTTP server in front of its gateway: agents call the replica that they were given without Serve's proxy
between, which on a small model costs as much as the model. All calls of an attempt meet one replica, and what it has cached of
the conversation.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from typing import Any

import ray
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

KEEP_ALIVE_S = 3600  # longer than clients keep an idle connection: none is closed while a request is on its way
BACKLOG = 2048
UPGRADE = re.compile(rb"(\r\n)upgrade(:[ \t]*h2c[ \t]*\r\n)", re.IGNORECASE)


class Door(HttpToolsProtocol):
    """Without HTTP/2: an offer of it, as Java's client makes, is left aside, and the request goes on as it is. (The parser
    would take the body behind it for the other protocol's.)"""

    def data_received(self, data: bytes) -> None:
        super().data_received(UPGRADE.sub(rb"\1ignored\2", data) if b"h2c" in data else data)


class FrontDoor:
    """Open from `open` on, for the life of the process. `url` is its address: http://host:port, with no /v1."""

    def __init__(self, app: Any, host: str) -> None:
        """`host`: loopback, or anything else to listen on all of the node's addresses."""
        here = ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
        self.socket = socket.socket()
        self.socket.bind((host if here else "0.0.0.0", 0))
        self.url = f"http://{host if here else ray.util.get_node_ip_address()}:{self.socket.getsockname()[1]}"
        settings = uvicorn.Config(
            app,
            http=Door,
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
        )
        self.server = uvicorn.Server(settings)

    def open(self) -> None:
        """On the event loop of the app."""
        self.task = asyncio.create_task(self.server.serve(sockets=[self.socket]))
