"""Upstreams: the real gateway and proxy before a vendor's endpoint on this machine; the store alone is left out."""

import asyncio
import json
import logging
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from conversations import config
from vendor import CHAT, CHAT_STREAM, COUNTED, USAGE, serving, sse

from raygent.actors.agent_runner import Ended
from raygent.actors.capture import CallRecorder, NotRecorded
from raygent.actors.gateway import Gateway, mint_key
from raygent.actors.rollout_worker import EngineLost, UpstreamLost, check_engine
from raygent.actors.subprocess_agent import agent_environment
from raygent.actors.upstream import UpstreamProxy
from raygent.callables import ModelEndpoint
from raygent.cluster.parts import Parts
from raygent.cluster.spending import Spending
from raygent.cluster.transcripts import reply_of
from raygent.config import ConfigError
from raygent.records import CALLS, to_batch

SECRET = "secret"
KEY = "sk-of-the-vendor"
PRICES = {"price_input": 2.0, "price_output": 100.0}
COST = (1000 * 2 + 10 * 100) / 1e6  # of one call of vendor.USAGE
BUSY = {"error": {"message": "too many", "type": "rate_limit"}}
PATHS = {"chat": "/chat/completions", "completions": "/completions", "responses": "/responses", "messages": "/messages"}
REPLIES = {
    "chat": CHAT,
    "completions": {"choices": [{"index": 0, "text": "well said", "finish_reason": "stop"}], "usage": USAGE},
    "responses": {"object": "response", "status": "completed", "output": [], "usage": COUNTED},
    "messages": {"type": "message", "stop_reason": "end_turn", "content": [], "usage": COUNTED},
}
STREAMS = {
    "chat": CHAT_STREAM,
    "completions": sse({"choices": [{"text": "well"}]}, {"choices": [], "usage": USAGE}, "[DONE]"),
    "responses": sse(
        {"type": "response.created", "response": {"usage": None}},
        {"type": "response.output_text.delta", "delta": "well"},
        {"type": "response.completed", "response": {"usage": COUNTED}},
        named=True,
    ),
    "messages": sse(
        {"type": "message_start", "message": {"usage": {"input_tokens": 1000, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "well"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 10}},
        {"type": "message_stop"},
        named=True,
    ),
}


class Kept(CallRecorder):
    """Keeps what would go to the store."""

    def __init__(self):
        super().__init__(None)
        self.rows, self.broken = [], False

    async def append(self, calls):
        if self.broken:
            raise NotRecorded("the attempt is sealed")
        await super().append(calls)

    async def _send(self, calls):
        self.rows += to_batch(CALLS, calls).to_pylist()


@pytest.fixture
def vendor():
    with serving() as made:
        yield made


class Door:
    """A gateway before `vendor`, with one attempt's key."""

    def __init__(self, vendor, max_calls=100, replicas=1, key=KEY, **settings):
        upstream = {"agents": ["judge*"], "base_url": vendor.base_url, "model": "big", "timeout_s": 5.0} | settings
        self.config = config(upstream={"vendor": upstream})
        self.recorder = Kept()
        settings = self.config.upstream["vendor"]
        self.proxy = UpstreamProxy("vendor", settings, key, replicas, self.recorder, "replica")
        self.gateway = Gateway(
            self.engine, SECRET, max_calls, lambda: True, upstream_of=lambda agent: {"vendor": self.proxy}.get(self.config.upstream_of(agent))
        )  # fmt: skip
        self.key = mint_key(SECRET, "r", 1, "train", time.time() + 600)
        self.to_engine = 0

    async def engine(self, scope, receive, send):
        self.to_engine += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    @property
    def state(self):
        return self.gateway.attempts["r", 1]

    @property
    def rows(self):
        return self.recorder.rows

    async def call(self, api="chat", headers=None, agent="judge", hung_up=None, got=None, **body):
        """Status, the pieces of the body, and the headers. `got` sees each piece as it comes; `hung_up` is the client's."""
        sent, body = [], [json.dumps({"model": "mine"} | body).encode()]
        hung_up = hung_up or asyncio.Event()

        async def receive():
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if got and message["type"] == "http.response.body":
                got(message["body"])

        fields = {"authorization": f"Bearer {self.key}"} | (headers or {})
        scope = {
            "type": "http",
            "method": "POST",
            "path": f"/a/{self.key}/agent/{agent}/v1{PATHS[api]}",
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
        await self.gateway(scope, receive, send)
        assert hung_up.is_set() or not sent[-1].get("more_body")
        assert asyncio.current_task() not in self.state.tasks
        pieces = [message["body"] for message in sent[1:] if message["body"]]
        told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], pieces, told


async def test_a_busy_vendor_is_asked_again_when_it_says(vendor):
    vendor.answers = [
        (429, BUSY, {"retry-after": "1"}),
        (429, BUSY, {"retry-after": "0.3"}),
        (200, CHAT, {"x-request-id": "7"}),
    ]
    door = Door(vendor, **PRICES)
    status, pieces, told = await door.call(messages=[{"role": "user", "content": "judge it"}])
    assert (status, json.loads(b"".join(pieces))) == (200, CHAT)
    assert told == {"content-type": "application/json", "x-request-id": "7"}
    first, second, third = (request["time"] for request in vendor.requests)
    assert second - first >= 1 and 0.3 <= third - second < 1
    assert vendor.requests[-1]["body"] == {"model": "big", "messages": [{"role": "user", "content": "judge it"}]}
    assert vendor.requests[-1]["path"] == "/v1/chat/completions"
    assert vendor.requests[-1]["headers"]["authorization"] == f"Bearer {KEY}"
    (row,) = door.rows
    assert json.loads(row["response"]) == CHAT and json.loads(row["request"])["model"] == "mine"
    names = ("rollout_id", "attempt", "source", "source_sequence", "agent", "policy", "api", "finish_reason")
    assert [row[name] for name in names] == ["r", 1, "replica", 0, "judge", "upstream:vendor", "chat", "stop"]
    assert (row["trainable"], row["untrainable_why"]) == (False, "upstream")
    assert row["prompt_token_ids"] == row["response_token_ids"] == row["logprobs"] == row["policy_versions"] == []
    assert row["cost"] == pytest.approx(COST)
    assert door.proxy.status() == {"cost": row["cost"], "served": 1, "mistake": "", "budget": -row["cost"]}
    assert not door.state.failed and not door.state.upstream_failed and door.state.recorded == 1


async def test_other_agents_have_the_policy(vendor):
    door = Door(vendor)
    await door.call(agent="writer")
    assert door.to_engine == 1 and not vendor.requests


@pytest.mark.parametrize("api", PATHS)
async def test_each_api(vendor, api):
    vendor.answers = [(200, REPLIES[api], {})]
    door = Door(vendor, **PRICES)
    status, pieces, _ = await door.call(api)
    assert (status, json.loads(pieces[0])) == (200, REPLIES[api])
    assert vendor.requests[0]["path"] == f"/v1{PATHS[api]}"
    assert door.rows[0]["cost"] == pytest.approx(COST) and door.rows[0]["api"] == api


@pytest.mark.parametrize("api", PATHS)
async def test_a_stream_comes_as_it_is_made_and_is_recorded_before_its_last_event(vendor, api):
    """The vendor goes on only when the client has the event before; the last one comes with the record made."""
    events, seen, recorded = STREAMS[api], threading.Event(), []
    vendor.answers = [(200, [events[0], seen, *events[1:]], {})]
    door = Door(vendor, **PRICES)

    def got(_):
        seen.set()
        recorded.append(len(door.rows))

    status, pieces, told = await door.call(api, got=got, stream=True)
    usage_only = api in ("chat", "completions")  # asked for by the proxy, and not handed on
    assert status == 200 and pieces == [event for event in events if not (usage_only and b'"choices": []' in event)]
    assert told["content-type"].startswith("text/event-stream")
    assert vendor.requests[0]["body"].get("stream_options") == ({"include_usage": True} if usage_only else None)
    assert recorded == [0] * (len(pieces) - 1) + [1]
    (row,) = door.rows
    assert row["response"].encode() == b"".join(events) and row["cost"] == pytest.approx(COST)
    assert row["finish_reason"] == {"messages": "end_turn"}.get(api, "stop")


async def test_who_asks_for_the_usage_gets_it(vendor):
    vendor.answers = [(200, CHAT_STREAM, {})]
    door = Door(vendor, **PRICES)
    _, pieces, _ = await door.call(stream=True, stream_options={"include_usage": True})
    assert pieces == CHAT_STREAM


async def test_without_prices_nothing_is_asked_for(vendor):
    vendor.answers = [(200, CHAT_STREAM, {})]
    door = Door(vendor)
    _, pieces, _ = await door.call(stream=True)
    assert pieces == CHAT_STREAM and "stream_options" not in vendor.requests[0]["body"] and door.rows[0]["cost"] == 0


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\r\n", b"\r\r"])
@pytest.mark.parametrize("cut", [1, 3, 7, 50])
async def test_events_cut_anywhere(vendor, cut, end):
    whole = b"".join(CHAT_STREAM).replace(b"\n\n", end)
    vendor.answers = [(200, [whole[place : place + cut] for place in range(0, len(whole), cut)], {})]
    door = Door(vendor, **PRICES)
    _, pieces, _ = await door.call(stream=True)
    assert len(pieces) == 3 and door.rows[0]["response"].encode() == whole and door.rows[0]["cost"] > 0


async def test_a_reply_of_an_odd_shape_goes_to_the_agent(vendor):
    vendor.answers = [(200, {"choices": 5}, {})]
    door = Door(vendor)
    status, pieces, _ = await door.call()
    assert (status, json.loads(pieces[0])) == (200, {"choices": 5}) and len(door.rows) == 1


async def test_a_vendor_that_stays_down_is_infrastructure(vendor):
    vendor.answers = [(500, {"error": "down"}, {})]
    door = Door(vendor, timeout_s=2.0)
    status, pieces, told = await door.call()
    assert len(vendor.requests) >= 2
    assert (status, told["x-should-retry"]) == (503, "false")
    assert json.loads(pieces[0])["error"]["message"].startswith("upstream.vendor: HTTP 500")
    assert door.state.failed and door.state.upstream_failed.startswith("upstream.vendor: HTTP 500")
    assert not door.rows and door.state.recorded == 0


async def test_a_vendor_that_is_not_there(vendor):
    door = Door(vendor, base_url="http://127.0.0.1:1/v1", timeout_s=1.0)
    status, pieces, _ = await door.call("messages")
    told = json.loads(pieces[0])
    assert (status, told["type"], told["error"]["type"]) == (503, "error", "overloaded_error")
    assert "ConnectError" in door.state.upstream_failed


async def test_what_no_client_can_send_is_no_agents_doing(vendor):
    door = Door(vendor)
    door.proxy.settings = door.proxy.settings.model_copy(
        update={"base_url": "http://[::1/v1"}
    )  # as no config lets it be
    with pytest.raises(httpx.InvalidURL):
        await door.call()
    assert door.state.failed and "InvalidURL" in door.state.upstream_failed
    door = Door(vendor)
    assert (await door.call(headers={"accept": "é"}))[0] == 200
    assert not door.state.failed


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>busy</html>", {"content-type": "text/html"}),
        (200, b"", {}),
        (200, b'{"choices": [', {}),
        (200, {"error": {"code": 502, "message": "the provider failed"}}, {}),
        (425, {"error": {"message": "too early"}}, {}),
        (200, [], {"content-type": "text/event-stream"}),
        (429, {}, {"content-type": "text/plain; charset=rot13"}),
        (429, {}, {"retry-after": "Sun, 31 Dec 99999999999 00:00:00 GMT"}),
    ],
)
async def test_what_is_no_reply_is_asked_for_again(vendor, answer):
    vendor.answers = [answer, (200, CHAT, {})]
    door = Door(vendor)
    status, pieces, _ = await door.call()
    assert (status, json.loads(pieces[0])) == (200, CHAT) and len(vendor.requests) == 2
    assert not door.state.failed and [row["finish_reason"] for row in door.rows] == ["stop"]


