"""The gateway: a thin ASGI layer inside the engine replica's app. It lets in who has an attempt's key, tells which agent
calls, and answers in the vendor's own error shape.

A key is stateless: what it is for, signed (HMAC-SHA256). It stands in the path, as api key, or both:

    {route}/a/KEY/v1/chat/completions
    {route}/a/KEY/agent/NAME/v1/messages
    {route}/a/KEY/v1/traces                   OpenTelemetry's, kept as the attempt's spans
    {route}/a/KEY/v1/rewards                  {"value": 0.5}, kept as emitted by the agent
    {route}/v1/responses                      with the key as `Authorization: Bearer` or `x-api-key`

The agent's name is the path segment, else the header `x-raygent-agent`, else the model name it asks for where that is not
the served policy's, else "agent".
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

from raygent.actors.continuation import Run, Said, tools_of
from raygent.actors.nesting import MOST_NESTED, nested_over
from raygent.actors.otlp import MAX_BYTES, MOST_SPANS, PROTOBUF, spans_of, unzipped
from raygent.config import POLICY
from raygent.emit import AGENT_HEADER, reward_fields
from raygent.records import AttemptKey

if TYPE_CHECKING:  # it imports this module
    from raygent.actors.upstream import UpstreamProxy

logger = logging.getLogger("raygent.engine")

APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
TRACES = "/v1/traces"
REWARDS = "/v1/rewards"
KEPT = {TRACES: "spans", REWARDS: "rewards"}  # what agents send to be kept, and as what
IN_THREAD_BYTES = 16 << 10  # traces of more, or zipped ones, take milliseconds to read: not on the replica's event loop
MOST_KEPT = MOST_SPANS  # of each, an attempt and replica; in requests of MAX_BYTES together
MODELS = "/v1/models"
UNRECORDED = (MODELS, "/v1/messages/count_tokens")  # need a key, sample nothing
MAX_BODY_BYTES = 64 * 2**20
KEY_LIFE_S = 86_400.0
SWEEP_AT = 1024  # attempts remembered before the first look for those whose keys have expired
PATH = re.compile(r"^/a/(?P<key>[^/]+)(?:/agent/(?P<agent>[^/]+))?(?P<rest>/.*)$", re.DOTALL)
OVERFLOW = re.compile(r"maximum (context|model) length|context length|max_model_len", re.IGNORECASE)
OVERFLOW_WITHIN = 400  # characters: what comes later may repeat the request
MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ENDED = "this attempt has ended; its key is refused"
MAX_MESSAGE = 4000  # characters of an error; vLLM's repeat the request
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
REWARD_TYPES: dict[str, tuple[type, str]] = {
    "name": (str, "a text"),
    "agent": (str, "a text"),
    "components": (dict, "an object of numbers"),
    "call": (int, "a number"),
}  # beside the value; all of them may be left out
REFUSED = {
    "use_beam_search": "beam search does not sample from the policy; leave it out",
    "logprob_token_ids": "the record needs the sampled tokens' own; ask for logprobs",
    "kv_transfer_params": "the engine keeps them to itself, and one that is wrong would end it; leave it out",
    "ec_transfer_params": "the engine keeps them to itself, and one that is wrong would end it; leave it out",
    "background": "a call ends with its request; leave background out",
}
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Types of parts of a conversation, the three APIs', that are no text.
MEDIA = {"image", "image_url", "image_file", "input_image", "computer_screenshot", "file", "input_file", "document"}
MEDIA |= {"audio_url", "input_audio", "video_url", "input_video"}


class KeyRefused(Exception):
    """The key is missing, forged, foreign or over."""


@dataclass(frozen=True)
class Grant:
    """What a key lets in: one attempt of one rollout, until `expires` (Unix seconds)."""

    rollout_id: str
    attempt: int
    mode: str
    expires: float


def mint_key(secret: str, rollout_id: str, attempt: int, mode: str, expires: float) -> str:
    payload = json.dumps([rollout_id, attempt, mode, round(expires, 3)], separators=(",", ":")).encode()
    return f"rg-{_encode(payload)}.{_encode(_sign(secret, payload))}"


def read_key(secret: str, key: str) -> Grant:
    """The key's content. Raises KeyRefused where it was not minted with `secret` or has expired."""
    body, dot, signature = key.removeprefix("rg-").partition(".")
    try:
        payload, signed = _decode(body), _decode(signature)
    except ValueError as error:
        raise KeyRefused("this is no key of this run") from error
    if not dot or not hmac.compare_digest(signed, _sign(secret, payload)):
        raise KeyRefused("this is no key of this run")
    found = Grant(*json.loads(payload))
    if found.expires < time.time():
        raise KeyRefused("this attempt's time is over")
    return found


