"""What the store has of a call is what the client got of it, by each API, and who is let in."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx
import openai
import pytest
import ray
from attempts import MAX_CALLS, PARAMETERS, REPLIES, SECRET, TEMPERATURE, TOOLS
from clients import ASK, Reply, ask_chat, ask_messages, recorded_reply
from transformers import AutoTokenizer

from raygent.actors.gateway import mint_key
from raygent.records import Seal


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def read(tokenizer):
    """read(call, tools): the Reply that vLLM's own detokenizer and tool parser make of what was recorded."""
    from vllm.parser import ParserManager

    parser = ParserManager.get_parser("hermes", None, True)
    return lambda call, tools=None: recorded_reply(call, tokenizer, parser if tools else None, tools)


def check(call, engine, agent="agent"):
    """What holds of every record."""
    sampled = len(call["response_token_ids"])
    assert sampled > 0
    assert len(call["logprobs"]) == sampled
    assert all(-100 < value <= 0 for value in call["logprobs"])
    assert call["policy_versions"] == [engine.status()[0]["version"]] * sampled
    assert call["agent"] == agent
    assert call["started"] < call["finished"]


def closed(one):
    """End the attempt: what the one replica knows of it."""
    (of_replica,) = one.close().values()
    return of_replica


CASES = [(api, stream, tools) for api in ASK for stream in (False, True) for tools in (False, True)]


@pytest.mark.parametrize(
    ("api", "stream", "tools"), [case for case in CASES if case[0] != "completions" or not case[2]]
)
def test_recorded_is_what_the_client_received(attempt, engine, read, tokenizer, api, stream, tools):
    one, offered = attempt(), TOOLS if tools else None
    # What it was not taught it answers with fragments of anything, of which vLLM's parsers make one thing or another.
    prompts = ("both", "say", "call") if tools else ("say",) if api == "messages" else ("say", "something else")
    replies = [ASK[api](one, prompt, stream, offered)[0] for prompt in prompts]
    calls = one.calls()
    assert [call["api"] for call in calls] == [api] * len(prompts)
    assert [read(call, offered) for call in calls] == replies
    for call, prompt in zip(calls, prompts, strict=True):
        check(call, engine)
        assert call["trainable"] and call["untrainable_why"] == ""
        if api == "completions":
            assert call["prompt_token_ids"] == tokenizer(prompt)["input_ids"]
        else:
            messages = [{"role": "user", "content": prompt}]
            rendered = tokenizer.apply_chat_template(
                messages, tools=offered, add_generation_prompt=True, return_dict=False
            )
            assert call["prompt_token_ids"] == rendered


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_two_choices_of_one_request(attempt, engine, read, stream, tools):
    one, offered = attempt(), TOOLS if tools else None
    replies = ask_chat(one, "both", stream, offered, n=2)
    calls = one.calls()
    assert [call["choice"] for call in calls] == [0, 1]
    assert len({call["request_id"] for call in calls}) == 1
    assert [read(call, offered) for call in calls] == replies
    for call in calls:
        check(call, engine)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_real_tool_calls_reach_the_client(attempt, api, stream):
    """The model was taught them: greedy, under the agent's own parameters, it makes them."""
    one = attempt("eval")
    (said,) = ASK[api](one, "say", stream, temperature=0)
    (called,) = ASK[api](one, "both", stream, TOOLS, temperature=0)
    assert said == Reply(REPLIES["say"], [], "stop")
    assert called == Reply("First.\n", [("add", {"a": 3, "b": 4}), ("add", {"a": 5, "b": 6})], "tool_calls")
    assert [call["temperature"] for call in one.calls()] == [0, 0]


def test_a_conversation_goes_on_with_previous_response_id(attempt, tokenizer):
    one = attempt("eval")
    first = one.openai.responses.create(model="policy", input="say", temperature=0)
    *_, done = one.openai.responses.create(model="policy", input="call", previous_response_id=first.id, stream=True)
    one.openai.responses.create(model="policy", input="say", previous_response_id=done.response.id)
    calls = one.calls()
    assert tokenizer.decode(calls[2]["prompt_token_ids"]).count("<|im_start|>user") == 3
    assert calls[1]["prompt_token_ids"][: len(calls[0]["prompt_token_ids"])] == calls[0]["prompt_token_ids"]


