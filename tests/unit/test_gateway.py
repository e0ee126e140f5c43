"""The gateway without an engine: keys, paths, what it passes on and what it remembers."""

import asyncio
import gzip
import json
import string
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError

from raygent.actors import gateway
from raygent.actors.gateway import APIS, MAX_MESSAGE, POLICY, Gateway, KeyRefused, current_call, mint_key, read_key

SECRET = "secret"
TEXT = st.text(max_size=40)
NAME = st.text(string.ascii_letters + string.digits + "-_.~ ü", min_size=1, max_size=20).filter(str.strip)


def key_for(rollout="r", attempt=1, mode="train", life=600.0):
    return mint_key(SECRET, rollout, attempt, mode, time.time() + life)


class App:
    """What stands behind the gateway: keeps what it was asked, answers what it is told to."""

    def __init__(self, status=200, body=b"{}", work=None, headers=()):
        self.status, self.body, self.work, self.headers = status, body, work, list(headers)
        self.scopes, self.requests, self.contexts = [], [], []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        self.contexts.append(current_call.get())
        if scope["method"] != "GET":
            self.requests.append(json.loads((await receive())["body"]))
        if self.work:
            await self.work()
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        for place in range(0, max(len(self.body), 1), 7):
            more = place + 7 < len(self.body)
            await send({"type": "http.response.body", "body": self.body[place : place + 7], "more_body": more})


async def call(door, path, body=b'{"model": "m"}', headers=None, method="POST"):
    """Status and body of the answer."""
    start, answer = await call_whole(door, path, body, headers, method)
    return start["status"], json.loads(answer) if answer else None


async def call_whole(door, path, body=b'{"model": "m"}', headers=None, method="POST"):
    """The answer's start, with status and headers, and its body's bytes."""
    messages, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    fields = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": f"/app{path}", "root_path": "/app", "headers": fields}
    await door(scope, receive, send)
    return sent[0], b"".join(message.get("body", b"") for message in sent[1:])


def gate(app, max_calls=100, **more):
    return Gateway(app, SECRET, max_calls, lambda: True, **more)


# keys


@given(TEXT, st.integers(0, 2**31), st.sampled_from(["train", "eval"]))
def test_a_key_says_what_it_was_minted_for(rollout, attempt, mode):
    key = key_for(rollout, attempt, mode)
    read = read_key(SECRET, key)
    assert (read.rollout_id, read.attempt, read.mode) == (rollout, attempt, mode)
    assert set(key) <= set(string.ascii_letters + string.digits + "-_.")  # goes into a path and a header as it is


@given(st.data())
def test_a_key_changed_anywhere_is_refused(data):
    key = mint_key(SECRET, "rollout", 3, "train", 1e10)
    place = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(string.ascii_letters + string.digits + "-_.=/+ ü\0"))
    changed = key[:place] + letter + key[place + 1 :]
    try:
        read = read_key(SECRET, changed)
    except KeyRefused:
        return
    # The last letter of each part holds bits that no byte takes.
    assert read == read_key(SECRET, key)
    assert changed == key or changed.partition(".")[0][:-1] == key.partition(".")[0][:-1]


@given(st.text())
def test_anything_else_is_refused(text):
    for key in (text, f"rg-{text}", f"rg-{text}.{text}", text.encode("utf-8", "replace").decode("latin1")):
        with pytest.raises(KeyRefused):
            read_key(SECRET, key)


@given(st.text(min_size=1))
def test_another_secret_does_not_open(secret):
    if secret != SECRET:
        with pytest.raises(KeyRefused):
            read_key(secret.encode("utf-8", "replace").decode(), key_for())


def test_a_key_ends():
    assert read_key(SECRET, key_for(life=5))
    with pytest.raises(KeyRefused, match="time is over"):
        read_key(SECRET, key_for(life=-1))


# paths


