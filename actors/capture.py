"""The capture: vLLM's AsyncLLM with `generate()` wrapped, below every API, so that what is recorded is what was run.

A call is appended to the store before its last output is handed on: no reply that a client received in full is
unrecorded. When a client hangs up, the record is what was sampled until then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.actor import ActorHandle
from ray.exceptions import RayError
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.inputs.engine import TokensInput
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.output_processor import RequestState

from raygent.actors.continuation import Prompt, Run, continued, reader
from raygent.actors.gateway import CallContext, ReplicaAttempt, current_call
from raygent.records import CALLS, Call, last_line, to_batch

logger = logging.getLogger("raygent.engine")

# What changes the distribution so that the learner's plain softmax(logits / T) is not what was sampled from.
PLAIN = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "thinking_token_budget": None,
    "trace_decode_token_ids": None,
}
SAMPLING = ("n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "seed")  # as the record tells them
STUCK = (
    "response_format, structured_outputs, tool_choice: the model has no token that could follow under this grammar and the "
    "request's other limits (allowed_token_ids, bad_words, ...); ask for another form or leave the limits out"
)

FAILS = (RayError, ValueError, TypeError, OverflowError)  # the store's refusal; a value that is none of its column's


class NotRecorded(VLLMServerError):
    """The store did not take a call: the client gets a 500, for the failure is ours and not its own."""


@dataclass(frozen=True)
class SamplingRules:
    """How a run's config changes what a request asks for."""

    temperature: float  # of train mode; greedy has 0
    grammar: str  # "mask" or "refuse", but in eval mode, what changes the distribution
    max_tokens: int | None

    def apply(self, asked: SamplingParams, mode: str) -> tuple[SamplingParams, str]:
        """The parameters used, and why the call's tokens are not to be trained ("" where they are).

        In train mode a seed of the framework's own is left out too: it would make a group's rollouts all alike.
        """
        params = asked.clone()
        params.logprobs = params.logprobs or 0
        if self.max_tokens is not None:
            cap(params, self.max_tokens)
        if mode == "eval":
            return params, ""
        temperature = 0.0 if mode == "greedy" else self.temperature
        params.temperature, params.top_p, params.top_k, params.min_p = temperature, 1.0, 0, 0.0
        params.seed = None
        odd = odd_in(params)
        if odd and self.grammar == "refuse":
            raise VLLMValidationError(f'{odd[0]} changes what is sampled, and engine.grammar = "refuse"; leave it out')
        return params, ", ".join(odd)


def cap(params: SamplingParams, most: int) -> None:
    """At most `most` tokens, also where the client asks for more at least: vLLM's core, which looks at them once more, would end
    the thread that takes requests, and serve nobody any more."""
    params.max_tokens = min(params.max_tokens or most, most)
    params.min_tokens = min(params.min_tokens, params.max_tokens)


def odd_in(params: SamplingParams) -> list[str]:
    """Those of PLAIN that are set."""
    return [name for name, plain in PLAIN.items() if (getattr(params, name) or plain) != plain]