def test_several_prompts_in_one_request_are_a_call_each(attempt, read):
    one = attempt()
    reply = one.openai.completions.create(model="policy", prompt=["ab", "cd", "ef"], max_tokens=5)
    calls = sorted(one.calls(), key=lambda call: call["prompt_token_ids"])
    assert len({call["request_id"] for call in calls}) == 3
    assert sorted(choice.text for choice in reply.choices) == sorted(read(call).content for call in calls)


def test_the_request_is_recorded_as_the_client_sent_it(attempt):
    one = attempt()
    body = {"model": "gpt-5", "messages": [{"role": "user", "content": "say"}], "max_tokens": 3, "name": "ü"}
    assert httpx.post(f"{one.base_url}/v1/chat/completions", json=body).status_code == 200
    (call,) = one.calls()
    assert json.loads(call["request"]) == body


# hang-ups


def sampled_when_over(one, engine):
    """The attempt's calls, once the engine runs nothing any more; it must stop well before the 1,000 tokens asked for."""
    deadline = time.monotonic() + 10
    while engine.status()[0]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return one.calls()


LONG = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}


def test_hang_up_in_the_middle_of_a_stream(attempt, engine, read):
    one = attempt()
    stream = one.openai.chat.completions.create(
        model="policy", messages=[{"role": "user", "content": "say"}], stream=True, **LONG
    )
    received = ""
    for chunk in stream:
        received += chunk.choices[0].delta.content or ""
        if len(received) > 30:
            break
    stream.response.close()
    (call,) = sampled_when_over(one, engine)
    check(call, engine)
    assert call["finish_reason"] == "abort"
    assert 30 < len(call["response_token_ids"]) < 1000
    assert read(call).content.startswith(received)


@pytest.mark.parametrize("n", [1, 2])
def test_hang_up_before_a_reply(attempt, engine, n):
    one = attempt()
    with pytest.raises(openai.APITimeoutError):
        one.openai.with_options(timeout=0.5).chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "say"}], n=n, **LONG
        )
    calls = sampled_when_over(one, engine)
    assert [call["choice"] for call in calls] == list(range(n))
    for call in calls:
        check(call, engine)
        assert call["finish_reason"] == "abort"
        assert len(call["response_token_ids"]) < 1000


def test_the_end_of_an_attempt_stops_what_it_has_in_flight(attempt, engine):
    one, other = attempt(), attempt()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_chat, one, "say", **LONG)
        while not engine.status()[0]["running"]:
            time.sleep(0.02)
        (call,) = one.calls()
        assert isinstance(asked.exception(10), openai.APIError)
    assert call["finish_reason"] == "abort" and len(call["response_token_ids"]) < 1000
    assert ask_chat(other, "say")[0].finish
    other.calls()


# agents and sampling


def test_a_greedy_attempt_takes_the_likeliest_tokens_whatever_is_asked_for(attempt):
    asked = {"messages": [{"role": "user", "content": "say"}], "max_tokens": 8, "temperature": 1.5, "top_p": 0.5}
    one = attempt("greedy")
    for seed in range(3):
        one.openai.chat.completions.create(model="policy", **asked, seed=seed, extra_body={"ignore_eos": True})
    calls = one.calls()
    assert {call["temperature"] for call in calls} == {0.0}
    assert len({tuple(call["response_token_ids"]) for call in calls}) == 1