def _sign(secret: str, payload: bytes) -> bytes:
    return hmac.new(secret.encode(), payload, hashlib.sha256).digest()[:18]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)


@dataclass
class ReplicaAttempt:
    """What one replica knows of one attempt."""

    expires: float  # when its keys are over: from then on it may be forgotten
    requests: int = 0  # let in
    recorded: int = 0  # calls appended to the store: the next source_sequence
    overflow: bool = False  # a request did not fit the context
    over_max_calls: bool = False  # a request was refused for agent.max_calls
    failed: bool = False  # a request was answered with a 5xx
    upstream_failed: str = ""  # why an upstream gave a request no reply, or not the whole of one
    upstream_waited: str = ""  # what a request was waiting for, before any reply, when it was cancelled
    ended: bool = False
    tasks: set[asyncio.Task] = field(default_factory=set)  # requests not answered yet
    recording: set[asyncio.Task] = field(default_factory=set)  # calls on their way to the store
    responses: set[str] = field(default_factory=set)  # ids of what the Responses API keeps for it
    spans: list[dict[str, Any]] = field(default_factory=list)  # that the agent's own OpenTelemetry sent
    rewards: list[dict[str, Any]] = field(default_factory=list)  # that the agent sent
    kept_bytes: Counter[str] = field(default_factory=Counter)  # of the requests that brought them, unzipped: by path
    runs: dict[str, list[Run]] = field(default_factory=dict)  # by agent, for exact continuation
    # What replies said: see continuation.reader.
    read: dict[tuple[str, bytes], Said | None] = field(default_factory=dict)


class Running(Protocol):
    """A generation at work (capture.RunningCall)."""

    def end(self) -> object:
        """Stop it and record what was sampled until now; nothing where it has ended."""


@dataclass
class CallContext:
    """What the capture must know of the HTTP request a generation belongs to."""

    key: Grant
    state: ReplicaAttempt
    agent: str
    mode: str  # the key's; "eval" of an agent that is not trained, which acts as it would in production
    api: str
    request: str  # the body as the client sent it
    untrainable: str = ""  # why nothing sampled for this request may be trained on
    tools: list[dict[str, Any]] = field(default_factory=list)  # offered, as Chat Completions has them
    running: set[Running] = field(default_factory=set)
    over: bool = False  # answered, or hung up: nothing may be sampled any more


current_call: ContextVar[CallContext | None] = ContextVar("raygent_call", default=None)