@pytest.mark.parametrize("rest", APIS)
@given(agent=NAME)
def test_the_path_names_key_and_agent(rest, agent):
    app = App()
    key = key_for()
    assert asyncio.run(call(gate(app), f"/a/{key}{rest}"))[0] == 200
    assert asyncio.run(call(gate(app), f"/a/{key}/agent/{agent}{rest}", headers={"x-raygent-agent": "other"}))[0] == 200
    assert [context.agent for context in app.contexts] == ["m", agent]
    assert [context.api for context in app.contexts] == [APIS[rest]] * 2
    for scope in app.scopes:
        assert (scope["path"], scope["raw_path"], scope["root_path"]) == (rest, rest.encode(), "")
        assert key.encode() not in b"".join(value for _, value in scope["headers"])


@example("/v1/rewards")  # which the key opens, and whose body is read
@example("/v1/traces")
@given(st.text(max_size=60))
def test_any_path_is_answered(path):
    for whole in (path, f"/{path}", f"/a/{path}", f"/a/{key_for()}{path}", f"/a/{key_for()}/agent/{path}"):
        status, answer = asyncio.run(call(gate(App()), whole))
        if status != 200:
            wrong_body = {400} if whole.endswith(tuple(gateway.KEPT)) else set()
            assert status in {401, 404} | wrong_body and answer["error"]["message"]


@given(
    st.binary(max_size=60).filter(lambda body: body.strip() != b"{}")
    | st.recursive(st.none() | st.integers() | TEXT, st.lists).map(json.dumps).map(str.encode)
)
def test_any_body_is_answered(body):
    status, answer = asyncio.run(call(gate(App()), f"/a/{key_for()}/v1/messages", body))
    assert status == 400 and answer["type"] == "error"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer KEY"}, 200),
        ({"authorization": "bearer  KEY"}, 200),
        ({"X-Api-Key": "KEY"}, 200),
        ({"authorization": "Bearer ", "x-api-key": "KEY"}, 200),
        ({"authorization": "Basic KEY"}, 401),
        ({"authorization": "KEY"}, 401),
        ({}, 401),
    ],
)
async def test_the_key_as_api_key(headers, status):
    headers = {name: value.replace("KEY", key_for()) for name, value in headers.items()}
    app = App()
    assert (await call(gate(app), "/v1/chat/completions", headers=headers))[0] == status
    assert all(name not in (b"authorization", b"x-api-key") for scope in app.scopes for name, _ in scope["headers"])


@pytest.mark.parametrize(
    ("model", "agent"), [("gpt-5", "gpt-5"), (POLICY, "agent"), ("", "agent"), (None, "agent"), (5, "agent")]
)
async def test_the_model_name_names_the_agent(model, agent):
    app = App()
    await call(gate(app), f"/a/{key_for()}/v1/responses", json.dumps({"model": model}).encode())
    assert app.contexts[0].agent == agent and app.requests == [{"model": POLICY}]


async def test_a_name_may_hold_a_slash():
    app = App()
    assert (await call(gate(app), f"/a/{key_for()}/agent/plan%2Fner/v1/messages"))[0] == 200
    assert app.contexts[0].agent == "plan/ner"


@pytest.mark.parametrize("status", [200, 400, 404, 500, 503])
async def test_it_is_remembered_that_a_call_was_not_served(status):
    door = gate(App(status))
    await call(door, f"/a/{key_for()}/v1/messages")
    assert door.end_attempt("r", 1).failed == (status >= 500)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (rb'{"model": "\ud800"}', 400),
        (rb'{"stop": ["\uDFFF"]}', 400),
        (rb'{"\ude42\ud83d": 1}', 400),
        (rb'{"user": "\ud83d\ude42"}', 200),
        (rb'{"user": "\\ud800"}', 200),  # the six letters
    ],
)
async def test_half_a_pair_of_surrogates_is_refused(body, status):
    app = App()
    answered, whole = await call(gate(app), f"/a/{key_for()}/v1/responses", body)
    assert answered == status
    assert status == 200 or "half of a pair" in whole["error"]["message"]


