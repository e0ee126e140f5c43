"""An upstream: an agent's model that is somebody else's endpoint. The gateway passes the agent's calls on to it and has them
recorded as text, with what they cost.

An upstream that does not answer is infrastructure: it is asked again for `timeout_s`, then the client gets a 503 and the
attempt's state says why. As in the capture a call is recorded before the last piece of its reply is handed on; of a client that
is gone by then the record is what came.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx
from aiolimiter import AsyncLimiter

from raygent.actors.capture import CallRecorder, NotRecorded
from raygent.actors.gateway import CallContext, Refusal, error_event
from raygent.actors.tries import SHOWN, Unanswered, beginning, check_answered, wait_before_next
from raygent.config import Upstream
from raygent.records import UPSTREAM, Call

logger = logging.getLogger("raygent.engine")
BUDGET_POLL_S = 0.05
MOST_TOKENS = 1e9  # of a call: what tells of more is mistaken
PASSED_ON = ("anthropic-version", "anthropic-beta", "openai-beta", "accept")  # of the request's headers
PASSED_BACK = ("content-type", "x-request-id", "request-id")
MISTAKES = (401, 402, 403, 404, 405)  # the config's, not the agent's: key, account, base_url, model
NO_ENTRY = (401, 403)
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
LAST = ("response.completed", "response.incomplete", "response.failed", "message_stop", "error")  # types of last events
# In an error's type, code and status: what the agent asked for is at fault, unless it's the config or the vendor all the same.
AGENTS_DOING = re.compile(
    r"invalid_(request|prompt|argument)|bad_?request|unprocessable|context_length|too_large|content_|policy|image",
    re.IGNORECASE,
)
# In the beginning of a 4xx of whatever status: the account or the key is at fault, not the request.
ACCOUNT = re.compile(
    r"credit balance|insufficient[ _](balance|funds|quota|credits)|exceeded your current quota|(invalid|incorrect)[ _]api[ _]?key"
    r"|api[ _]?key not valid",
    re.IGNORECASE,
)
NOT_AGENTS = re.compile(r"api_key|model_not_found|rate_limit|quota|billing|server|overloaded", re.IGNORECASE)


@dataclass
class Reply:
    """What has come of one call so far."""

    context: CallContext
    started: float = field(default_factory=time.time)
    waits_for: str = "its turn"  # "": nothing but the reply
    pieces: list[bytes] = field(default_factory=list)
    usage: dict[str, float] = field(default_factory=dict)
    finish_reason: str = "abort"
    recorded: bool = False

    def read(self, told: Any) -> None:
        """Take usage and finish reason from a reply's JSON, or from that of one event."""
        if not isinstance(told, dict):
            return
        for place in (told, told.get("response"), told.get("message"), told.get("delta")):
            if not isinstance(place, dict):
                continue
            if isinstance(usage := place.get("usage"), dict):
                self.usage |= {name: count for name, count in usage.items() if _is_count(count)}
            choices = place.get("choices")
            listed = choices if isinstance(choices, list) else []
            ends = [choice.get("finish_reason") for choice in listed if isinstance(choice, dict)]
            for end in (*ends, place.get("stop_reason")):
                if isinstance(end, str):
                    self.finish_reason = end