class Gateway:
    """ASGI middleware around vLLM's app. `ready()` tells whether the replica's weights are current.

    A key that lives longer than `key_life_s` from now is refused: so an attempt that ended can be forgotten after that time.
    Where a request asks for more than `max_tokens` tokens, it gets these. `checks`: by API, what raises where a request's
    body is none of that API. `upstream_of` tells the upstream that an agent of that name has for a model. `text_only`: the
    engine's model takes no images, sounds or files; a request with one is refused. With another model its call is recorded, but
    not trained: the record has tokens alone. `forget` is told of each attempt whose keys are over. `trains`: whether the agent of
    that name is trained.
    """

    def __init__(
        self,
        app: Any,
        secret: str,
        max_calls: int,
        ready: Callable[[], bool],
        key_life_s: float = KEY_LIFE_S,
        max_tokens: int | None = None,
        checks: dict[str, Callable[[dict], object]] | None = None,
        upstream_of: Callable[[str], UpstreamProxy | None] = lambda agent: None,
        text_only: bool = False,
        forget: Callable[[ReplicaAttempt], None] = lambda state: None,
        trains: Callable[[str], bool] = lambda agent: True,
    ) -> None:
        self.forget, self.trains = forget, trains
        self.checks, self.upstream_of, self.text_only = checks or {}, upstream_of, text_only
        self.app, self.secret, self.max_calls, self.ready = app, secret, max_calls, ready
        self.key_life_s, self.max_tokens = key_life_s, max_tokens
        self.attempts: dict[AttemptKey, ReplicaAttempt] = {}
        self.sweep_at = SWEEP_AT

    def attempt(self, rollout_id: str, attempt: int, expires: float) -> ReplicaAttempt:
        """The attempt's state, kept at least until `expires`."""
        if len(self.attempts) >= self.sweep_at:
            now = time.time()
            over = [
                key
                for key, state in self.attempts.items()
                if state.expires < now and not (state.tasks or state.recording)
            ]
            for key in over:
                self.forget(self.attempts.pop(key))
            self.sweep_at = max(SWEEP_AT, 2 * len(self.attempts))
        state = self.attempts.setdefault((rollout_id, attempt), ReplicaAttempt(expires))
        state.expires = max(state.expires, expires)
        return state

    def end_attempt(self, rollout_id: str, attempt: int) -> ReplicaAttempt:
        """From here on the attempt's key is refused and what it has in flight is cancelled."""
        state = self.attempt(rollout_id, attempt, time.time() + self.key_life_s)
        state.ended = True
        for task in state.tasks:
            task.cancel()
        return state

    def _let_in(self, token: str) -> tuple[Grant, ReplicaAttempt]:
        key = read_key(self.secret, token)
        if key.expires > time.time() + self.key_life_s:
            raise KeyRefused(f"this key lives longer than {self.key_life_s:g} s from now")
        state = self.attempt(key.rollout_id, key.attempt, key.expires)
        if state.ended:
            raise KeyRefused(ENDED)
        return key, state

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "websocket":  # nobody's way here
            return await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        matched = PATH.match(path)
        rest = matched["rest"] if matched else path
        refuse = Refusal(send, anthropic=rest.startswith("/v1/messages"))
        try:
            key, state = self._let_in(matched["key"] if matched else _api_key(headers))
        except KeyRefused as error:
            return await refuse(401, "authentication_error", f"{error}; use the base_url and api_key of your attempt")
        api = APIS.get(rest)
        if rest in KEPT and scope["method"] == "POST":
            return await self._keep(rest, state, headers, receive, send, refuse)
        if api is None and rest not in UNRECORDED and rest not in KEPT:
            there = ", ".join([*APIS, *UNRECORDED, *KEPT])
            return await refuse(404, "not_found_error", f"no {rest} here; there are {there}")
        if scope["method"] == "GET" and rest == MODELS:
            return await self.app(_at(scope, rest, headers), receive, send)
        if scope["method"] != "POST":
            return await refuse(
                405, "invalid_request_error", f"{rest} takes POST, not {scope['method']}", {"allow": "POST"}
            )
        if not self.ready():
            state.failed = True
            return await refuse(
                503, "overloaded_error", "this replica waits for the current weights", {"retry-after": "1"}
            )
        if (body := await _body(state, headers, receive, refuse)) is None:
            return
        if (request := await _request(body, refuse)) is None:
            return
        media = media_in(request)
        if state.ended:  # while the body was on its way
            return await refuse(401, "authentication_error", ENDED)
        if api and state.requests >= self.max_calls:
            state.over_max_calls = True
            message = f"agent.max_calls: this attempt has made its {self.max_calls} calls"
            return await refuse(429, "raygent_max_calls", message, {"x-should-retry": "false"})
        state.requests += bool(api)
        agent = self._agent(unquote(matched["agent"] or "") if matched else "", headers, request)
        if not agent.strip() or not agent.isprintable():
            return await refuse(400, "invalid_request_error", f"{agent!r} is no agent's name; use what can be printed")
        only_prompt = api == "completions" and request.get("echo") and request.get("max_tokens") == 0
        context = CallContext(
            key=key,
            state=state,
            agent=agent,
            mode=key.mode if self.trains(agent) else "eval",
            api=api or "",
            request=body.decode(),
            untrainable="prompt_logprobs_only" if only_prompt else media,
            tools=tools_of(request),
        )
        if api and (upstream := self.upstream_of(context.agent)):
            return await upstream.answer(rest, request, headers, receive, send, context, refuse)
        if media and self.text_only:
            why = f"the served model takes text alone, no {media}; leave it out"
            return await refuse(400, "invalid_request_error", why)
        changed = json.dumps(self._for_engine(request, context.mode)).encode()
        await self._serve(_at(scope, rest, headers), changed, receive, send, context, refuse)

    def _agent(self, in_path: str, headers: dict[str, str], request: dict[str, Any]) -> str:
        """Who asks: by the path, else by the header, else by the model's name. That goes before the header where it leads to an
        upstream and the header to none, or an upstream lists just this name: what an upstream is named for is not answered by
        the policy, whoever asks."""
        asked = _model_in(request)
        header = headers.get(AGENT_HEADER, "").encode("latin1").decode("utf-8", "replace")
        upstream = self.upstream_of(asked) if asked else None
        by_model = upstream and (asked in upstream.settings.agents or not self.upstream_of(header))
        return in_path or (asked if by_model else header) or asked or "agent"

    def _for_engine(self, request: dict[str, Any], mode: str) -> dict[str, Any]:
        """`request`, changed to what vLLM's app gets."""
        if mode != "eval":
            unbind(request)
        request["model"] = POLICY
        request.pop("request_id", None)  # vLLM would make it its own, and calls of one id would be one to the capture
        for name in MAX_TOKENS if self.max_tokens else ():
            if isinstance(request.get(name), int):
                request[name] = min(request[name], self.max_tokens)
        return request

    async def _keep(
        self,
        path: str,
        state: ReplicaAttempt,
        headers: dict[str, str],
        receive: Callable,
        send: Callable,
        refuse: Refusal,
    ) -> None:
        """Take the traces or the reward in the request's body; they are handed over at the attempt's end."""
        if (body := await _body(state, headers, receive, refuse)) is None:
            return
        content_type = headers.get("content-type", "").lower()
        encoding = headers.get("content-encoding", "").lower()
        try:
            if path == REWARDS:
                told, size = [reward_in(body)], len(body)
            elif len(body) > IN_THREAD_BYTES or encoding:
                told, size = await asyncio.to_thread(_traced, body, content_type, encoding)
            else:
                told, size = _traced(body, content_type, encoding)
        except ValueError as error:
            return await refuse(400, "invalid_request_error", f"{path}: {error}"[:MAX_MESSAGE])
        if state.ended:
            return await refuse(401, "authentication_error", ENDED)
        kept = state.spans if path == TRACES else state.rewards
        if len(kept) + len(told) > MOST_KEPT or state.kept_bytes[path] + size > MAX_BYTES:
            limits = f"{MOST_KEPT:,} {KEPT[path]} and {MAX_BYTES >> 20} MiB"
            return await refuse(413, "request_too_large", f"{path}: an attempt keeps {limits}")
        state.kept_bytes[path] += size
        kept += told
        protobuf = path == TRACES and content_type.startswith(PROTOBUF)
        answer = b"" if protobuf else b"{}"  # an ExportTraceServiceResponse with nothing to say
        kind = PROTOBUF if protobuf else "application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        await send({"type": "http.response.body", "body": answer})

    async def _serve(
        self, scope: dict, body: bytes, receive: Callable, send: Callable, context: CallContext, refuse: Refusal
    ) -> None:
        """Pass the request on to vLLM's app. When that returns, whatever it still had running is ended and recorded."""
        sent = False

        async def replay() -> dict:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()  # a hang-up

        refused: dict | None = None  # the start of an error, held back until its body is there
        told, begun, answered = bytearray(), False, False

        async def watch(message: dict) -> None:
            nonlocal refused, begun, answered
            answered = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = message
                return
            if refused is None:
                begun = True
                return await send(message)
            told.extend(message.get("body", b""))
            if answered:
                await self._tell_error(refused, bytes(told), body, context, send, refuse)

        task = asyncio.current_task()
        assert task is not None
        token = current_call.set(context if context.api else None)
        context.state.tasks.add(task)
        try:
            await self.app(scope, replay, watch)
        except Exception as error:
            # Starlette raises again what it has answered with a 500. Passed on, it would have the server close the
            # connection, maybe under the client's next request.
            if begun and not answered and (refusal := _refusal_in(error)):
                event = error_event("invalid_request_error", str(refusal)[:MAX_MESSAGE], refuse.anthropic)
                return await send({"type": "http.response.body", "body": event})
            if not answered:
                context.state.failed = True
                raise
            logger.exception("%s: failed inside vLLM", scope["path"])
        finally:
            context.over = True
            for call in list(context.running):
                call.end()
            context.state.tasks.discard(task)
            current_call.reset(token)

    async def _tell_error(
        self, start: dict, told: bytes, body: bytes, context: CallContext, send: Callable, refuse: Refusal
    ) -> None:
        """Pass on vLLM's error, in the vendor's shape and words. A 5xx that vLLM's own check of such a request explains is
        the client's doing and not ours: a 400."""
        status, message = start["status"], _message(told)
        if status == 400 and OVERFLOW.search(message[:OVERFLOW_WITHIN]):
            context.state.overflow = True
            return await refuse.overflow(message[:MAX_MESSAGE])
        if status >= 500 and (why := self._fault_in(context.api, body)):
            return await refuse(400, "invalid_request_error", why[:MAX_MESSAGE])
        context.state.failed |= status >= 500
        if refuse.anthropic or len(told) > MAX_MESSAGE:
            kind = ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
            wait = {name.decode(): value.decode() for name, value in start["headers"] if name == b"retry-after"}
            return await refuse(status, kind, message[:MAX_MESSAGE] or f"status {status}", wait)
        await send(start)
        await send({"type": "http.response.body", "body": told})

    def _fault_in(self, api: str, body: bytes) -> str:
        """What vLLM's own model of such a request finds wrong with it; "" where it finds nothing."""
        if api not in self.checks:
            return ""
        try:
            request = json.loads(body)
            json.dumps(request, ensure_ascii=False).encode()  # no text holds half a surrogate pair
            self.checks[api](request)  # which may change it
        except (
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
        ) as error:  # vLLM's validators trust the types they get
            return f"the request has a value that cannot be right: {type(error).__name__}: {error}"
        return ""


