"""A teacher that is an endpoint, before a server on this machine that tells each token's log-probability by its number."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conversations import branching, config, rollout, tables
from tiny_model import make_tiny_model
from transformers import AutoTokenizer
from vendor import Vendor, serving

from raygent.actors import tries
from raygent.algorithms.batch import make_samples
from raygent.cluster import teacher
from raygent.cluster.parts import Parts
from raygent.cluster.teacher import Teacher
from raygent.config import ConfigError, load
from raygent.jobs import check, dry_run
from raygent.records import Sample

BUSY = {"error": {"message": "too many", "type": "rate_limit"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(teacher, "CHECK_S", 0.3)


@pytest.fixture
def vendor(model: Path) -> Iterator[Vendor]:
    with serving() as vendor:
        vendor.answers = [endpoint(model)]
        yield vendor


def logprob(token: int, place: int) -> float:
    return -(token + 1) / 512 - place / 8


def told(tokens: list[int]) -> list[Any]:
    """As vLLM does with prompt_logprobs = 0."""
    own = [{"logprob": logprob(token, place), "rank": 3, "decoded_token": "x"} for place, token in enumerate(tokens)]
    return [None] + [{str(token): one} for token, one in zip(tokens[1:], own[1:], strict=True)]


def reply(prompt_logprobs: Any) -> tuple[int, Any, dict[str, str]]:
    choice = {"index": 0, "text": "a", "logprobs": None, "prompt_logprobs": prompt_logprobs}
    return 200, {"object": "text_completion", "model": "big", "choices": [choice]}, {}


def endpoint(model: Path, limit: int | None = 2049, vocabulary: int = 261, *others: str) -> Callable[[Any], Any]:
    """What `vllm serve` answers, with the tokenizer in the folder `model`."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def answer(body: Any) -> Any:
        if body is None:
            return 200, {"data": [{"id": name, "max_model_len": limit} for name in ("big", *others)]}, {}
        prompt = body["prompt"]
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        if max(tokens) >= vocabulary:
            return 400, {"error": {"message": f"Token id {max(tokens)} is out of vocabulary"}}, {}
        return reply(told(tokens))

    return answer


def asked(url: str, model: Path, **more: Any) -> Any:
    sections = {"run": {"directory": str(model.parent / "runs")}} | {
        key: more.pop(key) for key in ("run",) if key in more
    }
    return config(
        model={"path": str(model)}, algorithm={"name": "distill", "teacher": url, "group_size": 2} | more, **sections
    )


def sample(tokens: list[int], mask: list[int], temperature: float = 1.0) -> Sample:
    masked, zeros = np.array(mask, bool), np.zeros(len(mask), np.float32)
    heat = np.where(masked, temperature, 1).astype(np.float32)
    return Sample("r", "g", "main", np.array(tokens, np.int32), masked, zeros, zeros, zeros.astype(np.int32), heat)


def ready(vendor: Vendor, model: Path, **more: Any) -> Teacher:
    made = Teacher(asked(vendor.base_url, model, **more))
    made.check()
    vendor.requests.clear()
    return made


# what it tells


def test_each_sample_is_one_request_and_masked_tokens_alone_have_a_value(vendor: Vendor, model: Path) -> None:
    made = ready(vendor, model)
    samples = [sample([5, 9, 7, 3, 4], [0, 0, 1, 1, 0]), sample([8, 6], [1, 1]), sample([4, 4, 4], [0, 1, 0])]
    found = made.logprobs(samples)
    wanted = [[0, 0, logprob(7, 2), logprob(3, 3), 0], [0, logprob(6, 1)], [0, logprob(4, 1), 0]]
    for one, mine in zip(found, wanted, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, mine, rtol=1e-6)
    bodies = sorted((request["body"] for request in vendor.requests), key=lambda body: body["prompt"])
    assert [body.pop("prompt") for body in bodies] == [[4, 4], [5, 9, 7, 3], [8, 6]]  # no more than is asked about
    plain = {"model": "big", "max_tokens": 1, "prompt_logprobs": 0, "add_special_tokens": False}
    assert bodies == [plain] * 3 and {request["path"] for request in vendor.requests} == {"/v1/completions"}