class UpstreamProxy:
    """One upstream in one of `replicas` engine replicas, each of which has its share of the run's limits.

    With `max_cost` no call begins while `budget` is not above 0: the dollars that the driver has given this replica to spend.
    """

    def __init__(
        self,
        name: str,
        settings: Upstream,
        key: str | None,
        replicas: int,
        recorder: CallRecorder,
        source: str,
    ) -> None:
        self.name, self.settings, self.key = name, settings, key
        self.recorder, self.source = recorder, source
        self.client = httpx.AsyncClient(timeout=settings.timeout_s, limits=httpx.Limits(max_connections=None))
        self.turns = asyncio.Semaphore(max(1, settings.max_parallel // replicas))
        rate = settings.requests_per_minute / replicas
        self.pace = AsyncLimiter(1, 60 / rate) if rate else nullcontext()  # evenly: no minute has more
        self.cost, self.budget, self.served = 0.0, 0.0, 0
        self.mistake = ""  # the last that it was, of MISTAKES
        self.bearer = False  # how the key was given to /v1/messages last
        self.told: set[str] = set()  # what the log has

    def status(self) -> dict[str, Any]:
        """Since the replica started: `cost` in dollars, calls `served`, and what `mistake` of the config it met; the `budget`
        that is left."""
        return {"cost": self.cost, "served": self.served, "mistake": self.mistake, "budget": self.budget}

    async def answer(
        self,
        path: str,
        request: dict[str, Any],
        headers: dict[str, str],
        receive: Callable,
        send: Callable,
        context: CallContext,
        refuse: Refusal,
    ) -> None:
        """Pass `request` on and its reply back. Cancelled, or left by the client, which `send` may raise for, it records what
        has come."""
        task = asyncio.current_task()
        assert task is not None
        state, reply = context.state, Reply(context)
        gone = asyncio.create_task(_cancel_at_hang_up(receive, task))
        state.tasks.add(task)
        try:
            await self._answer(path, request, headers, send, reply, refuse)
        except asyncio.CancelledError:
            if reply.waits_for:  # what the agent did not get is not its doing
                state.upstream_waited = (
                    f"upstream.{self.name}: the call was given up while it waited for {reply.waits_for}"
                )
            elif not reply.recorded:
                self._record(reply)
            if not gone.done() or task.uncancel():  # else there is nobody to answer, and that is all
                raise
        except OSError:  # the client is gone
            raise
        except Exception as error:  # whatever it is, it is not the agent's doing
            state.failed, state.upstream_failed = True, f"upstream.{self.name}: {type(error).__name__}: {error}"
            raise
        finally:
            if reply.pieces and not reply.recorded:
                self._record(reply)
            gone.cancel()
            state.tasks.discard(task)

    async def _answer(
        self,
        path: str,
        request: dict[str, Any],
        headers: dict[str, str],
        send: Callable,
        reply: Reply,
        refuse: Refusal,
    ) -> None:
        settings, state = self.settings, reply.context.state
        request = request | {"model": settings.model}
        strip_usage = settings.priced and reply.context.api in ("chat", "completions") and _ask_for_usage(request)
        fields = {name.encode(): headers[name].encode("latin1") for name in PASSED_ON if name in headers}
        fields |= {b"content-type": b"application/json"}
        url = settings.base_url.rstrip("/") + path.removeprefix("/v1")
        body = json.dumps(request).encode()
        keys = self._keys(path)
        deadline, tries = 0.0, 0
        while True:
            try:
                async with self.turns:
                    while settings.max_cost and self.budget <= 0:  # the driver gives a new one, or ends the run
                        await asyncio.sleep(BUDGET_POLL_S)
                    async with self.pace:
                        deadline = deadline or time.monotonic() + settings.timeout_s
                        reply.waits_for = reply.waits_for if tries else ""
                        asked = (url, body, fields | keys[0])
                        return await self._try(asked, deadline, strip_usage, send, reply, refuse)
            except Unanswered as error:
                if error.mistake in NO_ENTRY and len(keys) > 1:
                    del keys[0]
                    self.bearer = b"authorization" in keys[0]
                    continue
                if error.mistake:
                    self.mistake = str(error)
                tries += 1
                wait_s = wait_before_next(error, tries)
                if time.monotonic() + wait_s > deadline:
                    state.failed = True
                    state.upstream_failed = f"upstream.{self.name}: {error}"
                    self._tell(f"no reply after {tries} tries: {error}")
                    no_more = {"x-should-retry": "false"}
                    return await refuse(503, "overloaded_error", state.upstream_failed, no_more)
                reply.waits_for = f"another try after {error}"
                await asyncio.sleep(wait_s)

    async def _try(
        self,
        asked: tuple[str, bytes, dict[bytes, bytes]],
        deadline: float,
        strip_usage: bool,
        send: Callable,
        reply: Reply,
        refuse: Refusal,
    ) -> None:
        """One request. Raises Unanswered where another may do better, as long as nothing has been passed on."""
        url, body, fields = asked
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    request = self.client.stream("POST", url, content=body, headers=fields)
                    response = await stack.enter_async_context(request)
                    stream = response.is_success and "text/event-stream" in response.headers.get("content-type", "")
                    if not stream:
                        await response.aread()
            except TimeoutError as error:
                raise Unanswered("no reply within timeout_s", float("inf")) from error
            except (httpx.TransportError, httpx.DecodingError) as error:
                raise Unanswered(f"{type(error).__name__}: {error}") from error
            status = response.status_code
            account = 400 <= status < 500 and ACCOUNT.search(beginning(response))
            if status == 429 and _spent(response):
                raise Unanswered(f"HTTP 429 from {url}: {beginning(response)}", float("inf"), status)
            check_answered(response)
            if status in MISTAKES or 300 <= status < 400 or account:
                raise Unanswered(f"HTTP {status} from {url}: {beginning(response)}", float("inf"), status)
            if response.is_success and not stream:
                _check_reply(response)
            kept = [
                (name.encode(), response.headers[name].encode()) for name in PASSED_BACK if name in response.headers
            ]
            start = {"type": "http.response.start", "status": status, "headers": kept}
            if stream:
                return await self._pass_on(response, start, strip_usage, send, reply, refuse.anthropic)
            reply.waits_for = ""
            reply.pieces.append(response.content)
            reply.finish_reason = "stop" if status < 400 else "error"
            reply.read(_json(response.content))
            try:
                await asyncio.shield(self._record(reply, status < 400))
            except NotRecorded as error:
                reply.context.state.failed = True
                return await refuse(500, "api_error", str(error))
            await send(start)
            await send({"type": "http.response.body", "body": response.content})

    async def _pass_on(
        self,
        response: httpx.Response,
        start: dict[str, Any],
        strip_usage: bool,
        send: Callable,
        reply: Reply,
        anthropic: bool,
    ) -> None:
        """The events of a stream as they come, the last one after the call is recorded. An error is the last. Raises Unanswered
        where it ends before the first."""
        state, last, broken, theirs = reply.context.state, b"", "", False
        try:
            async for event in _in_time(_events(response), self.settings.timeout_s):
                if not reply.pieces:
                    reply.waits_for = ""
                    await send(start)
                reply.pieces.append(event)
                told = _told(event)
                reply.read(told)
                if isinstance(told, dict) and (told.get("error") or told.get("type") in ("error", "response.failed")):
                    broken, theirs = json.dumps(told)[:SHOWN], _agents_doing(told)
                if broken or told == "[DONE]" or (isinstance(told, dict) and told.get("type") in LAST):
                    last = event
                    break
                if strip_usage and isinstance(told, dict) and told.get("usage") and told.get("choices") == []:
                    continue
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if not last and reply.finish_reason == "abort":
                broken = "the stream ended in the middle of its reply"
            elif reply.finish_reason == "abort":
                reply.finish_reason = "stop"
        except (httpx.TransportError, httpx.DecodingError, TimeoutError) as error:
            broken = f"the stream broke off: {type(error).__name__}: {error}"
        if broken and not reply.pieces:
            raise Unanswered(broken)
        if broken and not last:
            last = error_event("overloaded_error", f"upstream.{self.name}: {broken}", anthropic)
        if broken:
            reply.finish_reason = "error"
        if broken and not theirs:
            state.failed, state.upstream_failed = True, f"upstream.{self.name}: {broken}"
            self._tell(broken)
        try:
            await asyncio.shield(self._record(reply, not broken))
        except NotRecorded as error:
            state.failed, last = True, error_event("overloaded_error", str(error), anthropic)
        await send({"type": "http.response.body", "body": last})

    def _record(self, reply: Reply, served: bool = False) -> asyncio.Task[None]:
        """Count the call and have it appended to the store."""
        cost, state, key = cost_of(reply.usage, self.settings), reply.context.state, reply.context.key
        self.cost += cost
        self.budget -= cost
        self.served += served
        if served and self.settings.priced and not reply.usage:
            self._tell("a reply told no usage; what it cost is not known, and counts as nothing")
        state.recorded += 1
        call = Call(
            rollout_id=key.rollout_id,
            attempt=key.attempt,
            source=self.source,
            source_sequence=state.recorded - 1,
            request_id=uuid.uuid4().hex,
            choice=0,
            agent=reply.context.agent,
            policy=f"{UPSTREAM}{self.name}",
            api=reply.context.api,
            request=reply.context.request,
            prompt_token_ids=[],
            response_token_ids=[],
            logprobs=[],
            policy_versions=[],
            sampling="{}",
            temperature=1.0,
            finish_reason=reply.finish_reason,
            trainable=False,
            untrainable_why="upstream",
            own_tokens=0,
            started=reply.started,
            finished=time.time(),
            response=b"".join(reply.pieces).decode("utf-8", "replace"),
            cost=cost,
        )
        reply.recorded = True
        return self.recorder.begin(state, [call])

    def _keys(self, path: str) -> list[dict[bytes, bytes]]:
        """The headers that give the key; on /v1/messages one after the other, until one is let in. Never both: Anthropic takes
        no API key as bearer, other endpoints take nothing else, and some refuse the two together."""
        if self.key is None:
            return [{}]
        bearer, plain = {b"authorization": f"Bearer {self.key}".encode()}, {b"x-api-key": self.key.encode()}
        if path != "/v1/messages":
            return [bearer]
        return [bearer, plain] if self.bearer else [plain, bearer]

    def _tell(self, what: str) -> None:
        """Once in the log."""
        if what not in self.told and len(self.told) < 100:
            self.told.add(what)
            logger.warning("upstream.%s: %s", self.name, what)


def cost_of(usage: dict[str, float], prices: Upstream) -> float:
    """Dollars. Tokens that Anthropic's API wrote to or read from its cache, which it counts apart, cost as others do."""
    counted = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    read = usage.get("prompt_tokens") or sum(usage.get(name, 0) for name in counted)
    written = usage.get("completion_tokens") or usage.get("output_tokens", 0)
    return (read * prices.price_input + written * prices.price_output) / 1e6


def _ask_for_usage(request: dict[str, Any]) -> bool:
    """Have a stream of Chat Completions or Completions end with its usage; whether the client had not asked for that."""
    options = request.get("stream_options") or {}
    if not request.get("stream") or not isinstance(options, dict) or options.get("include_usage"):
        return False
    request["stream_options"] = options | {"include_usage": True}
    return True


async def _cancel_at_hang_up(receive: Callable, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The events of a stream, each with the blank line that ends it."""
    rest, looked = b"", 0
    async for piece in response.aiter_bytes():
        rest += piece
        while end := EVENT_END.search(rest, looked):
            yield rest[: end.end()]
            rest, looked = rest[end.end() :], 0
        looked = max(0, len(rest) - 3)  # no end lies before that
    if rest:
        yield rest


async def _in_time(events: AsyncIterator[bytes], limit_s: float) -> AsyncIterator[bytes]:
    """Raises TimeoutError where for so long none comes that tells something: comments keep a connection, not a reply, alive."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise TimeoutError(f"no event for {limit_s:g} s") from error
        if _told(event) is not None:
            deadline = loop.time() + limit_s
        yield event


def _check_reply(response: httpx.Response) -> None:
    """Raises Unanswered where a reply of 2xx is none: no object of JSON, or an error that is not the agent's doing."""
    told = _json(response.content)
    if not isinstance(told, dict):
        raise Unanswered(f"HTTP {response.status_code} without a reply in JSON: {beginning(response)}")
    if told.get("error") and not _agents_doing(told):
        raise Unanswered(f"HTTP {response.status_code} with an error: {beginning(response)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS


def _told(event: bytes) -> Any:
    """An event's data: JSON, "[DONE]", or None."""
    lines = [line.removeprefix(b"data:").strip() for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    return "[DONE]" if data == b"[DONE]" else _json(data)


def _spent(response: httpx.Response) -> bool:
    """Whether a 429 is an account without money, by OpenAI's code for it: to come again does not help. Its message does not
    tell, since others say the same of a minute's limit."""
    told = _json(response.content)
    error = told.get("error") if isinstance(told, dict) else None
    return isinstance(error, dict) and "insufficient_quota" in (error.get("code"), error.get("type"))


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _agents_doing(told: dict[str, Any]) -> bool:
    """Whether the error that an event tells of is, by its type, the agent's: a bad request, one too long for the model or
    against the vendor's policy. Not so what the vendor could not do, nor what nobody knows."""
    response = told.get("response")
    error = told.get("error") or (isinstance(response, dict) and response.get("error")) or told
    if not isinstance(error, dict):
        return False
    kinds = [str(error.get(name, "")) for name in ("type", "code", "status")]
    if statuses := [int(kind) for kind in kinds if kind.isdecimal()]:
        return 400 <= statuses[0] < 500 and statuses[0] not in (408, 429, *MISTAKES)
    return bool(AGENTS_DOING.search(" ".join(kinds))) and not NOT_AGENTS.search(" ".join(kinds))
