"""A teacher that is an endpoint: an OpenAI-compatible server with vLLM's `prompt_logprobs`, as `vllm serve` is.

Of each sample it is asked once, POST /completions with the sample's tokens as the prompt, and tells the log-probability of each
given those before it: at temperature 1, whatever it samples with. Its one sampled token is thrown away.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import httpx
import numpy as np

from raygent.actors.tries import SHOWN, Unanswered, beginning, check_answered, wait_before_next
from raygent.config import Config, ConfigError, key_in
from raygent.records import Sample

PARALLEL = 32  # requests at once
# Of a request with all its tries, before a run and in it, where the server may be restarted.
CHECK_S, DEADLINE_S = 10.0, 600.0
TRY_S, CONNECT_S = 300.0, 10.0  # of one try, and of its beginning
SPREAD = 200  # tokens of the whole vocabulary that the check's text is made of
TEXT = "Call get_user(id=42), then say: naïve, 数学, Ωμέγα 🙂\n\n\tdef f(x):\n        return x ** 2 - 1.5e-3  # why?\n"
SEE_TO = "see to algorithm.teacher (most end with /v1), teacher_model and teacher_api_key_env"
MEND = "serve the teacher with `vllm serve`"


class Teacher:
    """Asked for nothing before check(). Raises ConfigError, with the mend, wherever the endpoint does not give what it should."""

    def __init__(self, config: Config) -> None:
        settings = config.algorithm
        assert settings.teacher_url
        self.config, self.url, self.model = config, settings.teacher_url.rstrip("/"), settings.teacher_model or ""
        self.headers: dict[str, str] = {}
        if variable := settings.teacher_api_key_env:
            self.headers["authorization"] = f"Bearer {key_in(variable, 'algorithm.teacher_api_key_env')}"

    def check(self) -> None:
        """See that the endpoint answers, gives log-probabilities of prompts, has the tokens of model.path, and takes prompts as
        long as samples may be."""
        asyncio.run(self._check())

    def logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        """Of each masked token of each sample the teacher's log-probability, float32 [T], else 0; 0 for a first token, before
        which there is nothing."""
        for sample in samples:
            others = sample.temperature[sample.loss_mask & (sample.temperature != 1)]
            if len(others):
                raise ConfigError(
                    f"algorithm.teacher: tokens of rollout {sample.rollout_id} were sampled at temperature {others[0]:g}, and an "
                    "endpoint tells what they are worth at 1; choose another run.name, or give the teacher as a folder"
                )
        return asyncio.run(self._logprobs(samples))

    async def _logprobs(self, samples: list[Sample]) -> list[np.ndarray]:
        turns = asyncio.Semaphore(PARALLEL)

        async def of(sample: Sample) -> np.ndarray:
            last = int(sample.loss_mask.nonzero()[0].max(initial=0))
            tokens, found = sample.token_ids[: last + 1].tolist(), np.zeros(len(sample), np.float32)
            async with turns:
                reply = await self._complete(client, tokens, DEADLINE_S)
            found[: last + 1] = self._read(reply, tokens)
            return np.where(sample.loss_mask, found, np.float32(0))

        async with self._client() as client:
            return list(await asyncio.gather(*map(of, samples)))

    async def _check(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        path = self.config.model.path
        async with self._client() as client:
            served = await self._ask(client, "GET", "/models", None, CHECK_S)
            try:
                longest = {row["id"]: row.get("max_model_len") for row in served["data"]}
            except (AttributeError, KeyError, TypeError) as error:
                raise self._wrong(f"GET /models tells of no models; {MEND}") from error
            if self.model not in longest and (self.model or len(longest) != 1):
                raise ConfigError(
                    f"algorithm.teacher_model: {self.model or 'missing'}, and {self.url} serves {', '.join(longest) or 'none'}; "
                    "name one of them"
                )
            self.model = self.model or next(iter(longest))
            limit = longest[self.model]
            about = AutoConfig.from_pretrained(path).get_text_config()
            context = self.config.model.context or getattr(about, "max_position_embeddings", None)
            if limit and context and context >= limit:  # it has to have room for the token that it samples
                raise self._wrong(
                    f"takes {limit} tokens, and a sample may have {context}; serve it with --max-model-len {context + 1}, or "
                    f"set model.context = {limit - 1}"
                )
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
            text = probe(tokenizer)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            told = self._told(await self._complete(client, text, CHECK_S))
            if [list(one) for one in told[1:]] != [[str(token)] for token in tokens[1:]]:
                raise self._wrong(f"it has another tokenizer than {path}; take a model of the same family")
            tokens.append(max(tokenizer.get_vocab().values()))  # which a smaller vocabulary has not
            self._read(await self._complete(client, tokens, CHECK_S), tokens)

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=PARALLEL)
        return httpx.AsyncClient(headers=self.headers, timeout=httpx.Timeout(TRY_S, connect=CONNECT_S), limits=limits)

    async def _complete(self, client: httpx.AsyncClient, prompt: str | list[int], deadline_s: float) -> Any:
        """The reply about `prompt`. Special tokens are put before none: a text has only those that it names."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "add_special_tokens": False,
        }
        return await self._ask(client, "POST", "/completions", body, deadline_s)

    def _told(self, reply: Any) -> list[Any]:
        """By token of the prompt what is told of it: {"ID": {"logprob": -0.5, ...}}, of the first None."""
        try:
            told = reply["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            told = None
        if not isinstance(told, list) or not all(isinstance(one, dict) for one in told[1:]):
            raise self._wrong(f"a completion comes without the prompt_logprobs it was asked for; {MEND}")
        return told

    def _read(self, reply: Any, tokens: list[int]) -> np.ndarray:
        """The log-probability of each of `tokens`, float32 [T], 0 of the first."""
        told, found = self._told(reply), np.zeros(len(tokens), np.float32)
        if len(told) != len(tokens):
            raise self._wrong(f"it was asked for {len(tokens)} tokens and told of {len(told)}; {MEND}")
        for place, (token, one) in enumerate(zip(tokens[1:], told[1:], strict=True), 1):
            own = one.get(str(token))
            value = own.get("logprob") if isinstance(own, dict) else None
            if not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
                raise self._wrong(
                    f"of token {token}, number {place}, it told {one!r:.{SHOWN}}, no log-probability; {MEND}"
                )
            found[place] = value
        return found

    async def _ask(self, client: httpx.AsyncClient, method: str, path: str, body: Any, deadline_s: float) -> Any:
        """The reply's JSON, of as many tries as it takes within `deadline_s`."""
        deadline, tries = time.monotonic() + deadline_s, 0
        while True:
            try:
                response = await client.request(method, self.url + path, json=body)
                check_answered(response)
                break
            except httpx.InvalidURL as error:
                raise self._wrong(f"{error}; write the URL as a client gets it") from error
            except (httpx.TransportError, httpx.DecodingError) as error:
                failed = Unanswered(f"{type(error).__name__}: {error}")
            except Unanswered as error:
                failed = error
            tries += 1
            wait_s = wait_before_next(failed, tries)
            if time.monotonic() + wait_s > deadline:
                raise self._wrong(
                    f"no answer in {tries} tries: {failed}; see to the server, and give the command again"
                )
            await asyncio.sleep(wait_s)
        if not response.is_success:
            mend = "" if response.status_code == 400 else f"; {SEE_TO}"
            raise self._wrong(f"HTTP {response.status_code} from {path}: {beginning(response)}{mend}")
        try:
            return response.json()
        except ValueError as error:
            raise self._wrong(f"no JSON from {path}: {beginning(response)}; {MEND}") from error

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"algorithm.teacher: {self.url}: {what}")


def probe(tokenizer: Any) -> str:
    """A text that tells tokenizers apart: of many scripts, of tokens with names (a chat template's), and of tokens from all over
    the vocabulary."""
    every = range(0, len(tokenizer), max(1, len(tokenizer) // SPREAD))
    return TEXT + "".join(sorted(tokenizer.get_added_vocab())[:100]) + tokenizer.decode(list(every))