@pytest.mark.parametrize("cut", [1, 2])
async def test_a_stream_that_ends_in_the_middle_is_no_reply(vendor, cut):
    """Without a finish reason; with one, some vendors leave out the [DONE]."""
    vendor.answers = [(200, CHAT_STREAM[:cut], {"content-type": "text/event-stream"})]
    door = Door(vendor)
    status, pieces, _ = await door.call(stream=True)
    assert status == 200 and door.rows[0]["finish_reason"] == ("error" if cut == 1 else "stop")
    assert bool(door.state.upstream_failed) is (cut == 1) and (b"in the middle" in b"".join(pieces)) is (cut == 1)


async def test_a_stream_that_is_only_kept_alive_breaks_off(vendor):
    alive: list = [CHAT_STREAM[0], *[0.2, b": still here\n\n"] * 15]
    vendor.answers = [(200, alive, {"content-type": "text/event-stream"})]
    door = Door(vendor, timeout_s=1.0)
    await door.call(stream=True)
    assert "no event for 1 s" in door.state.upstream_failed


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (402, {"error": {"message": "Insufficient Balance"}}),
        (405, b"no"),
        (
            400,
            {"error": {"type": "invalid_request_error", "message": "Your credit balance is too low to access the API"}},
        ),
        (400, b'[{"error": {"message": "API key not valid. Please pass a valid API key."}}]'),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
        (429, {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}}),
    ],
)
async def test_an_account_that_is_empty_is_no_agents_doing(vendor, status, told):
    vendor.answers = [(status, told, {})]
    door = Door(vendor)
    assert (await door.call())[0] == 503
    assert door.state.upstream_failed and door.proxy.mistake and len(vendor.requests) == 1