# what is passed on and refused


async def test_what_a_request_becomes():
    app = App()
    body = {"model": "gpt-5", "max_tokens": 9999, "max_output_tokens": None, "request_id": "mine", "n": 2}
    headers = {"x-request-id": "mine", "x-stainless-lang": "python", "content-length": "7"}
    await call(gate(app, max_tokens=50), f"/a/{key_for()}/v1/chat/completions", json.dumps(body).encode(), headers)
    assert app.requests == [{"model": POLICY, "max_tokens": 50, "max_output_tokens": None, "n": 2}]
    assert app.scopes[0]["headers"] == [(b"x-stainless-lang", b"python")]
    assert json.loads(app.contexts[0].request) == body


async def test_a_model_that_an_upstream_is_there_for_goes_before_the_header():
    asked = []

    class Vendor:
        async def answer(self, path, request, headers, receive, send, context, refuse):
            asked.append(context.agent)
            await refuse(200, "", "")

        def __init__(self, *agents):
            self.settings = SimpleNamespace(agents=agents)

    async def ask(model, header):
        request = json.dumps({"model": model} if model else {}).encode()
        await call(door, f"/a/{key_for()}/v1/chat/completions", request, {"x-raygent-agent": header})

    app, judge, assist = App(), Vendor("judge"), Vendor("a*")
    of = {"judge": judge, "assist": assist, "agent": assist, "author": assist}
    door = gate(app, upstream_of=of.get)
    for model in ("judge", "assist", "policy", None):
        await ask(model, "planner")
    assert asked == ["judge", "assist"] and [context.agent for context in app.contexts] == ["planner"] * 2
    await ask("assist", "judge")  # both have an upstream, and none lists "assist" itself
    await ask("judge", "author")
    assert asked[2:] == ["judge", "judge"]


@pytest.mark.parametrize("mode", ["train", "eval"])
async def test_strict_tools_bind_nothing_in_training(mode):
    app = App()
    chat = {"type": "function", "function": {"name": "f", "strict": True}}
    request = {"tools": [chat, {"type": "function", "name": "g", "strict": True}, "no tool"]}
    await call(gate(app), f"/a/{key_for(mode=mode)}/v1/chat/completions", json.dumps(request).encode())
    chat, responses, _ = app.requests[0]["tools"]
    assert chat["function"]["strict"] is responses["strict"] is (mode == "eval")
    assert json.loads(app.contexts[0].request) == request  # what is recorded is what the agent sent


async def test_an_agent_that_is_not_trained_acts_as_in_production():
    app = App()
    door = gate(app, trains=lambda agent: agent == "writer")
    request = json.dumps({"tools": [{"type": "function", "name": "g", "strict": True}]}).encode()
    for agent in ("writer", "judge"):
        await call(door, f"/a/{key_for()}/agent/{agent}/v1/responses", request)
    assert [context.mode for context in app.contexts] == ["train", "eval"]
    assert [request["tools"][0]["strict"] for request in app.requests] == [False, True]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "GET", "HEAD"])
async def test_a_call_is_a_post(method):
    app = App()
    assert (await call(gate(app), f"/a/{key_for()}/v1/chat/completions", method=method))[0] == 405
    assert not app.scopes


@pytest.mark.parametrize("rest", ["/v1/messages/count_tokens", "/v1/rewards", "/v1/traces"])
async def test_what_is_posted_alone_is_not_to_be_had(rest):
    status, answer = await call(gate(App()), f"/a/{key_for()}{rest}", method="GET")
    assert status == 405 and "takes POST, not GET" in answer["error"]["message"]


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
async def test_what_is_between_engines_is_refused(name):
    app, body = App(), json.dumps({name: {"prompt_token_ids": [True]}}).encode()
    status, answer = await call(gate(app), f"/a/{key_for()}/v1/chat/completions", body)
    assert status == 400 and answer["error"]["message"].startswith(f"{name}: ") and not app.scopes