def _refusal_in(error: BaseException) -> Exception | None:
    """vLLM's word for what a request may not ask, where `error` is that as Starlette raises it from a stream: in a group, or as the
    cause of an error of its own."""
    from vllm.exceptions import VLLMClientError

    while True:
        if isinstance(error, VLLMClientError):
            return error
        if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        elif isinstance(error, RuntimeError) and error.__cause__:
            error = error.__cause__
        else:
            return None


def error_event(kind: str, message: str, anthropic: bool) -> bytes:
    """What the vendor's client turns into its own exception in mid-stream."""
    error = {"type": kind, "message": message}
    if anthropic:
        return f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n".encode()
    return f"data: {json.dumps({'error': error})}\n\n".encode()


class Refusal:
    """Answers in the shape that the vendor's client turns into its own exception."""

    def __init__(self, send: Callable, anthropic: bool) -> None:
        self.send, self.anthropic = send, anthropic

    async def __call__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        error: dict[str, Any] = {"type": kind, "message": message}
        whole = (
            {"type": "error", "error": error} if self.anthropic else {"error": error | {"code": kind, "param": None}}
        )
        await self._send(status, whole, headers or {})

    async def overflow(self, message: str) -> None:
        """A context overflow in the words by which each vendor's clients and frameworks know it."""
        kind = "invalid_request_error"
        if self.anthropic:
            error: dict[str, Any] = {"type": kind, "message": f"prompt is too long: {message}"}
            return await self._send(400, {"type": "error", "error": error}, {})
        error = {"type": kind, "message": message, "param": "messages", "code": "context_length_exceeded"}
        await self._send(400, {"error": error}, {})

    async def _send(self, status: int, whole: dict, headers: dict[str, str]) -> None:
        fields = {"content-type": "application/json"} | headers
        raw = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": json.dumps(whole).encode()})