def narrowed(params: SamplingParams) -> bool:
    """Whether what is sampled has not the policy's own distribution at a temperature above 0."""
    whole = params.temperature > 0 and (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    return not whole or bool(odd_in(params))


class CallRecorder:
    """Appends calls to the store; those that end at about the same time go in one message."""

    def __init__(self, store: ActorHandle) -> None:
        self.store = store
        self.waiting: list[tuple[list[Call], asyncio.Future[None]]] = []
        self.flush: asyncio.Task[None] | None = None

    async def append(self, calls: list[Call]) -> None:
        """Returns when the store has written `calls`, one attempt's; raises NotRecorded where it refused them, or they are
        no records."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((calls, written))
        if self.flush is None or self.flush.done():
            self.flush = asyncio.create_task(self._flush())
        await written

    def begin(self, state: ReplicaAttempt, calls: list[Call]) -> asyncio.Task[None]:
        """append() as a task of the attempt's: its end waits for it."""
        recording = _keep(state.recording, self.append(calls))
        recording.add_done_callback(_tell_failure)
        return recording

    async def _flush(self) -> None:
        while self.waiting:
            taken, self.waiting = self.waiting, []
            try:
                await self._send([call for calls, _ in taken for call in calls])
            except FAILS:  # of one among them, perhaps: each by itself tells whose it is, and counts once if sent twice
                await asyncio.gather(*(self._send_alone(calls, written) for calls, written in taken))
            else:
                for _, written in taken:
                    if not written.done():
                        written.set_result(None)
            finally:  # an error of another kind ends this task: nobody may wait for it for ever
                for _, written in taken:
                    if not written.done():
                        written.set_exception(NotRecorded("what writes the records failed: see the engine's log"))

    async def _send_alone(self, calls: list[Call], written: asyncio.Future[None]) -> None:
        try:
            await self._send(calls)
        except FAILS as error:
            if not written.done():
                written.set_exception(NotRecorded(last_line(error)))
            return
        if not written.done():
            written.set_result(None)

    async def _send(self, calls: list[Call]) -> None:
        """All of them in one batch: to make one costs as much as to fill it with twenty."""
        await self.store.append.remote("calls", to_batch(CALLS, calls))


class SampledLogprobs(LogprobsProcessor):
    """The sampled tokens' logprobs, for the record alone: the client asked for none, and no token's text is looked up."""

    def __init__(self) -> None:
        super().__init__(None, None, None, None, None, None)
        self.sampled: list[float] = []

    def update_from_output(self, output: EngineCoreOutput) -> None:
        if output.new_logprobs is not None:
            self.sampled += output.new_logprobs.logprobs[:, 0].tolist()


class RunningCall:
    """One generate() at work: what vLLM has of it, and under which policy version each of its tokens was sampled."""

    def __init__(self, llm: CapturingLLM, context: CallContext, request_id: str, asked: SamplingParams) -> None:
        self.llm, self.context, self.request_id = llm, context, request_id
        self.params, odd = llm.rules.apply(asked, context.mode)
        if context.mode != context.key.mode and narrowed(self.params):  # else another run may train it
            odd = "sampled as its agent asked"
        self.untrainable = context.untrainable or odd
        self.policy = llm.policy_of(context.agent)
        self.gives_logprobs = asked.logprobs is not None or asked.prompt_logprobs is not None
        self.version = llm.version  # in force when it began
        self.borders: list[tuple[int, dict[int, int]]] = []  # a later version, the tokens each choice had before it
        self.states: dict[int, RequestState] = {}  # by choice
        self.finish_reasons: dict[int, str] = {}
        self.started = time.time()
        self.recording: asyncio.Task[None] | None = None
        self.prompt = Prompt(np.empty(0, np.int32))
        self.rendered: list[int] | None = None  # the API's own prompt, where the engine got another

    def go_on(self, prompt: Any) -> Any:
        """`prompt`, vLLM's input for the engine, from the conversation's own tokens where it is one that goes on (see
        continuation); where these leave no room in the context it stays as it was rendered."""
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) and prompt.get("type") == "token" else None
        if ids is None or self.context.api == "completions":
            return prompt
        earlier = self.context.state.runs.get(self.context.agent)
        if not earlier:
            return prompt
        read = reader(self.llm.parser_class, self.llm.get_tokenizer(), self.context.tools, self.context.state.read)
        found = continued(ids, earlier, self.llm.ends, read)
        room = self.llm.model_config.max_model_len - len(found.tokens)
        if room < 1:
            return prompt
        self.prompt = found
        if not found.own:
            return prompt
        self.rendered = list(ids)
        cap(self.params, room)
        return TokensInput(type="token", prompt_token_ids=found.tokens.tolist()) | {
            key: prompt[key] for key in ("arrival_time", "cache_salt") if key in prompt
        }

    def add(self, state: RequestState) -> None:
        self.states[state.request_index] = state
        if not self.gives_logprobs:
            state.logprobs_processor = SampledLogprobs()

    def sampled(self, choice: int) -> list[int]:
        state = self.states.get(choice)
        return list(state.detokenizer.output_token_ids) if state and state.detokenizer else []

    def note_border(self, version: int) -> None:
        self.borders.append((version, {choice: len(self.sampled(choice)) for choice in self.states}))

    def note(self, output: RequestOutput) -> None:
        for choice in output.outputs:
            if choice.finish_reason:
                self.finish_reasons[choice.index] = choice.finish_reason

    def stuck(self) -> bool:
        """Whether vLLM ended it with an error for its grammar: no token was left to sample."""
        return self.params.structured_outputs is not None and "error" in self.finish_reasons.values()

    def end(self) -> asyncio.Task[None] | None:
        """Take the call down as it is now and stop what still runs of it, once. The task that appends the record."""
        if self.llm.calls.pop(self.request_id, None) is None:
            return self.recording
        state = self.context.state
        self.context.running.discard(self)
        if any(of.request_id in self.llm.output_processor.request_states for of in self.states.values()):
            _keep(self.llm.aborting, self.llm.abort(self.request_id))
        sampling = json.dumps({name: getattr(self.params, name) for name in SAMPLING})
        calls = [self._call(choice, sampling) for choice in sorted(self.states)]
        if self.llm.exact:
            runs = state.runs.setdefault(self.context.agent, [])
            for call in (call for call in calls if call.response_token_ids):
                tokens = np.asarray(call.prompt_token_ids + call.response_token_ids, np.int32)
                runs.append(Run(tokens, (*self.prompt.starts, len(call.prompt_token_ids))))
        if calls:
            self.recording = self.llm.recorder.begin(state, calls)
        self.llm.sampled_tokens += sum(len(call.response_token_ids) for call in calls)
        return self.recording

    def _call(self, choice: int, sampling: str) -> Call:
        state, context, ids = self.states[choice], self.context, self.sampled(choice)
        processor: Any = state.logprobs_processor
        if self.gives_logprobs:
            logprobs = [entry[token].logprob for token, entry in zip(ids, processor.logprobs, strict=True)]
        else:
            logprobs = [logprob for _, logprob in zip(ids, processor.sampled, strict=True)]
        versions = [self.version] * len(ids)
        for version, tokens in self.borders:
            before = tokens.get(choice, 0)
            versions[before:] = [version] * (len(ids) - before)
        self.context.state.recorded += 1
        return Call(
            rollout_id=context.key.rollout_id,
            attempt=context.key.attempt,
            source=self.llm.source,
            source_sequence=context.state.recorded - 1,
            request_id=self.request_id,
            choice=choice,
            agent=context.agent,
            policy=self.policy,
            api=context.api,
            request=context.request,
            prompt_token_ids=list(state.prompt_token_ids or []),
            response_token_ids=ids,
            logprobs=logprobs,
            policy_versions=versions,
            sampling=sampling,
            temperature=self.params.temperature,
            finish_reason=self.finish_reasons.get(choice, "abort"),
            trainable=not self.untrainable,
            untrainable_why=self.untrainable,
            own_tokens=self.prompt.own,
            started=self.started,
            finished=time.time(),
        )