@pytest.mark.parametrize("count", [float("nan"), -1e9, float("inf"), 10**400, True, "many"])
async def test_an_odd_count_of_tokens_costs_nothing(vendor, count):
    vendor.answers = [(200, CHAT | {"usage": {"prompt_tokens": count, "completion_tokens": 10}}, {})]
    door = Door(vendor, **PRICES)
    assert (await door.call())[0] == 200
    assert door.proxy.cost == door.rows[0]["cost"] == pytest.approx(10 * PRICES["price_output"] / 1e6)


async def test_a_vendor_that_asks_for_more_time_than_there_is(vendor):
    vendor.answers = [(429, BUSY, {"retry-after": "3600"})]
    assert (await Door(vendor).call())[0] == 503
    assert len(vendor.requests) == 1


async def test_a_vendor_that_does_not_answer_in_time(vendor):
    vendor.answers = [lambda _: time.sleep(3) or (200, CHAT, {})]
    door = Door(vendor, timeout_s=0.5)
    assert (await door.call())[0] == 503
    assert "timeout_s" in door.state.upstream_failed or "ReadTimeout" in door.state.upstream_failed


@pytest.mark.parametrize("status", [401, 403, 404, 302])
async def test_a_mistake_of_the_config_is_told_once_and_not_tried_again(vendor, status, caplog):
    vendor.answers = [(status, {"error": {"message": "no such key"}}, {})]
    door = Door(vendor)
    with caplog.at_level(logging.WARNING, "raygent.engine"):
        assert [(await door.call())[0] for _ in range(3)] == [503] * 3
    assert len(vendor.requests) == 3 and door.state.upstream_failed
    told = [record.getMessage() for record in caplog.records if "upstream.vendor" in record.getMessage()]
    assert len(told) == 1 and f"HTTP {status}" in told[0] and "no such key" in told[0] and KEY not in told[0]
    assert f"HTTP {status}" in door.proxy.status()["mistake"]