def _api_key(headers: dict[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else headers.get("x-api-key", "")


def _model_in(request: dict) -> str:
    """The model that the request asks for by a name of its own; "" where it asks for the policy, or names none."""
    model = request.get("model")
    return model if isinstance(model, str) and model != POLICY else ""


def unbind(request: dict[str, Any]) -> None:
    """Let the policy itself write the calls of tools that are `strict`, as the Agents SDK's are by default: under vLLM's
    grammar what is sampled is not the policy's, and could not be trained."""
    tools = request.get("tools")
    for tool in tools if isinstance(tools, list) else []:
        for place in (tool, tool.get("function")) if isinstance(tool, dict) else ():
            if isinstance(place, dict) and place.get("strict"):
                place["strict"] = False


def media_in(request: dict) -> str:
    """The type of a part of the conversation that is no text, whichever API's; "" where all are."""
    parts = [request.get("messages"), request.get("input")]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            kind = part.get("type")
            if isinstance(kind, str) and kind in MEDIA:
                return kind
            parts += (part.get("content"), part.get("output"))  # the latter: of a tool, in Responses
    return ""


def _message(body: bytes) -> str:
    """What an error of vLLM's says; "" where it is in no shape that is known."""
    try:
        error = json.loads(body).get("error", {})
    except (ValueError, AttributeError):
        return ""
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else ""


def _at(scope: dict, path: str, headers: dict[str, str]) -> dict:
    """`scope` as vLLM's app sees it: no key in the path, no credentials, no request id of the client's, the body's length
    left to be found."""
    dropped = ("authorization", "x-api-key", "content-length", AGENT_HEADER, "x-request-id")
    kept = [(name.encode(), value.encode("latin1")) for name, value in headers.items() if name not in dropped]
    return scope | {"path": path, "raw_path": path.encode(), "root_path": "", "headers": kept}


def reward_in(body: bytes) -> dict[str, Any]:
    """The reward that a request's body holds, as `emit_reward` would record it. Raises ValueError where it holds none."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(told, dict) or "value" not in told:
        raise ValueError('the body must be a JSON object with a "value"')
    for name, (kind, words) in REWARD_TYPES.items():
        if not isinstance(told.get(name, kind()), kind):
            raise ValueError(f"{name} must be {words}")
    if strangers := told.keys() - REWARD_TYPES.keys() - {"value"}:
        raise ValueError(f"unknown: {', '.join(sorted(strangers))}; a reward has value, {', '.join(REWARD_TYPES)}")
    try:
        return reward_fields(**told)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _traced(body: bytes, content_type: str, encoding: str) -> tuple[list[dict[str, Any]], int]:
    """The spans that an export request holds, and its bytes unzipped. Raises ValueError."""
    whole = unzipped(body, encoding)
    return spans_of(whole, content_type), len(whole)


async def _request(body: bytes, refuse: Refusal) -> dict[str, Any] | None:
    """The JSON object in `body`; None where it was refused."""
    try:
        request = json.loads(body.decode())  # of bytes it would take UTF-16, too, which the record has no room for
        why = _wrong_in(request, body)
    except (ValueError, RecursionError) as error:
        request, why = None, f"the body is not JSON: {error}"
    if why:
        await refuse(400, "invalid_request_error", why)
        return None
    return request


def _wrong_in(request: Any, body: bytes) -> str:
    if not isinstance(request, dict):
        return "the body must be a JSON object"
    if body.count(b"[") + body.count(b"{") > MOST_NESTED and nested_over(request, MOST_NESTED):
        return f"the body is nested more than {MOST_NESTED} deep"
    if ESCAPED_SURROGATE.search(body):  # mostly halves of pairs
        try:
            json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return (
                f"the body holds \\u{ord(error.object[error.start]):x}, half of a pair and no character; leave it out"
            )
    return next((f"{name}: {why}" for name, why in REFUSED.items() if request.get(name)), "")


async def _body(state: ReplicaAttempt, headers: dict[str, str], receive: Callable, refuse: Refusal) -> bytes | None:
    """The whole body, read for no longer than the attempt goes on; None where it is too large, which the client has been told."""
    chunks, size, task = [], 0, asyncio.current_task()
    assert task is not None
    declared = headers.get("content-length", "")
    too_large = (
        declared.isdecimal() and int(declared) > MAX_BODY_BYTES
    )  # read, for clients listen after that, but not kept
    state.tasks.add(task)
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            part = message.get("body", b"")
            size += len(part)
            if not too_large:
                chunks.append(part)
            if size > MAX_BODY_BYTES:
                await refuse(413, "request_too_large", f"a request has at most {MAX_BODY_BYTES >> 20} MiB")
                return None
            if not message.get("more_body"):
                return b"".join(chunks)
    finally:
        state.tasks.discard(task)