@pytest.mark.parametrize("name", ["%20", "%00", "a%0Ab"])
async def test_an_agents_name_can_be_printed(name):
    assert (await call(gate(App()), f"/a/{key_for()}/agent/{name}/v1/chat/completions"))[0] == 400


async def test_an_agents_name_in_a_header_is_utf8():
    app = App()
    await call(gate(app), f"/a/{key_for()}/v1/chat/completions", headers={"x-raygent-agent": "schön"})
    assert app.contexts[0].agent == "schön"


async def test_a_body_that_never_ends_ends_with_its_attempt():
    door, asked = gate(App()), asyncio.Event()

    async def receive():
        asked.set()
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": f"/a/{key_for()}/v1/chat/completions", "headers": []}
    task = asyncio.create_task(door(scope, receive, None))
    await asked.wait()
    state = door.end_attempt("r", 1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not state.tasks


async def test_a_body_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 10)
    assert (await call(gate(App()), f"/a/{key_for()}/v1/messages", b"x" * 11))[0] == 413


def conversations(part):
    """`part` in each place where an API has parts, by path."""
    said = {"role": "user", "content": [{"type": "text", "text": "look"}, part]}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "seen"}, part]}
    output = {"type": "function_call_output", "call_id": "1", "output": [part]}
    return [
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "s"}, said]}),
        ("/v1/responses", {"input": [said]}),
        ("/v1/responses", {"input": [output]}),
        ("/v1/messages", {"messages": [said]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [result]}]}),
    ]


@pytest.mark.parametrize("kind", sorted(gateway.MEDIA))
async def test_a_model_of_text_alone_is_sent_no_media(kind):
    for path, body in conversations({"type": kind, kind: "data:,"}):
        app = App()
        status, answer = await call(
            Gateway(app, SECRET, 9, lambda: True, text_only=True), f"/a/{key_for()}{path}", json.dumps(body).encode()
        )
        assert (status, app.requests) == (400, [])
        assert (answer.get("type") == "error") == (path == "/v1/messages")
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"] == f"the served model takes text alone, no {kind}; leave it out"


async def test_media_go_to_a_model_that_takes_them_and_are_not_trained():
    for path, body in conversations({"type": "image_url", "image_url": {"url": "data:,"}}):
        app = App()
        status, _ = await call(
            Gateway(app, SECRET, 9, lambda: True), f"/a/{key_for()}{path}", json.dumps(body).encode()
        )
        assert (status, app.contexts[0].untrainable) == (200, "image_url")


async def test_what_only_names_media_is_text():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"type": {"enum": ["image"]}}}}}
    said = [
        {"role": "user", "content": '{"type": "image"}'},
        {"role": "user", "content": [{"type": "text", "text": "image"}]},
    ]
    for body in ({"messages": said, "tools": [tool]}, {"input": "image"}, {"messages": [{"type": ["image"]}, None, 3]}):
        app = App()
        door = Gateway(app, SECRET, 9, lambda: True, text_only=True)
        assert (await call(door, f"/a/{key_for()}/v1/responses", json.dumps(body).encode()))[0] == 200
        assert app.contexts[0].untrainable == ""


async def test_models_and_token_counts_need_a_key_and_are_no_calls():
    app = App()
    door = gate(app, max_calls=0)
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/messages/count_tokens")):
        assert (await call(door, path, method=method))[0] == 401
        assert (await call(door, f"/a/{key_for()}{path}", method=method))[0] == 200
    assert app.contexts == [None, None]


async def test_a_replica_without_the_weights_in_force_takes_no_calls():
    status, answer = await call(Gateway(App(), SECRET, 9, lambda: False), f"/a/{key_for()}/v1/messages")
    assert status == 503 and answer["error"]["type"] == "overloaded_error"


VLLMS = {"message": "This model's maximum context length is 8 tokens.", "type": "BadRequestError", "code": 400}