def test_many_are_asked_at_once_and_no_more_than_that(
    vendor: Vendor, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, answer = ready(vendor, model), vendor.answers[0]
    monkeypatch.setattr(teacher, "PARALLEL", 3)
    vendor.answers = [lambda body: (time.sleep(0.05), answer(body))[1]]
    found = made.logprobs([sample([5, token], [0, 1]) for token in range(30)])
    assert [float(one[1]) for one in found] == pytest.approx([logprob(token, 1) for token in range(30)])
    assert len(vendor.requests) == 30 and 1 < vendor.most_at_once <= 3


def test_a_run_of_distill_takes_what_the_endpoint_tells(vendor: Vendor, model: Path, tmp_path: Path) -> None:
    """Branching rollouts of several turns: each token's advantage is of its own place on its own path."""
    settings = asked(vendor.base_url, model, run={"directory": str(tmp_path)})
    parts = Parts(settings)
    assert parts.teacher and not settings.with_reference
    parts.teacher.check()
    rng, calls = np.random.default_rng(3), []
    for name in ("a", "b"):
        calls += branching(rng, name, 261, 9, 6)
    for one in calls:
        one.temperature = 1.0
    samples, _ = make_samples(
        tables([rollout("a", "g", 0.0), rollout("b", "g", 0.0)], calls), settings, None, parts.measure
    )
    assert len(samples) > 2 and {one.rollout_id for one in samples} == {"a", "b"}
    for one in samples:
        for place in one.loss_mask.nonzero()[0]:
            mine = logprob(int(one.token_ids[place]), int(place)) - one.logprobs[place]
            assert one.advantages[place] == pytest.approx(mine, rel=1e-5)


def test_the_key_goes_as_bearer_and_nowhere_else(
    vendor: Vendor, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-of-the-teacher")
    made = ready(vendor, model, teacher_api_key_env="TEACHER_KEY")
    made.logprobs([sample([5, 6], [0, 1])])
    assert vendor.requests[0]["headers"]["authorization"] == "Bearer sk-of-the-teacher"
    assert "sk-of" not in made.config.to_toml()
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(
        ConfigError, match=r"algorithm\.teacher_api_key_env: the environment variable TEACHER_KEY is not set"
    ):
        Teacher(made.config)


# an endpoint that fails


def test_a_busy_or_broken_endpoint_is_asked_again(vendor: Vendor, model: Path) -> None:
    made = ready(vendor, model)
    vendor.answers = [
        (429, BUSY, {"retry-after": "0.3"}), (500, BUSY, {}), (503, BUSY, {}), (200, [None], {}), endpoint(model),
    ]  # fmt: skip
    (found,) = made.logprobs([sample([5, 6], [0, 1])])
    assert found.tolist() == [0, pytest.approx(logprob(6, 1))]
    times = [request["time"] for request in vendor.requests]
    assert len(times) == 5 and times[1] - times[0] >= 0.3


RIGHT = told([5, 6, 7])
WRONG: dict[str, tuple[Any, str]] = {
    "no vLLM": ((200, {"choices": [{"index": 0, "text": "a"}]}, {}), "without the prompt_logprobs .*vllm serve"),
    "null": (reply(None), "without the prompt_logprobs"),
    "no choices": ((200, {"choices": []}, {}), "without the prompt_logprobs"),
    "a list": ((200, [b"[1, 2]"], {}), "without the prompt_logprobs"),
    "no JSON": ((200, [b"<html>"], {}), "no JSON from /completions: <html>"),
    "too few": (reply(RIGHT[:-1]), "asked for 3 tokens and told of 2"),
    "too many": (reply([None, *RIGHT]), "without the prompt_logprobs"),
    "begins elsewhere": (reply([None, RIGHT[1], *RIGHT[1:]]), "asked for 3 tokens and told of 4"),
    "another token": (reply([None, RIGHT[2], RIGHT[1]]), "of token 6, number 1, it told .*'7'.*, no log-probability"),
    "null within": (reply([None, RIGHT[1], None]), "without the prompt_logprobs"),
    "no number": (reply([None, RIGHT[1], {"7": {"logprob": None}}]), "of token 7, number 2, it told"),
    "not finite": (reply([None, RIGHT[1], {"7": {"logprob": float("nan")}}]), "of token 7, number 2, it told"),
    "logits": (reply([None, RIGHT[1], {"7": {"logprob": 3.5}}]), "of token 7, number 2, it told"),
    "too long": ((400, {"error": {"message": "longer than the maximum model length"}}, {}), "HTTP 400 .*longer than"),
    "no entry": ((401, {"error": "Unauthorized"}, {}), "HTTP 401 .* teacher_api_key_env"),
    "not there": ((404, {"error": "no model big"}, {}), r"HTTP 404 .*most end with /v1"),
    "elsewhere": ((307, {}, {"location": "/v2"}), "HTTP 307"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_told_at_once(vendor: Vendor, model: Path, case: str) -> None:
    made = ready(vendor, model)
    answer, what = WRONG[case]
    vendor.answers = [answer]
    with pytest.raises(ConfigError, match=rf"^algorithm\.teacher: {vendor.base_url}: .*{what}"):
        made.logprobs([sample([5, 6, 7], [0, 1, 1])])
    assert len(vendor.requests) == 1


@pytest.mark.parametrize("step", [0, 3])
def test_an_endpoint_that_dies_in_mid_run_ends_it_with_the_steps_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with serving() as vendor:
        vendor.answers = [endpoint(model)]
        parts = Parts(asked(vendor.base_url, model, run={"directory": str(tmp_path)}))
        assert parts.teacher
        parts.teacher.check()
    saved: list[int] = []
    parts.step, parts.learners = step, SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setattr(parts, "checkpoint", lambda: saved.append(parts.step))
    monkeypatch.setattr(teacher, "DEADLINE_S", 0.5)
    with pytest.raises(
        ConfigError, match=r"algorithm\.teacher: .* no answer in \d+ tries: ConnectError.* give the command"
    ):
        parts.measure("reference", [sample([5, 6], [0, 1]), sample([5, 7], [0, 1])])
    assert saved == ([step] if step else [])


def test_tokens_that_were_sampled_at_another_temperature_are_refused(vendor: Vendor, model: Path) -> None:
    made = ready(vendor, model)
    with pytest.raises(ConfigError, match=r"tokens of rollout r were sampled at temperature 0\.7"):
        made.logprobs([sample([5, 6], [0, 1]), sample([5, 6], [0, 1], temperature=0.7)])
    assert not vendor.requests


# before a run


def test_a_dry_run_tells_of_the_endpoint(
    vendor: Vendor, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = asked(vendor.base_url, model)
    dry_run._tell_teacher(settings)
    assert f"teacher  big at {vendor.base_url}" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    vendor.requests.clear()
    dry_run._tell_teacher(settings)
    assert "asked by the job" in capsys.readouterr().out and not vendor.requests


def test_the_name_of_the_model_is_the_endpoints_only_one_or_given(vendor: Vendor, model: Path) -> None:
    vendor.answers = [endpoint(model, 2049, 261, "adapter")]
    with pytest.raises(ConfigError, match=r"algorithm\.teacher_model: missing, and .* serves big, adapter; name one"):
        ready(vendor, model)
    with pytest.raises(ConfigError, match=r"algorithm\.teacher_model: bigger, and .* serves big, adapter"):
        ready(vendor, model, teacher_model="bigger")
    made = ready(vendor, model, teacher_model="adapter")
    made.logprobs([sample([5, 6], [0, 1])])
    assert vendor.requests[0]["body"]["model"] == "adapter"


def test_an_endpoint_with_other_tokens_is_refused(vendor: Vendor, model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", thinking=True)
    vendor.answers = [endpoint(other)]
    ready(vendor, model)  # which has no tokens of other names, and so makes the same of the text
    with pytest.raises(ConfigError, match=rf"algorithm\.teacher: .* another tokenizer than {other}"):
        vendor.answers = [endpoint(model)]
        ready(vendor, other)
    vendor.answers = [endpoint(model, vocabulary=260)]
    with pytest.raises(ConfigError, match=r"algorithm\.teacher: .* HTTP 400 .*Token id 260 is out of vocabulary"):
        ready(vendor, model)


def test_an_endpoint_that_takes_less_than_a_sample_is_refused(vendor: Vendor, model: Path) -> None:
    vendor.answers = [endpoint(model, 2048)]
    with pytest.raises(
        ConfigError, match=r"takes 2048 tokens, .* may have 2048; .*--max-model-len 2049, or set model\.context = 2047"
    ):
        ready(vendor, model)
    vendor.answers = [endpoint(model, None)]  # it does not say
    ready(vendor, model)


def test_what_does_not_answer_or_is_no_such_endpoint_is_told(vendor: Vendor, model: Path) -> None:
    for answer, what in (
        ((404, {"detail": "Not Found"}, {}), r"HTTP 404 from /models.*most end with /v1"),
        ((200, {"object": "list"}, {}), "GET /models tells of no models"),
        ((200, {"data": []}, {}), "serves none"),
        ((503, {}, {}), r"no answer in \d+ tries: HTTP 503"),
    ):
        vendor.answers = [answer]
        with pytest.raises(ConfigError, match=rf"algorithm\.teacher(_model)?: .*{what}"):
            ready(vendor, model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConfigError, match=r"no answer in \d+ tries: ConnectError"):
        Teacher(asked(url, model)).check()


# the config

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "temperature": ({}, {"engine": {"temperature": 0.7}}, r"engine\.temperature: 0\.7, and the endpoint"),
    "kl": ({"kl": 0.1}, {}, r"algorithm\.kl: the learners keep no model beside an endpoint"),
    "no URL": ({"teacher": "ftp://h/v1"}, {}, r"algorithm\.teacher: 'ftp://h/v1' is no URL"),
    "name of a folder": ({"teacher": "a", "teacher_model": "b"}, {}, r"algorithm\.teacher_model: .* is no endpoint"),
    "key of a folder": ({"teacher": "a", "teacher_api_key_env": "B"}, {}, r"algorithm\.teacher_api_key_env: .* no endpoint"),
    "others": ({"name": "grpo"}, {}, r"algorithm\.teacher: grpo has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_an_endpoint_is_refused(case: str) -> None:
    algorithm, sections, what = REFUSED[case]
    with pytest.raises(ValueError, match=what):
        config(algorithm={"name": "distill", "group_size": 2, "teacher": "http://h:8100/v1"} | algorithm, **sections)


def test_a_url_is_no_folder_beside_the_toml_and_the_learners_keep_no_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("def run(task): ...\n")
    (tmp_path / "train.jsonl").write_text('{"id": "1", "input": "a"}\n')
    (tmp_path / "run.toml").write_text(
        f'[model]\npath = "{model}"\n[agent]\nrun = "agent.py:run"\n[data]\ntrain = "train.jsonl"\n'
        '[algorithm]\nname = "distill"\nteacher = "http://h:8100/v1"\n'
    )
    settings = load(tmp_path / "run.toml")
    assert settings.algorithm.teacher == settings.algorithm.teacher_url == "http://h:8100/v1"
    check._check_teacher(settings)
    assert settings.measures == ["reference"] and not settings.with_reference
    with pytest.raises(
        ConfigError, match=r"algorithm\.teacher: has a user or a password (?!.*hidden).*teacher_api_key_env"
    ):
        load(tmp_path / "run.toml", ["algorithm.teacher=http://me:hidden@h/v1"])
    local = load(tmp_path / "run.toml", [f"algorithm.teacher={model}"])
    assert local.with_reference and local.algorithm.teacher_url is None
    memory = [dry_run.memory_estimate(one)["learner_states"] for one in (settings, local)]
    assert memory[0] < memory[1]