def test_agents_are_told_apart_by_path_header_and_model_name(attempt):
    one = attempt()
    asked = {"messages": [{"role": "user", "content": "say"}], "max_tokens": 3}
    by_path = openai.OpenAI(base_url=f"{one.base_url}/agent/planner/v1", api_key="-", max_retries=0)
    by_path.chat.completions.create(model="gpt-5", **asked)
    by_path.chat.completions.create(model="gpt-5", **asked, extra_headers={"x-raygent-agent": "ignored"})
    anthropic.Anthropic(base_url=f"{one.base_url}/agent/critic", api_key="-").messages.create(model="claude", **asked)
    one.openai.chat.completions.create(model="gpt-5", **asked, extra_headers={"x-raygent-agent": "solver"})
    one.openai.chat.completions.create(model="gpt-5-mini", **asked)
    one.openai.chat.completions.create(model="policy", **asked)
    by_key = openai.OpenAI(base_url=f"{one.engine.base_url}/v1", api_key=one.key, max_retries=0)
    by_key.chat.completions.create(model="policy", **asked, extra_headers={"x-raygent-agent": "keyed"})
    expected = ["planner", "planner", "critic", "solver", "gpt-5-mini", "agent", "keyed"]
    assert [call["agent"] for call in one.calls()] == expected


def test_a_reward_by_http_comes_with_the_attempts_end(attempt):
    one = attempt()
    url = f"{one.base_url}/v1/rewards"
    assert httpx.post(url, json={"value": 0.5, "agent": "planner"}).status_code == 200
    with pytest.raises(openai.BadRequestError, match="a reward is a number, not str 'high'"):
        one.openai.post("/rewards", body={"value": "high"}, cast_to=object)
    (closed,) = one.close().values()
    assert [(reward["value"], reward["agent"]) for reward in closed["rewards"]] == [(0.5, "planner")]
    assert httpx.post(url, json={"value": 1}).status_code == 401


FRAMEWORKS_OWN = {
    "temperature": 0.2,
    "top_p": 0.5,
    "seed": 3,
    "max_tokens": 4,
    "extra_body": {"top_k": 2, "min_p": 0.1},
}


def test_train_mode_samples_from_the_plain_policy(attempt):
    one = attempt()
    ask_chat(one, "say", **FRAMEWORKS_OWN)
    (call,) = one.calls()
    plain = {"n": 1, "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}
    assert json.loads(call["sampling"]).items() >= plain.items()
    assert call["temperature"] == pytest.approx(TEMPERATURE) and call["trainable"]


def test_eval_mode_samples_as_the_agent_asks(attempt):
    one = attempt("eval")
    ask_chat(one, "say", **FRAMEWORKS_OWN)
    (call,) = one.calls()
    own = {"temperature": 0.2, "top_p": 0.5, "top_k": 2, "min_p": 0.1, "seed": 3, "max_tokens": 4}
    assert json.loads(call["sampling"]).items() >= own.items()


def test_max_tokens_has_the_configs_bound(attempt):
    one = attempt("eval")
    ask_chat(one, "say", temperature=0)
    ask_chat(one, "say", temperature=0, max_tokens=100_000)
    ask_messages(one, "say", temperature=0, max_tokens=20_000)
    assert [json.loads(call["sampling"])["max_tokens"] for call in one.calls()] == [1000] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(attempt, read, stream):
    one = attempt("eval")
    (reply,) = ask_chat(one, "say", stream, stop=["all", "nothing"], temperature=0)
    (call,) = one.calls()
    assert reply == Reply("Grüße, 你好 🙂 ", [], "stop") == read(call)


NAMED = {"type": "function", "function": {"name": "add"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "sum", "schema": PARAMETERS}}


@pytest.mark.parametrize(
    ("why", "asked"),
    [
        ("structured_outputs", {"tools": TOOLS, "tool_choice": "required"}),
        ("structured_outputs", {"tools": TOOLS, "tool_choice": NAMED}),
        ("structured_outputs", {"response_format": SCHEMA}),
        ("presence_penalty", {"presence_penalty": 0.5}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("repetition_penalty", {"extra_body": {"repetition_penalty": 1.3}}),
        ("logit_bias", {"logit_bias": {"70": 5}}),
        ("min_tokens", {"extra_body": {"min_tokens": 5}}),
        ("allowed_token_ids", {"extra_body": {"allowed_token_ids": [70, 71, 2]}}),
        ("bad_words", {"extra_body": {"bad_words": ["a"]}}),
        ("presence_penalty, min_tokens", {"presence_penalty": 0.5, "extra_body": {"min_tokens": 5}}),
    ],
)
def test_what_is_not_sampled_from_the_plain_policy_is_not_trained(attempt, why, asked):
    one = attempt()
    ask_chat(one, "both", max_tokens=60, **{"tools": None} | asked)
    (call,) = one.calls()
    assert (call["trainable"], call["untrainable_why"]) == (False, why)
    assert len(call["logprobs"]) == len(call["response_token_ids"])


def test_a_required_tool_call_is_one(attempt, read):
    one = attempt()
    for choice in ("required", NAMED):
        (reply,) = ask_chat(one, "call", tools=TOOLS, tool_choice=choice, max_tokens=200)
        assert reply.tools and reply.tools[0][0] == "add"
    one.calls()


def test_logprobs_of_a_prompt_alone_are_not_trained(attempt):
    one = attempt()
    one.openai.completions.create(model="policy", prompt="hello", max_tokens=0, echo=True, logprobs=1)
    (call,) = one.calls()
    assert call["untrainable_why"] == "prompt_logprobs_only"


# who is let in, and what is refused


def test_a_context_overflow_is_the_vendors_400_and_counted(attempt):
    long = "x" * 3000
    for api, ask in ASK.items():
        for stream in (False, True):
            one = attempt()
            with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as refused:
                ask(one, long, stream)
            error = refused.value.response.json()["error"]
            assert error["type"] == "invalid_request_error"
            if api == "messages":
                assert refused.value.response.json()["type"] == "error"
                assert error["message"].startswith("prompt is too long")
            else:
                assert error["code"] == refused.value.code == "context_length_exceeded"
                assert "maximum context length is 2048 tokens" in error["message"]
            assert closed(one)["overflow"]
            assert one.calls() == []
    assert not closed(attempt())["overflow"]


def test_more_tokens_at_least_than_the_config_allows_leave_the_engine_whole(attempt):
    made = attempt()
    for asked in ({"min_tokens": 1500}, {"min_tokens": 1}):
        reply = made.openai.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "hi"}], timeout=120, extra_body=asked
        )
        assert reply.usage.completion_tokens <= 1000
    assert len(made.calls()) == 2