@pytest.mark.parametrize("body", [{"error": VLLMS}, {"type": "error", "error": VLLMS}])
async def test_an_overflow_is_told_in_the_vendors_words(body):
    door = gate(App(400, json.dumps(body).encode()))
    status, answer = await call(door, f"/a/{key_for()}/v1/chat/completions")
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    status, answer = await call(door, f"/a/{key_for('other')}/v1/messages")
    assert status == 400 and answer["error"]["message"].startswith("prompt is too long")
    assert all(state.overflow for state in door.attempts.values())


@pytest.mark.parametrize(
    "body", [b'{"error": {"message": "no"}}', b'{"error": "maximum context length"}', b"oops", b"[1]"]
)
async def test_another_400_passes_as_it_is(body):
    app, sent = App(400, body), []
    door = gate(app)

    async def receive():
        return {"type": "http.request", "body": b"{}"}

    async def send(message):
        sent.append(message)

    path = f"/a/{key_for()}/v1/chat/completions"
    await door({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    assert sent[0]["status"] == 400 and b"".join(message.get("body", b"") for message in sent) == body
    assert not any(state.overflow for state in door.attempts.values())


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (404, "not_found_error"), (500, "api_error")]
)
async def test_an_error_of_the_engine_is_told_in_anthropics_shape(status, kind):
    door = gate(App(status, b'{"error": {"message": "no", "type": "Bad Request", "code": 400}}'))
    told = {"type": "error", "error": {"type": kind, "message": "no"}}
    assert await call(door, f"/a/{key_for()}/v1/messages") == (status, told)


async def test_an_error_that_repeats_the_request_is_cut():
    door = gate(App(400, json.dumps({"error": {"message": "x" * 10**6}}).encode()))
    status, answer = await call(door, f"/a/{key_for()}/v1/chat/completions")
    assert (status, answer["error"]["message"]) == (400, "x" * MAX_MESSAGE)


@pytest.mark.parametrize(
    ("path", "message"), [("messages", "later"), ("chat/completions", "later"), ("chat/completions", "x" * 10**5)]
)
async def test_when_to_ask_again_stays_in_an_error_of_whatever_shape(path, message):
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"7")]
    door = gate(App(503, json.dumps({"error": {"message": message}}).encode(), headers=headers))
    start, _ = await call_whole(door, f"/a/{key_for()}/v1/{path}")
    assert start["status"] == 503 and sorted(start["headers"]) == headers


async def test_an_engines_failure_over_a_wrong_request_is_the_clients():
    def check(body):
        return body["stop"].get("x")  # a validator that trusts what it gets

    door = gate(
        App(500, b'{"error": {"message": "no attribute", "type": "InternalServerError"}}'), checks={"chat": check}
    )
    path = f"/a/{key_for()}/v1/chat/completions"
    status, answer = await call(door, path, b'{"stop": "text"}')
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "cannot be right" in answer["error"]["message"]
    assert not door.attempts["r", 1].failed
    assert (await call(door, path, b'{"stop": {}, "user": "\\ud800"}'))[0] == 400
    assert (await call(door, path, b'{"stop": {}}'))[0] == 500
    assert door.attempts["r", 1].failed