async def test_what_the_agent_did_wrong_it_gets_as_it_is(vendor):
    wrong = {"error": {"message": "messages: missing", "type": "invalid_request_error"}}
    vendor.answers = [(400, wrong, {})]
    door = Door(vendor)
    status, pieces, _ = await door.call()
    assert (status, json.loads(pieces[0])) == (400, wrong) and len(vendor.requests) == 1
    assert not door.state.failed and not door.state.upstream_failed
    assert door.rows[0]["finish_reason"] == "error" and door.proxy.status()["served"] == 0


@pytest.mark.parametrize(
    ("api", "headers", "sent"),
    [
        ("messages", {"x-api-key": "KEY", "anthropic-version": "2023-06-01"}, {"x-api-key", "anthropic-version"}),
        ("messages", {"anthropic-version": "2023-06-01"}, {"x-api-key", "anthropic-version"}),
        ("chat", {"x-api-key": "KEY"}, {"authorization"}),
    ],
)
async def test_the_key_goes_as_the_api_has_it_whatever_the_client_does(vendor, api, headers, sent):
    door = Door(vendor)
    headers = {name: door.key if value == "KEY" else value for name, value in headers.items()}
    await door.call(api, headers=headers)
    got = vendor.requests[0]["headers"]
    assert {"authorization", "x-api-key", "anthropic-version"} & set(got) == sent
    assert got.get("x-api-key", KEY) == KEY and got.get("authorization", f"Bearer {KEY}") == f"Bearer {KEY}"
    assert door.key not in json.dumps(got)


async def test_messages_that_take_a_bearer_alone_get_one(vendor):
    ways = []

    def guard(_):
        headers = vendor.requests[-1]["headers"]
        ways.append([name for name in ("x-api-key", "authorization") if name in headers])
        return (200, REPLIES["messages"], {}) if ways[-1] == ["authorization"] else (401, {"error": "no bearer"}, {})

    vendor.answers = [guard]
    door = Door(vendor)
    assert [(await door.call("messages"))[0] for _ in range(2)] == [200, 200]
    assert ways == [["x-api-key"], ["authorization"], ["authorization"]]
    assert door.proxy.status()["mistake"] == "" and not door.state.upstream_failed


async def test_a_key_that_messages_refuse_either_way_is_a_mistake(vendor):
    vendor.answers = [(401, {"error": "no such key"}, {})]
    door = Door(vendor)
    assert [(await door.call("messages"))[0] for _ in range(2)] == [503, 503]
    assert len(vendor.requests) == 4 and "HTTP 401" in door.proxy.status()["mistake"]