def test_what_vllm_refuses_within_a_stream_is_the_clients_doing(attempt):
    made = attempt()
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "zzz"}}
    with pytest.raises(openai.APIError, match="zzz"):
        list(made.openai.responses.create(model="policy", input="hi", stream=True, text={"format": schema}))
    made.openai.responses.create(model="policy", input="hi", max_output_tokens=2)
    assert not any(closed["failed"] for closed in made.close().values())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_grammar_that_leaves_no_token_is_the_clients_doing(attempt, stream):
    made = attempt()
    asked = {"model": "policy", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    impossible = {"allowed_token_ids": [1], "structured_outputs": {"choice": ["a"]}}
    with pytest.raises(openai.APIError, match="no token that could follow") as error:
        list(made.openai.chat.completions.create(**asked, extra_body=impossible))
    assert stream or error.value.status_code == 400
    list(made.openai.chat.completions.create(**asked, max_tokens=2))
    stuck, _ = made.calls()
    assert stuck["finish_reason"] == "error" and not stuck["trainable"]
    assert not any(closed["failed"] for closed in made.close().values())


def test_another_400_is_no_overflow(attempt):
    one = attempt()
    with pytest.raises(openai.BadRequestError) as refused:
        ask_chat(one, "say", presence_penalty=7)
    assert "presence_penalty" in str(refused.value)
    assert not closed(one)["overflow"]


def test_more_calls_than_max_calls_are_refused(attempt):
    one = attempt()
    for _ in range(MAX_CALLS):
        ask_chat(one, "say", max_tokens=1)
    assert one.openai.models.list().data[0].id == "policy"  # no call
    with pytest.raises(openai.RateLimitError) as refused:
        ask_chat(one, "say", max_tokens=1)
    assert refused.value.code == "raygent_max_calls"
    assert refused.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(anthropic.RateLimitError):
        ask_messages(one, "say")
    assert closed(one)["over_max_calls"]
    assert len(one.calls()) == MAX_CALLS


def test_only_the_key_of_an_open_attempt_lets_in(attempt):
    one, over = attempt(), attempt()
    over.calls()
    forged = one.key[:-6] + ("A" if one.key[-6] != "A" else "B") + one.key[-5:]
    foreign = mint_key("another run's", one.id, 1, "train", time.time() + 600)
    expired = mint_key(SECRET, one.id, 1, "train", time.time() - 1)
    too_long = mint_key(SECRET, one.id, 1, "train", time.time() + 30 * 86_400)
    for key in (forged, foreign, expired, too_long, over.key, "none"):
        for url in (f"{one.engine.base_url}/a/{key}", one.engine.base_url):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).models.list()
            with pytest.raises(anthropic.AuthenticationError) as refused:
                anthropic.Anthropic(base_url=url, api_key=key, max_retries=0).messages.create(
                    model="policy", max_tokens=1, messages=[{"role": "user", "content": "say"}]
                )
            assert refused.value.response.json()["type"] == "error"
    assert httpx.get(f"{one.engine.base_url}/v1/models").status_code == 401
    assert ask_chat(one, "say")[0].finish
    one.calls()


