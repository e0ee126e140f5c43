"""An upstream through the app as a run starts it: stock clients, Serve's proxy, the real store."""

import json
import threading

import openai
import pytest
from conversations import config, rollout, tables
from vendor import CHAT, CHAT_STREAM, COUNTED, sse

from raygent.algorithms.batch import make_samples

SAY = [{"role": "user", "content": "say"}]
REPLY = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "big",
    "content": [{"type": "text", "text": "well said"}],
    "stop_reason": "end_turn",
    "usage": COUNTED,
}


@pytest.fixture
def judge(upstream):
    """The upstream, fresh."""
    upstream.requests.clear()
    upstream.answers = [(200, CHAT, {})]
    return upstream


def spent(engine):
    return sum(replica["upstreams"]["vendor"]["cost"] for replica in engine.status())


def test_a_judge_beside_the_policy(attempt, engine, judge):
    before, attempts, calls = spent(engine), [attempt(), attempt()], []
    for one in attempts:
        judge.answers = [(429, {}, {"retry-after": "0.1"}), (200, CHAT, {}), (200, CHAT_STREAM, {}), (200, REPLY, {})]
        client = one.openai
        client.chat.completions.create(model="writer", messages=SAY)
        said = client.chat.completions.create(model="judge", messages=SAY).choices[0].message.content
        chunks = list(client.chat.completions.create(model="judge", messages=SAY, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        message = one.anthropic.messages.create(model="judge", messages=SAY, max_tokens=9).content[0].text
        assert said == streamed == message == "well said"
        calls += one.calls()
    by = [(call["agent"], call["policy"], call["api"]) for call in calls[:4]]
    judged = ("judge", "upstream:vendor")
    assert by == [("writer", "policy", "chat"), (*judged, "chat"), (*judged, "chat"), (*judged, "messages")]
    assert [json.loads(call["response"])["usage"] for call in (calls[1], calls[3])] == [CHAT["usage"], COUNTED]
    assert calls[2]["response"].encode() == b"".join(CHAT_STREAM) and calls[0]["response"] == ""
    assert [call["cost"] for call in calls[:4]] == pytest.approx([0, 0.003, 0.003, 0.003])
    assert spent(engine) - before == pytest.approx(0.018)
    assert {request["body"]["model"] for request in judge.requests} == {"big"}
    assert judge.requests[0]["headers"]["authorization"] == "Bearer sk-of-the-vendor"
    last = judge.requests[-1]["headers"]  # wherever this version of Anthropic's client has it
    assert last["x-api-key"] == "sk-of-the-vendor" and "authorization" not in last
    batch = tables([rollout(one.id, "g", reward) for one, reward in zip(attempts, (1.0, 0.0), strict=True)], calls)
    samples, metrics = make_samples(batch, config())
    assert {sample.agent for sample in samples} == {"writer"} and metrics["upstream/vendor/calls"] == 6
    assert metrics["tokens_trained"] == sum(len(call["response_token_ids"]) for call in calls)


def test_a_judge_that_is_down(attempt, judge):
    judge.answers = [(500, {}, {})]
    one = attempt()
    with pytest.raises(openai.InternalServerError, match=r"upstream\.vendor: HTTP 500") as raised:
        one.openai.with_options(max_retries=3).chat.completions.create(model="judge", messages=SAY)
    assert raised.value.status_code == 503
    (closed,) = one.close().values()
    assert (
        closed["failed"] and closed["upstream_failed"].startswith("upstream.vendor: HTTP 500") and closed["calls"] == 0
    )
    assert judge.requests[-1]["time"] - judge.requests[0]["time"] < 4  # the client did not begin again


def test_a_stream_that_breaks_off_is_an_error_to_the_client(attempt, judge):
    judge.answers = [(200, [CHAT_STREAM[0], None], {})]
    one = attempt()
    with pytest.raises(openai.APIError, match="broke off"):
        list(one.openai.chat.completions.create(model="judge", messages=SAY, stream=True))
    (closed,) = one.close().values()
    assert closed["upstream_failed"] and closed["calls"] == 1


def test_an_error_in_a_stream_that_the_agent_brought_about(attempt, judge):
    error = {"error": {"type": "invalid_request_error", "code": "context_length_exceeded", "message": "too long"}}
    judge.answers = [(200, [CHAT_STREAM[0], *sse(error)], {})]
    one = attempt()
    with pytest.raises(openai.APIError, match="too long"):
        list(one.openai.chat.completions.create(model="judge", messages=SAY, stream=True))
    (closed,) = one.close().values()
    assert not closed["upstream_failed"] and not closed["failed"] and closed["calls"] == 1


def test_a_hang_up_in_mid_stream(attempt, judge):
    gone = threading.Event()
    judge.answers = [(200, [CHAT_STREAM[0], gone, *CHAT_STREAM[1:]], {})]
    one = attempt()
    stream = one.openai.chat.completions.create(model="judge", messages=SAY, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "well "
    stream.close()
    (call,) = one.calls()
    assert call["response"].encode() == CHAT_STREAM[0] and call["finish_reason"] == "abort"
    assert judge.at_once == 1  # it has more to say
    gone.set()


def test_the_attempts_end_in_mid_stream(attempt, judge):
    judge.answers = [(200, [CHAT_STREAM[0], 4.0, *CHAT_STREAM[1:]], {})]
    one = attempt()
    stream = iter(one.openai.chat.completions.create(model="judge", messages=SAY, stream=True))
    next(stream)
    (call,) = one.calls()
    assert call["response"].encode() == CHAT_STREAM[0] and call["policy"] == "upstream:vendor"