async def test_a_vendor_without_keys(vendor):
    door = Door(vendor, key=None)
    await door.call(headers={"x-api-key": "mine"})
    assert not {"authorization", "x-api-key"} & set(vendor.requests[0]["headers"])


async def test_a_hang_up_records_what_came(vendor):
    vendor.answers = [(200, [CHAT_STREAM[0], 5.0, *CHAT_STREAM[1:]], {})]
    door, hung_up = Door(vendor), asyncio.Event()
    await door.call(hung_up=hung_up, got=lambda _: hung_up.set(), stream=True)
    while door.state.recording:
        await asyncio.sleep(0.01)
    (row,) = door.rows
    assert row["response"].encode() == CHAT_STREAM[0] and row["finish_reason"] == "abort"
    assert not door.state.upstream_failed and not door.state.upstream_waited and not door.state.tasks


async def test_a_client_gone_between_two_pieces_leaves_the_record_of_what_came(vendor):
    vendor.answers = [(200, CHAT_STREAM, {})]
    door, pieces = Door(vendor), []

    def gone(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise OSError("the client is gone")

    with pytest.raises(OSError, match="the client is gone"):
        await door.call(got=gone, stream=True)
    await asyncio.gather(*door.state.recording)
    (row,) = door.rows
    assert row["response"].encode() == b"".join(CHAT_STREAM[:2])
    assert len(door.rows) == door.state.recorded == 1 and not door.state.tasks


async def test_the_attempts_end_ends_its_calls(vendor):
    vendor.answers = [(200, [CHAT_STREAM[0], 5.0], {})]
    door, begun = Door(vendor), asyncio.Event()
    task = asyncio.create_task(door.call(got=lambda _: begun.set(), stream=True))
    await begun.wait()
    door.gateway.end_attempt("r", 1)
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.gather(*door.state.recording)
    assert len(door.rows) == door.state.recorded == 1


async def test_given_up_while_the_vendor_was_down(vendor):
    vendor.answers = [(503, {}, {})]
    door = Door(vendor, timeout_s=60.0)
    task = asyncio.create_task(door.call())
    while not vendor.requests:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    door.gateway.end_attempt("r", 1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "HTTP 503" in door.state.upstream_waited and not door.rows


@pytest.mark.parametrize("anthropic", [False, True])
async def test_a_stream_that_breaks_off(vendor, anthropic):
    vendor.answers = [(200, [CHAT_STREAM[0], None], {})]
    door = Door(vendor)
    status, pieces, _ = await door.call("messages" if anthropic else "chat", stream=True)
    assert status == 200 and pieces[0] == CHAT_STREAM[0] and b"overloaded_error" in pieces[1]
    assert pieces[1].startswith(b"event: error\n" if anthropic else b"data: ")
    assert "broke off" in door.state.upstream_failed and door.state.failed
    assert door.rows[0]["response"].encode() == CHAT_STREAM[0] and door.rows[0]["finish_reason"] == "error"


OURS = {
    "overloaded": {"type": "overloaded_error"},
    "rate limit": {"type": "rate_limit_error"},
    "server": {"type": "server_error", "code": None},
    "unknown": {"type": "odd_error"},
    "status": {"code": 502},
    "status of a rate": {"code": "429", "status": "RESOURCE_EXHAUSTED"},
    "key": {"type": "invalid_request_error", "code": "invalid_api_key"},
    "model": {"type": "invalid_request_error", "code": "model_not_found"},
}
AGENTS = {
    "request": {"type": "invalid_request_error"},
    "context": {"type": "invalid_request_error", "code": "context_length_exceeded"},
    "too large": {"type": "request_too_large"},
    "policy": {"type": None, "code": "content_filter"},
    "prompt": {"code": "invalid_prompt"},
    "status": {"type": "BadRequestError", "code": 400},
    "Google's": {"code": 400, "status": "INVALID_ARGUMENT"},
}


@pytest.mark.parametrize("shape", ["chat", "responses", "failed response", "messages"])
@pytest.mark.parametrize(
    ("error", "ours"),
    [
        *(pytest.param(error, True, id=f"ours: {name}") for name, error in OURS.items()),
        *(pytest.param(error, False, id=f"the agent's: {name}") for name, error in AGENTS.items()),
    ],
)
async def test_an_error_in_a_stream_counts_by_its_type(vendor, shape, error, ours):
    told = error | {"message": "no more"}
    event = {
        "chat": {"error": told},
        "responses": told | {"type": "error"},  # its code stands in the place of a type
        "failed response": {"type": "response.failed", "response": {"status": "failed", "error": told}},
        "messages": {"type": "error", "error": told},
    }[shape]
    if shape == "responses" and not error.get("code"):
        event["code"] = error["type"]
    events = [CHAT_STREAM[0], *sse(event, named=shape != "chat")]
    told_all = threading.Event()
    vendor.answers = [(200, [*events, told_all, b""], {})]
    door, recorded = Door(vendor), []
    api = "responses" if shape == "failed response" else shape
    status, pieces, _ = await door.call(api, got=lambda _: recorded.append(len(door.rows)), stream=True)
    assert status == 200 and pieces == events and recorded == [0, 1]
    assert vendor.at_once == 1  # its stream is open yet
    told_all.set()
    assert door.state.failed == ours and bool(door.state.upstream_failed) == ours
    assert not ours or "no more" in door.state.upstream_failed
    (row,) = door.rows
    assert row["finish_reason"] == "error" and row["response"].encode() == b"".join(events)
    assert door.proxy.status()["served"] == 0


async def test_a_call_that_the_store_does_not_take_is_no_reply(vendor):
    door = Door(vendor)
    door.recorder.broken = True
    assert (await door.call())[0] == 500 and door.state.failed
    vendor.answers = [(200, CHAT_STREAM, {})]
    _, pieces, _ = await door.call(stream=True)
    assert b"sealed" in pieces[-1] and b"[DONE]" not in b"".join(pieces)


async def test_its_calls_count_as_calls(vendor):
    door = Door(vendor, max_calls=2)
    assert [(await door.call())[0] for _ in range(3)] == [200, 200, 429]
    assert door.state.over_max_calls and len(vendor.requests) == 2


async def test_no_call_without_a_budget(vendor):
    door = Door(vendor, max_cost=9.0, **PRICES)
    door.proxy.budget = 1.5 * COST
    assert [(await door.call())[0] for _ in range(2)] == [200, 200]
    third = asyncio.create_task(door.call())
    await asyncio.sleep(0.3)
    assert len(vendor.requests) == 2 and door.proxy.status()["budget"] == pytest.approx(-0.5 * COST)
    door.proxy.budget += 0.6 * COST
    assert (await third)[0] == 200
    fourth = asyncio.create_task(door.call())
    await asyncio.sleep(0.3)
    door.gateway.end_attempt("r", 1)
    with pytest.raises(asyncio.CancelledError):
        await fourth
    assert "its turn" in door.state.upstream_waited and len(vendor.requests) == 3


async def test_replicas_that_the_driver_gives_budgets_spend_no_more_than_max_cost(vendor, tmp_path, monkeypatch):
    """Two replicas, of which one gets most calls and one is replaced, and a driver that looks now and then. Over max_cost go
    the calls on their way alone."""
    vendor.answers = [(200, [0.02, *CHAT_STREAM], {})]
    limits = {"max_cost": 40.5 * COST, "max_parallel": 4, "replicas": 2} | PRICES
    doors = {source: Door(vendor, **limits) for source in ("a", "b")}
    stored, calling = {}, []

    async def agent(source):
        while True:
            await doors[source].call(stream=True)
            stored[source] = sum(row["cost"] for row in doors[source].rows)

    def start(source, number):
        calling.extend(asyncio.create_task(agent(source)) for _ in range(number))

    def status():
        return [{"source": source, "upstreams": {"vendor": door.proxy.status()}} for source, door in doors.items()]

    def recall():
        for door in doors.values():
            door.proxy.budget = 0.0
        return status()

    def grant(budgets):
        for door in doors.values():
            door.proxy.budget += budgets["vendor"]

    made = doors["a"].config
    made.engine.replicas, made.run.directory = 2, str(tmp_path)
    parts = Parts(made, learn=False)
    parts.learners = None
    parts.engine = SimpleNamespace(status=status, recall_budgets=recall, grant_budgets=grant)
    parts.store = SimpleNamespace(costs=SimpleNamespace(remote=lambda: {"vendor": dict(stored)}))
    monkeypatch.setattr("raygent.cluster.parts.ray", SimpleNamespace(get=lambda value: value))
    parts.check_upstreams()
    start("a", 9)
    start("b", 1)
    with pytest.raises(ConfigError, match="max_cost"):
        for turn in range(200):
            await asyncio.sleep(0.1)
            parts.check_upstreams()
            if turn == 1:  # b is replaced: what it spent since the last look is in the store alone
                await asyncio.sleep(0.1)
                calling[-1].cancel()
                await asyncio.wait(calling[-1:])
                del doors["b"]
                doors["c"] = Door(vendor, **limits)
                start("c", 1)
    await asyncio.sleep(0.5)
    for task in calling:
        task.cancel()
    await asyncio.wait(calling)
    assert turn > 2 and 41 <= len(vendor.requests) <= 41 + 4


async def test_no_more_at_once_than_max_parallel(vendor):
    vendor.answers = [(200, [0.2, *CHAT_STREAM], {})]
    door = Door(vendor, max_parallel=6, replicas=2)
    assert {status for status, _, _ in await asyncio.gather(*(door.call(stream=True) for _ in range(9)))} == {200}
    assert vendor.most_at_once == 3


async def test_no_more_in_a_minute_than_requests_per_minute(vendor):
    door = Door(vendor, requests_per_minute=600.0, replicas=2)
    await asyncio.gather(*(door.call() for _ in range(6)))
    times = sorted(request["time"] for request in vendor.requests)
    assert times[-1] - times[0] >= 5 * 0.2 - 0.1


async def test_a_reply_without_usage_is_told_of(vendor, caplog):
    vendor.answers = [(200, CHAT | {"usage": None}, {})]
    door = Door(vendor, **PRICES)
    for _ in range(2):
        await door.call()
    assert sum("no usage" in record.getMessage() for record in caplog.records) == 1


def test_anthropics_cache_is_paid_for(vendor):
    from raygent.actors.upstream import cost_of

    prices = Door(vendor, **PRICES).proxy.settings
    usage = {
        "input_tokens": 400,
        "cache_read_input_tokens": 500,
        "cache_creation_input_tokens": 100,
        "output_tokens": 10,
    }
    assert cost_of(usage, prices) == pytest.approx(COST)


# what the worker, the driver and the user make of it


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (json.dumps(CHAT), "well said"),
        (b"".join(CHAT_STREAM).decode(), "well said"),
        (b"".join(STREAMS["messages"]).decode(), "well"),
        ('{"output": [{"type": "message", "content": [{"text": "a"}, {"text": "b"}]}]}', "a b"),
        ('{"error": "no"}', '{"error": "no"}'),
        ("no JSON", "no JSON"),
    ],
)
def test_what_try_shows_of_a_reply(body, said):
    assert reply_of(body) == said


