"""An engine without a model, for tests of what stands before it: the real gateway over HTTP, the real store behind it.

`TinyEngine` is a Ray actor; `TinyHandle` answers what EngineHandle answers. What the last message says is what happens:
"overflow" a context overflow, "break" a 500, "judge" an upstream's failing, "slow" two seconds, else a reply at once.
"""

import asyncio
import json
import os
import sys
import time
import uuid

import ray
import uvicorn
from ray.exceptions import RayError
from starlette.requests import Request

from raygent.actors import gateway
from raygent.actors.engine_handle import EngineUnavailable
from raygent.records import CALLS, Call, to_batch

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import tests

TOLD = (
    "overflow",
    "over_max_calls",
    "failed",
    "upstream_failed",
    "upstream_waited",
    "spans",
    "rewards",
)  # of an attempt


class TinyEngine:
    def __init__(self, secret, store, max_calls, port=0):
        self.store, self.port, self.source = store, port, f"tiny-{uuid.uuid4().hex[:8]}"
        self.gateway = gateway.Gateway(self.app, secret, max_calls, lambda: True)

    async def serve(self):
        """Start; the port."""
        self.server = uvicorn.Server(uvicorn.Config(self.gateway, port=self.port, log_level="warning", lifespan="off"))
        self.task = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return port

    async def app(self, scope, receive, send):
        context = gateway.current_call.get()
        task = asyncio.current_task()
        context.state.tasks.add(task)
        try:
            text = (await Request(scope, receive).json())["messages"][-1]["content"]
            if text == "overflow":
                return await answer(
                    send, 400, {"error": {"message": "This model's maximum context length is 8 tokens"}}
                )
            if text == "break":
                return await answer(send, 500, {"error": {"message": "the engine broke"}})
            if text == "judge":
                context.state.failed, context.state.upstream_failed = True, "upstream.vendor: HTTP 500"
                return await answer(send, 503, {"error": {"message": context.state.upstream_failed}})
            if text == "slow":
                await asyncio.sleep(2)
            reply = await self.record(context)
        finally:
            context.state.tasks.discard(task)
        message = {"role": "assistant", "content": "yes"}
        await answer(send, 200, {"id": reply, "choices": [{"index": 0, "message": message}]})

    async def record(self, context):
        key, state, now, reply = context.key, context.state, time.time(), uuid.uuid4().hex
        state.recorded += 1
        names = (self.source, state.recorded - 1, reply, 0, context.agent, "policy", context.api, context.request)
        sampled = ([1, 2], [3], [-0.5], [0], "{}", 1.0, "stop", True, "", 0, now, now)
        call = Call(key.rollout_id, key.attempt, *names, *sampled)
        await self.store.append.remote("calls", to_batch(CALLS, [call]))
        return reply

    async def status(self):
        return {"source": self.source, "url": self.url, "version": 0, "pid": os.getpid()}

    async def close_attempts(self, attempts):
        states = {key: self.gateway.end_attempt(*key) for key in attempts}
        return self.source, {
            key: {name: getattr(state, name) for name in TOLD} | {"calls": state.recorded, "died": ""}
            for key, state in states.items()
        }


async def answer(send, status, body):
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


class TinyHandle:
    def __init__(self, name):
        self.name = name

    def ask(self, method, *arguments):
        try:
            return ray.get(getattr(ray.get_actor(self.name), method).remote(*arguments), timeout=10)
        except (RayError, ValueError) as error:
            raise EngineUnavailable(f"{method}: {error}") from error

    def status(self):
        return [self.ask("status")]

    def close_attempts(self, attempts):
        source, closed = self.ask("close_attempts", attempts)
        return {attempt: {source: closed[attempt]} for attempt in attempts}


def start_tiny_engine(name, secret, store, max_calls=50, port=0):
    """The handle of a new TinyEngine of that name, and its port."""
    actor = (
        ray.remote(TinyEngine)
        .options(name=name, num_cpus=0, lifetime="detached")
        .remote(secret, store, max_calls, port)
    )
    port = ray.get(actor.serve.remote())
    return TinyHandle(name), port
