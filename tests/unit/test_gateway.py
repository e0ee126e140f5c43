"""The gateway without an engine: keys, paths, what it passes on and what it remembers."""

import asyncio
import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygent.actors import gateway
from raygent.actors.gateway import APIS, MAX_MESSAGE, POLICY, Gateway, KeyRefused, current_call, mint_key, read_key

SECRET = "secret"
TEXT = st.text(max_size=40)
NAME = st.text(string.ascii_letters + string.digits + "-_.~ ü", min_size=1, max_size=20)


def key_for(rollout="r", attempt=1, mode="train", life=600.0):
    return mint_key(SECRET, rollout, attempt, mode, time.time() + life)


class App:
    """What stands behind the gateway: keeps what it was asked, answers what it is told to."""

    def __init__(self, status=200, body=b"{}", work=None):
        self.status, self.body, self.work = status, body, work
        self.scopes, self.requests, self.contexts = [], [], []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        self.contexts.append(current_call.get())
        if scope["method"] != "GET":
            self.requests.append(json.loads((await receive())["body"]))
        if self.work:
            await self.work()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for place in range(0, max(len(self.body), 1), 7):
            more = place + 7 < len(self.body)
            await send({"type": "http.response.body", "body": self.body[place : place + 7], "more_body": more})


async def call(door, path, body=b'{"model": "m"}', headers=None, method="POST"):
    """Status and body of the answer."""
    messages, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    fields = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": f"/app{path}", "root_path": "/app", "headers": fields}
    await door(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(answer) if answer else None


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


@given(st.text(max_size=60))
def test_any_path_is_answered(path):
    for whole in (path, f"/{path}", f"/a/{path}", f"/a/{key_for()}{path}", f"/a/{key_for()}/agent/{path}"):
        status, answer = asyncio.run(call(gate(App()), whole))
        if status != 200:
            assert status in (401, 404) and answer["error"]["message"]


@given(
    st.binary(max_size=60) | st.recursive(st.none() | st.integers() | TEXT, st.lists).map(json.dumps).map(str.encode)
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


async def test_a_name_that_utf8_does_not_know_is_mended():
    app = App()
    await call(gate(app), f"/a/{key_for()}/v1/responses", rb'{"model": "\ud800"}')
    assert app.contexts[0].agent == "?"


# what is passed on and refused


async def test_what_a_request_becomes():
    app = App()
    body = {"model": "gpt-5", "max_tokens": 9999, "max_output_tokens": None, "request_id": "mine", "n": 2}
    headers = {"x-request-id": "mine", "x-stainless-lang": "python", "content-length": "7"}
    await call(gate(app, max_tokens=50), f"/a/{key_for()}/v1/chat/completions", json.dumps(body).encode(), headers)
    assert app.requests == [{"model": POLICY, "max_tokens": 50, "max_output_tokens": None, "n": 2}]
    assert app.scopes[0]["headers"] == [(b"x-stainless-lang", b"python")]
    assert json.loads(app.contexts[0].request) == body


async def test_a_body_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 10)
    assert (await call(gate(App()), f"/a/{key_for()}/v1/messages", b"x" * 11))[0] == 413


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
    door = gate(App(), key_life_s=100)
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