def closed_by(**told):
    """What a replica tells of an attempt of one call."""
    return {"calls": 1, "failed": False, "died": "", "upstream_failed": "", "upstream_waited": ""} | told


@pytest.mark.parametrize(
    ("how", "failed", "waited", "lost"),
    [
        ("returned", "", "", False),
        ("returned", "down", "", True),  # got over, but the judge said nothing
        ("raised", "down", "", True),
        ("timeout", "", "its turn", True),
        ("raised", "", "its turn", True),
        ("returned", "", "its turn", False),
        ("raised", "", "", False),
    ],
)
def test_an_attempt_that_an_upstream_failed(how, failed, waited, lost):
    closed = {"e": closed_by(failed=bool(failed), upstream_failed=failed, upstream_waited=waited)}
    ended = Ended(how, error="" if how == "returned" else "why", exception=None)
    endpoint = ModelEndpoint("http://e/v1", "key")
    if not lost:
        return check_engine(ended, "e", closed, endpoint)
    with pytest.raises(UpstreamLost, match=failed or waited):
        check_engine(ended, "e", closed, endpoint)


@pytest.mark.parametrize("how", ["returned", "raised"])
def test_an_attempt_whose_vllm_died_is_the_engines_whatever_the_agent_made_of_it(how):
    closed = {"e": closed_by(), "other": closed_by(died="why")}
    ended, endpoint = Ended(how, error="" if how == "returned" else "why"), ModelEndpoint("http://e/v1", "key")
    check_engine(ended, "e", closed, endpoint)  # that of another replica is none of its business
    with pytest.raises(EngineLost, match="vLLM died in engine replica other"):
        check_engine(ended, "other", closed, endpoint)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (openai.APITimeoutError(httpx.Request("POST", "http://e/v1/chat/completions")), True),
        (openai.APITimeoutError(httpx.Request("POST", "http://other/v1/chat/completions")), False),
        (TimeoutError(), True),  # of asyncio.wait_for
        (LookupError("no table"), False),
    ],
)
def test_an_agent_that_raises_since_a_call_took_too_long_while_it_waited_for_an_upstream(error, lost):
    closed = {"e": closed_by(upstream_waited="its turn")}
    try:
        raise RuntimeError("no judgement") from error
    except RuntimeError as raised:
        ended = Ended("raised", error="why", exception=raised)
    endpoint = ModelEndpoint("http://e/v1", "key")
    if not lost:
        return check_engine(ended, "e", closed, endpoint)
    with pytest.raises(UpstreamLost, match="its turn"):
        check_engine(ended, "e", closed, endpoint)