class States(dict):
    """vLLM's table of the requests it runs, which tells of each that is added: no other place sees every one in time."""

    def __init__(self, added: Callable[[RequestState], None]) -> None:
        super().__init__()
        self.added = added

    def __setitem__(self, request_id: str, state: RequestState) -> None:
        super().__setitem__(request_id, state)
        self.added(state)


class CapturingLLM(AsyncLLM):
    """`attach()` before the first request."""

    def attach(
        self,
        recorder: CallRecorder,
        source: str,
        rules: SamplingRules,
        policy_of: Callable[[str], str],
        exact: bool = False,
        parser_class: Any = None,
    ) -> None:
        """`policy_of`: an agent's policy; one that `adapters` does not hold is the model as it is.

        `exact`: conversations go on from their own tokens, read with vLLM's parser of the model, `parser_class`.
        """
        self.recorder, self.source, self.rules, self.policy_of = recorder, source, rules, policy_of
        self.adapters: dict[str, LoRARequest] = {}
        self.exact, self.parser_class = exact, parser_class
        also = self.model_config.try_get_generation_config().get("eos_token_id") or []
        self.ends = [self.get_tokenizer().eos_token_id, *([also] if isinstance(also, int) else also)]
        self.version = -1  # of what is sampled from now on
        self.calls: dict[str, RunningCall] = {}
        self.aborting: set[asyncio.Task[None]] = set()
        self.sampled_tokens = 0
        self.output_processor.request_states = States(self._added)

    def _added(self, state: RequestState) -> None:
        if call := self.calls.get(state.external_req_id):
            call.add(state)

    def note_border(self, version: int) -> None:
        """At a pause, when no token is on its way: from here on tokens are of `version`."""
        self.version = version
        for call in self.calls.values():
            call.note_border(version)

    async def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **rest: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        context = current_call.get()
        if context is None:  # vLLM's own warm-up
            async for output in super().generate(prompt, sampling_params, request_id, **rest):
                yield output
            return
        if context.over:
            raise asyncio.CancelledError("the client has hung up")
        if context.api == "responses":  # vLLM keeps its messages from here on
            context.state.responses.add(request_id.rpartition("_")[0])
        call = self.calls[request_id] = RunningCall(self, context, request_id, sampling_params)
        context.running.add(call)
        if isinstance(prompt, dict) and prompt.get("type", "token") != "token":  # as of an image of an earlier response
            call.untrainable = call.untrainable or "media"
        if self.exact:
            prompt = call.go_on(prompt)
        if adapter := self.adapters.get(call.policy):
            rest["lora_request"] = adapter
        try:
            async with aclosing(super().generate(prompt, call.params, request_id, **rest)) as outputs:
                async for output in outputs:
                    call.note(output)
                    if call.rendered is not None:
                        output.prompt_token_ids = call.rendered  # parsers of a stream look for an end of thinking in it
                    if output.finished and (recording := call.end()):
                        await asyncio.shield(recording)
                    if call.stuck():
                        raise VLLMValidationError(STUCK)
                    yield output
        finally:
            call.end()


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """`work` as a task that stands in `tasks` until it is done."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _tell_failure(recording: asyncio.Task[None]) -> None:
    if not recording.cancelled() and (error := recording.exception()):
        logger.warning("a call is not recorded: %s", error)