async def test_more_calls_than_max_calls():
    door, key = gate(App(), max_calls=2), key_for()
    statuses = [(await call(door, f"/a/{key}/v1/messages"))[0] for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    assert door.attempts["r", 1].over_max_calls
    assert (await call(door, f"/a/{key_for('other')}/v1/messages"))[0] == 200


# the end of an attempt


async def test_an_ended_attempt_is_refused_and_what_it_has_in_flight_cancelled():
    begun = asyncio.Event()

    async def forever():
        begun.set()
        await asyncio.Event().wait()

    door, key = gate(App(work=forever)), key_for()
    task = asyncio.create_task(call(door, f"/a/{key}/v1/messages"))
    await begun.wait()
    state = door.end_attempt("r", 1)
    assert state.tasks
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not state.tasks
    assert (await call(door, f"/a/{key}/v1/messages"))[0] == 401
    assert (await call(door, f"/a/{key}/v1/models", method="GET"))[0] == 401
    assert door.end_attempt("never", 1).requests == 0
    assert (await call(door, f"/a/{key_for('never')}/v1/messages"))[0] == 401


class Generation:
    ended = False

    def end(self):
        self.ended = True


async def test_what_still_runs_when_the_request_is_over_is_ended():
    generation = Generation()

    async def leave_running():
        current_call.get().running.add(generation)

    app = App(work=leave_running)
    await call(gate(app), f"/a/{key_for()}/v1/messages")
    assert generation.ended and app.contexts[0].over and current_call.get() is None


async def test_attempts_are_forgotten_after_their_keys_have_ended(monkeypatch):
    monkeypatch.setattr(gateway, "SWEEP_AT", 20)
    now = time.time()
    monkeypatch.setattr(gateway.time, "time", lambda: now)
    forgotten = []
    door = gate(App(), key_life_s=100, forget=forgotten.append)
    keys = []
    for place in range(500):
        keys.append(mint_key(SECRET, f"r{place}", 1, "train", now + 90))
        assert (await call(door, f"/a/{keys[-1]}/v1/messages"))[0] == 200
        door.end_attempt(f"r{place}", 1)
        door.end_attempt(f"unused{place}", 1)
        now += 1
        # Whatever has been forgotten: no key of an ended attempt lets in.
        for old in keys[max(0, place - 95) :]:
            assert (await call(door, f"/a/{old}/v1/messages"))[0] == 401
    assert len(door.attempts) <= 2 * 2 * 101
    assert len(forgotten) == 1000 - len(door.attempts) and not {*map(id, forgotten)} & {
        *map(id, door.attempts.values())
    }


async def test_no_websocket_comes_in():
    app, sent_back = App(), []

    async def send(message):
        sent_back.append(message["type"])

    await gate(app)({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert sent_back == ["websocket.close"] and not app.scopes


async def test_what_breaks_before_an_answer_was_not_served():
    class Breaks(App):
        async def __call__(self, scope, receive, send):
            raise RuntimeError("inside vLLM")

    door = gate(Breaks())
    with pytest.raises(RuntimeError):
        await call(door, f"/a/{key_for()}/v1/chat/completions")
    assert door.end_attempt("r", 1).failed


@pytest.mark.parametrize("wrapped", ["", "in a group", "as a cause"])
@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/messages"])
async def test_a_request_that_vllm_refuses_in_its_stream_is_the_clients_fault(path, wrapped):
    error = VLLMValidationError("Grammar error: Invalid type: zzz")

    class Refuses(App):
        async def __call__(self, scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            if wrapped == "as a cause":
                raise RuntimeError("the response already started") from error
            raise ExceptionGroup("", [error]) if wrapped else error

    door = gate(Refuses())
    start, answer = await call_whole(door, f"/a/{key_for()}/v1{path}")
    assert (
        start["status"] == 200 and b"Grammar error: Invalid type: zzz" in answer and b"invalid_request_error" in answer
    )
    assert (b"event: error" in answer) is (path == "/messages")
    assert not door.end_attempt("r", 1).failed


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1"])
async def test_a_body_is_utf8(encoding):
    app = App()
    status, told = await call(gate(app), f"/a/{key_for()}/v1/chat/completions", '{"model": "é"}'.encode(encoding))
    assert status == 400 and "the body is not JSON" in told["error"]["message"] and not app.requests


@pytest.mark.parametrize(
    ("depth", "status"), [(199, 200), (200, 400), (900, 400), (980, 400), (1000, 400), (5000, 400)]
)
async def test_json_too_deep_is_the_clients_fault(depth, status):
    """Before it is so deep that Python reads what it cannot write."""
    door, body = gate(App()), b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"
    assert (await call(door, f"/a/{key_for()}/v1/chat/completions", body))[0] == status
    assert not door.end_attempt("r", 1).failed
    flat = json.dumps({"messages": [[]] * 5000}).encode()
    assert (await call(door, f"/a/{key_for('other')}/v1/chat/completions", flat))[0] == 200


async def test_a_key_that_outlives_what_is_remembered_is_refused():
    door = gate(App(), key_life_s=100)
    assert (await call(door, f"/a/{key_for(life=90)}/v1/messages"))[0] == 200
    assert (await call(door, f"/a/{key_for(life=200)}/v1/messages"))[0] == 401


async def test_an_attempt_with_something_in_flight_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(gateway, "SWEEP_AT", 2)
    begun, go = asyncio.Event(), asyncio.Event()

    async def wait():
        begun.set()
        await go.wait()

    door = gate(App(work=wait))
    task = asyncio.create_task(call(door, f"/a/{key_for('slow', life=0.05)}/v1/messages"))
    await begun.wait()
    await asyncio.sleep(0.1)
    for place in range(10):
        door.end_attempt(str(place), 1)
    assert ("slow", 1) in door.attempts
    go.set()
    await task


# traces


@pytest.mark.parametrize("zipped", [False, True])
async def test_large_traces_are_read_beside_the_replicas_event_loop(monkeypatch, zipped):
    """While they are, the loop turns: their reading waits here for what only the loop does."""
    turned, read = threading.Event(), gateway.spans_of

    def once_the_loop_turned(body, content_type):
        assert turned.wait(60)
        return read(body, content_type)

    monkeypatch.setattr(gateway, "spans_of", once_the_loop_turned)
    spans = [{"name": f"s{n}", "attributes": [{"key": "x", "value": {"intValue": n}}] * 20} for n in range(500)]
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode()
    headers = {"content-type": "application/json"} | ({"content-encoding": "gzip"} if zipped else {})
    door = gate(App())
    asked = asyncio.create_task(
        call(door, f"/a/{key_for()}/v1/traces", gzip.compress(body) if zipped else body, headers)
    )
    await asyncio.sleep(0.05)
    assert not asked.done()
    turned.set()
    assert await asked == (200, {}) and len(door.end_attempt("r", 1).spans) == 500


async def test_zipped_traces_count_as_what_they_are(monkeypatch):
    monkeypatch.setattr(gateway, "MAX_BYTES", 4000)
    spans = [{"name": "s" * 1000} for _ in range(2)]
    body = gzip.compress(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode())
    door, headers = gate(App()), {"content-type": "application/json", "content-encoding": "gzip"}
    assert len(body) < 400
    assert [(await call(door, f"/a/{key_for()}/v1/traces", body, headers))[0] for _ in range(3)] == [200, 413, 413]
    assert len(door.end_attempt("r", 1).spans) == 2


# rewards by HTTP


def sent(answer):
    status, body = answer
    assert status == 400 and body["error"]["type"] == "invalid_request_error"
    return body["error"]["message"]


async def test_a_reward_by_http_is_kept_as_an_emitted_one():
    door, path, before = gate(App(), max_calls=0), f"/a/{key_for()}/v1/rewards", time.time()
    assert await call(door, path, b'{"value": true}') == (200, {})
    whole = {"value": 0.5, "name": "speed", "agent": "planner", "components": {"rows": 1, "order": 0.25}}
    assert (await call(door, f"/a/{key_for()}/agent/ignored/v1/rewards", json.dumps(whole).encode()))[0] == 200
    assert (await call(door, "/v1/rewards", b'{"value": 2, "call": 3}', {"authorization": f"Bearer {key_for()}"}))[
        0
    ] == 200
    state = door.end_attempt("r", 1)
    assert [reward.pop("time") >= before for reward in state.rewards] == [True] * 3
    first = {"value": 1.0, "name": "reward", "agent": "", "components": {}, "call_sequence": -1}
    assert (
        state.rewards == [first, whole | {"call_sequence": -1}, first | {"value": 2.0, "call_sequence": 3}]
        and state.spans == []
    )
    assert (await call(door, path, b'{"value": 1}'))[0] == 401 and len(state.rewards) == 3
    assert (await call(door, "/a/rg-x.y/v1/rewards", b'{"value": 1}'))[0] == 401
    assert (await call(door, f"/a/{key_for('other')}/v1/rewards", method="GET"))[0] == 405


async def test_what_vllm_raises_after_its_answer_goes_no_further():
    """As Starlette does with each of its 500s."""

    class Raises(App):
        async def __call__(self, scope, receive, send):
            await super().__call__(scope, receive, send)
            raise RuntimeError("already answered")

    door = gate(Raises(500, b'{"error": {"message": "went wrong"}}'))
    status, body = await call(door, f"/a/{key_for()}/v1/chat/completions")
    assert status == 500 and body["error"]["message"] == "went wrong"

    async def before():
        raise RuntimeError("not answered")

    with pytest.raises(RuntimeError, match="not answered"):
        await call(gate(App(work=before)), f"/a/{key_for()}/v1/chat/completions")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "not JSON"),
        ("[1]", 'a JSON object with a "value"'),
        ('{"reward": 1}', 'a JSON object with a "value"'),
        ('{"value": "0.5"}', "a reward is a number, not str '0.5'"),
        ('{"value": null}', "a reward is a number, not NoneType"),
        ('{"value": NaN}', "a reward is nan; it has to be finite"),
        ('{"value": 1e999}', "a reward is inf; it has to be finite"),
        ('{"value": -1e13}', "a reward is -1e+13; it has to be finite, and within +-1e+12"),
        ('{"value": 1%s}' % ("0" * 400), "a reward is inf; it has to be finite"),
        ('{"value": 1, "name": 3}', "name must be a text"),
        ('{"value": 1, "agent": null}', "agent must be a text"),
        ('{"value": 1, "components": [1]}', "components must be an object of numbers"),
        ('{"value": 1, "components": {"rows": "x"}}', "the component 'rows' is a number, not str 'x'"),
        ('{"value": 1, "agnet": "planner"}', "unknown: agnet; a reward has value, name, agent, components"),
    ],
)
async def test_what_is_no_reward_is_told(body, words):
    door = gate(App())
    message = sent(await call(door, f"/a/{key_for()}/v1/rewards", body.encode()))
    assert message.startswith("/v1/rewards: ") and words in message
    assert door.end_attempt("r", 1).rewards == []


@given(
    st.binary(max_size=40)
    | st.fixed_dictionaries(
        {"value": st.none() | st.booleans() | st.floats() | st.integers() | TEXT},
        optional={
            "name": TEXT,
            "agent": TEXT | st.none(),
            "components": st.dictionaries(TEXT, st.floats() | TEXT) | st.lists(st.integers()),
            "more": st.none(),
        },
    )
    .map(json.dumps)
    .map(str.encode)
)
def test_any_reward_is_answered(body):
    door = gate(App())
    status, _ = asyncio.run(call(door, f"/a/{key_for()}/v1/rewards", body))
    assert status in (200, 400) and len(door.end_attempt("r", 1).rewards) == (status == 200)


async def test_the_number_and_size_of_rewards_are_limited(monkeypatch):
    monkeypatch.setattr(gateway, "MOST_KEPT", 3)
    door, path = gate(App()), f"/a/{key_for()}/v1/rewards"
    statuses = [(await call(door, path, b'{"value": 1}'))[0] for _ in range(5)]
    assert statuses == [200, 200, 200, 413, 413]
    monkeypatch.setattr(gateway, "MAX_BYTES", 30)
    path = f"/a/{key_for('other')}/v1/rewards"
    assert [(await call(door, path, b'{"value": 1}'))[0] for _ in range(3)] == [200, 200, 413]
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 5)
    status, body = await call(door, f"/a/{key_for('third')}/v1/rewards", b'{"value": 1}')
    assert status == 413 and body["error"]["type"] == "request_too_large"