def replica(source, cost=0.0, served=0, mistake="", budget=0.0):
    told = {"cost": cost, "served": served, "mistake": mistake, "budget": budget}
    return {"source": source, "upstreams": {"vendor": told}}


@pytest.fixture
def limited(tmp_path):
    upstream = {"agents": ["judge"], "base_url": "http://h/v1", "model": "big", "max_cost": 1.0} | PRICES
    made = config(run={"directory": str(tmp_path)}, upstream={"vendor": upstream})
    made.run_directory.mkdir()
    return made


def test_a_run_ends_at_max_cost_over_replicas_and_restarts(limited):
    spending = Spending(limited)
    spending.note([replica("a", 0.3, 1), replica("b", 0.3, 1)])
    spending.check()
    spending.note([replica("a", 0.35, 1), replica("c", 0.0)])  # c replaced b
    assert spending.spent("vendor") == pytest.approx(0.65)
    again = Spending(limited)
    again.note([replica("d", 0.3, 1)])
    again.check()
    again.note([replica("d", 0.36, 1)])
    with pytest.raises(
        ConfigError, match=r"upstream\.vendor\.max_cost: the run has spent 1\.01 of 1 dollars; raise it"
    ):
        again.check()
    with pytest.raises(ConfigError, match="max_cost"):
        Spending(limited).check()
    limited.upstream["vendor"].max_cost = 2.0
    Spending(limited).check()