def test_what_would_not_be_recorded_right_is_refused(attempt):
    one = attempt()
    url, message = f"{one.base_url}/v1", {"messages": [{"role": "user", "content": "say"}]}
    beam = httpx.post(f"{url}/chat/completions", json=message | {"use_beam_search": True, "n": 2})
    background = httpx.post(f"{url}/responses", json={"input": "say", "background": True})
    assert (beam.status_code, background.status_code) == (400, 400)
    assert "beam search" in beam.json()["error"]["message"]
    assert httpx.post(f"{url}/embeddings", json={"input": "say"}).status_code == 404
    assert httpx.post(f"{url}/chat/completions", content=b"{").status_code == 400
    assert httpx.post(f"{url}/chat/completions", content=b"[]").status_code == 400
    assert one.calls() == []


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": []},
        {
            "type": "message", "role": "assistant", "id": "m", "status": "completed",
            "content": [{"type": "refusal", "refusal": "no"}],
        },
        {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "local_shell_call_output", "id": "l", "output": "o"},
    ],
)  # fmt: skip
def test_an_item_of_responses_that_vllm_makes_no_message_of_is_the_clients_400(attempt, item):
    one = attempt()
    asked = {"input": [{"role": "user", "content": "say"}, item], "max_output_tokens": 4}
    answer = httpx.post(f"{one.base_url}/v1/responses", json=asked)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert not any(of["failed"] for of in one.close().values())


def test_calls_under_one_request_id_of_the_clients_are_kept_apart(attempt, read):
    one = attempt()
    same = {"extra_headers": {"x-request-id": "same"}, "extra_body": {"request_id": "same"}, "max_tokens": 40}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask_chat, one, "something else", **same) for _ in range(4)]
        replies = [reply.result()[0] for reply in asked]
    calls = one.calls()
    assert len({call["request_id"] for call in calls}) == 4
    assert sorted(read(call).content for call in calls) == sorted(reply.content for reply in replies)


def test_a_call_that_the_store_refuses_is_a_500_and_harms_no_other(attempt, engine, store):
    """Sealed behind the engine's back: the client must not have a reply that is not kept."""
    sealed, others = attempt(), [attempt() for _ in range(6)]
    ray.get(store.seal.remote(Seal(sealed.id, 1, "worker", "succeeded", 0.0, {})))
    failures = []

    def ask_sealed():
        for stream in (False, True):
            try:
                ask_chat(sealed, "say", stream)
            except openai.APIError as error:
                failures.append(error)

    with ThreadPoolExecutor(13) as pool:
        pool.submit(ask_sealed)
        for other in others * 2:
            pool.submit(ask_chat, other, "say")
    assert [len(other.calls()) for other in others] == [2] * 6
    assert isinstance(failures[0], openai.InternalServerError) and len(failures) == 2
    assert closed(sealed)["calls"] == 2