def test_what_was_spent_after_the_last_look_is_in_the_store(limited):
    """The driver was killed: its file knows 0.3 of 0.5. Then a replica was, between two looks."""
    Spending(limited).note([replica("a", 0.3, 1)])
    spending = Spending(limited)
    spending.begin({"vendor": {"a": 0.3, "b": 0.2}})
    assert spending.spent("vendor") == pytest.approx(0.5)
    spending.note([replica("c", 0.1, 1), replica("d", 0.1, 1)])
    recorded = {"vendor": {"a": 0.3, "b": 0.2, "c": 0.25, "d": 0.05}}  # of d one is on its way
    spending.note([replica("d", 0.1, 1), replica("e")], recorded)
    assert spending.spent("vendor") == pytest.approx(0.5 + 0.25 + 0.1)
    assert json.loads(spending.file.read_text())["vendor"] == pytest.approx(0.85)
    again = Spending(limited)
    again.begin({"vendor": {"a": 0.3}})  # of a store that lacks what the file tells
    assert again.spent("vendor") == pytest.approx(0.85)
    again.begin({"vendor": {"a": 0.3, "b": 0.8}})
    with pytest.raises(ConfigError, match=r"max_cost: the run has spent 1\.1 of 1"):
        again.check()


def test_what_is_left_is_dealt_out_anew_where_a_replica_has_nothing(limited):
    limited.engine.replicas = 2
    spending = Spending(limited)
    assert spending.short([replica("a"), replica("b")]) and spending.budgets() == {"vendor": 0.5}
    spending.note([replica("a", 0.4, 1, budget=0.1), replica("b", 0.1, 1, budget=0.4)])
    assert not spending.short([replica("a", budget=0.1), replica("b", budget=0.4)])
    spending.note([replica("a", 0.52, 1, budget=-0.02), replica("b", 0.18, 1, budget=0.3)])
    assert spending.short([replica("a", budget=-0.02), replica("b", budget=0.3)])
    assert spending.budgets() == {"vendor": pytest.approx(0.15)}
    limited.upstream["vendor"].max_cost = 0.0
    assert not spending.short([replica("a")]) and spending.budgets() == {}


def test_a_run_ends_where_an_upstream_never_took_a_call(limited, caplog):
    spending = Spending(limited)
    spending.note([replica("a", mistake="HTTP 401 from http://h: no")])
    with pytest.raises(ConfigError, match=r"upstream\.vendor: HTTP 401.*api_key_env"):
        spending.check()
    spending.note([replica("a", mistake="HTTP 403 from http://h: no"), replica("b", served=1)])
    spending.check()
    spending.check()
    assert len(caplog.records) == 1


def test_an_agents_process_does_not_see_the_key(limited, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    limited.upstream["vendor"].api_key_env = "JUDGE_KEY"
    assert limited.upstream_keys() == {"vendor": KEY}
    seen = agent_environment(limited, "task", ModelEndpoint("http://e/v1", "key"), "events")
    assert "JUDGE_KEY" not in seen and KEY not in json.dumps(seen) and KEY not in limited.to_toml()
