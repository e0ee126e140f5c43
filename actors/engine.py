"""The engine: a Ray Serve deployment around vLLM's AsyncLLM, serving vLLM's own app behind the gateway.

A replica owns one EngineCore process, which ends with it. It may be asked: `status`, `close_attempts`, and an update of
its weights (`begin_update`, `weights` several times or `load_adapters`, `finish_update`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import ray
import torch
from ray import serve

from raygent.actors.adapters import Files, read_files, write_files
from raygent.actors.core_watch import CoreWatch, why_it_died
from raygent.actors.engine_handle import EngineUnavailable
from raygent.actors.environment import NO_TELEMETRY, offline
from raygent.actors.front_door import FrontDoor
from raygent.actors.gateway import Gateway, ReplicaAttempt
from raygent.actors.scratch import Scratch
from raygent.actors.weight_transfer import BACKEND, node_name
from raygent.config import POLICY, Config
from raygent.families import NONE
from raygent.records import AttemptKey

logger = logging.getLogger("raygent.engine")
KEY_SLACK_S = 600.0  # a key lives agent.timeout_s and some more
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # bounds that vLLM knows


def check_responses(request: dict[str, Any]) -> None:
    """Raises ValueError, or what vLLM's own code runs into, where vLLM makes no messages of a Responses request."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_input_messages

    read = ResponsesRequest.model_validate(request)
    for message in construct_input_messages(request_instructions=read.instructions, request_input=read.input):
        if not (isinstance(message, dict) and message.get("role")):
            kind = message.get("type") if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"input: an item of type {kind!r} is no part of a conversation here; leave it out")


def environment(config: Config) -> dict[str, str]:
    """Environment variables of a replica: quiet, local, and on a CPU the settings without which vLLM is slow or fails."""
    quiet = NO_TELEMETRY | {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",  # for previous_response_id; an attempt's responses go with it
    }
    quiet |= offline(config.model.path)
    if config.engine.gpus:
        return quiet
    return quiet | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the executor is one more process; EngineCore is one in any case
        "OMP_NUM_THREADS": str(config.engine.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def vllm_flags(config: Config, model: str, replica: str = "") -> list[str]:
    """The arguments vLLM's own parser takes, as `vllm serve` would be given them. `replica`: its own name, where there are several:
    with one seed for all they would sample the same tokens for a group's rollouts."""
    named = (config.model.tool_parser, config.model.reasoning_parser)
    tool_parser, reasoning_parser = (None if name == NONE else name for name in named)
    settings: dict[str, Any] = {
        "model": model,
        "served_model_name": POLICY,
        "dtype": config.engine.dtype or config.learner.dtype,
        "max_model_len": config.model.context,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "seed": config.run.seed if config.engine.replicas == 1 else (config.run.seed + crc32(replica.encode())) % 2**31,
        "tool_call_parser": tool_parser,
        "enable_auto_tool_choice": bool(tool_parser),
        "reasoning_parser": reasoning_parser,
        "chat_template": config.model.chat_template,
        "enable_log_requests": False,
        "disable_uvicorn_access_log": True,
    }
    if config.engine.gpus:
        settings["tensor_parallel_size"] = max(1, int(config.engine.gpus))
    else:
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": config.engine.cache_bytes, "max_num_seqs": 128}
    if lora := config.learner.lora:
        number = len(config.adapters)
        rank = next(rank for rank in LORA_RANKS if rank >= lora.rank)
        settings |= {"enable_lora": True, "max_loras": number, "max_cpu_loras": number, "max_lora_rank": rank}
    else:
        settings["weight_transfer_config"] = {"backend": "nccl" if config.nccl else BACKEND}
    settings |= config.engine.vllm_arguments()
    return [word for name, value in settings.items() if value is not None for word in _flag(name, value)]


def _flag(name: str, value: Any) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


@serve.deployment(
    name="Engine",
    max_ongoing_requests=10_000,
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=2,
    logging_config={"log_level": "WARNING", "enable_access_log": False},
)
@serve.ingress()
class Engine:
    """A replica comes up at version -1 and takes no model calls before it is told that the weights in `model` are those in
    force (`adopt`), or is given them (an update): so one that replaces another never samples from old weights."""

    def __init__(
        self,
        config: Config,
        secret: str,
        store_name: str,
        namespace: str,
        model: str,
        upstream_keys: dict[str, str],
    ) -> None:
        """`upstream_keys` are by the upstream's name."""
        self.config, self.secret, self.model, self.upstream_keys = config, secret, model, upstream_keys
        self.store = ray.get_actor(store_name, namespace)
        self.source = serve.get_replica_context().replica_id.unique_id
        self.version = -1
        self.updating: int | None = None  # the version an update is to bring; paused meanwhile
        self.paused = False
        self.begun = False  # vLLM is inside an update of its weights
        self.holds: int | None = -1  # the version of the weights; None from an update's start to its finish
        self.parameters: dict[str, list[int]] = {}  # name and shape of what an update has to bring
        self.scratch = Scratch()
        self.lock = asyncio.Lock()

    async def __serve_build_asgi_app__(self) -> Gateway:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from raygent.actors.capture import CallRecorder, CapturingLLM, SamplingRules
        from raygent.actors.upstream import UpstreamProxy

        config = self.config
        model = config.model.path if config.adapters else self.model
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm_flags(config, model, self.source))
        validate_parsed_serve_args(args)
        llm = CapturingLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        assert isinstance(llm, CapturingLLM)
        self.llm = llm
        tasks = await self.llm.get_supported_tasks()
        app = build_app(args, tasks, self.llm.model_config)
        await init_app_state(self.llm, app.state, args, tasks)
        app.state.server = SimpleNamespace(should_exit=False)  # else vLLM's error handling hides the engine's own error
        engine = config.engine
        rules = SamplingRules(engine.temperature, engine.grammar, config.model.max_tokens)
        parser_class = app.state.openai_serving_chat.parser_cls if app.state.openai_serving_chat else None
        recorder, exact = CallRecorder(self.store), engine.continuation == "exact"
        self.llm.attach(recorder, self.source, rules, config.policy_of, exact, parser_class)
        if self.model != config.model.path:  # a checkpoint
            for name, files in read_files(Path(self.model), config.adapters).items():
                await self._load_adapter(name, files)
        await self.llm.reset_mm_cache()
        self.responses = app.state.openai_serving_responses
        self.upstreams = {
            name: UpstreamProxy(name, upstream, self.upstream_keys.get(name), engine.replicas, recorder, self.source)
            for name, upstream in self.config.upstream.items()
        }
        self.gateway = Gateway(
            app,
            self.secret,
            max_calls=config.agent.max_calls,
            ready=lambda: self._served_version() >= 0,
            key_life_s=2 * config.agent.timeout_s + KEY_SLACK_S,
            max_tokens=config.model.max_tokens,
            checks={
                "chat": ChatCompletionRequest.model_validate,
                "completions": CompletionRequest.model_validate,
                "responses": check_responses,
                "messages": AnthropicMessagesRequest.model_validate,
            },
            upstream_of=lambda agent: self.upstreams.get(config.upstream_of(agent) or ""),
            text_only=not self.llm.model_config.is_multimodal_model,
            forget=self._forget,
            trains=config.trains,
        )
        self.watch = CoreWatch(self.llm, engine.silent_s)
        self.door = FrontDoor(self.gateway, engine.host)
        self.door.open()
        return self.gateway

    def __del__(self) -> None:
        """Serve calls it where a replica ends in good order."""
        self.scratch.remove()

    async def check_health(self) -> None:
        if hasattr(self, "watch"):
            await self.llm.check_health()
            self.watch.look(busy=self.paused)

    async def status(self) -> dict[str, Any]:
        """`source` names the replica, `url` is its front door; `running` requests; `sampled_tokens` since it started; of each
        of the `upstreams` what it spent and served since then (UpstreamProxy.status)."""
        return {
            "source": self.source,
            "url": self.door.url,
            "pid": os.getpid(),
            "version": self._served_version(),
            "node": node_name(),
            "running": len(self.llm.output_processor.request_states),
            "sampled_tokens": self.llm.sampled_tokens,
            "upstreams": {name: upstream.status() for name, upstream in self.upstreams.items()},
        }

    async def recall_budgets(self) -> dict[str, Any]:
        """Take back what the upstreams may still spend, until `grant_budgets`; what `status` tells."""
        for upstream in self.upstreams.values():
            upstream.budget = 0.0
        return await self.status()

    async def grant_budgets(self, budgets: dict[str, float]) -> None:
        for name, dollars in budgets.items():
            self.upstreams[name].budget += dollars

    def _served_version(self) -> int:
        """-1 before the first weights are told, and again once vLLM's EngineCore has died: Serve replaces the replica then."""
        return -1 if self._core_is_dead() else self.version

    def _core_is_dead(self) -> bool:
        return self.llm.errored or bool(self.watch.why)

    async def close_attempts(self, attempts: list[AttemptKey]) -> tuple[str, dict[AttemptKey, dict[str, Any]]]:
        """End the attempts: refuse their keys, cancel what they have in flight, and wait until it is recorded.

        Returns this replica's source and for each attempt {"calls", "overflow", "over_max_calls", "failed", "died",
        "upstream_failed", "upstream_waited", "spans", "rewards"}. "died": why vLLM's EngineCore has, or "".
        """
        states = {key: self.gateway.end_attempt(*key) for key in attempts}
        while any(state.tasks or state.recording for state in states.values()):
            await asyncio.sleep(0.005)
        for state in states.values():
            self._forget(state)
        died = (self.watch.why or why_it_died()) if self._core_is_dead() else ""
        told = {
            key: {
                "calls": state.recorded,
                "overflow": state.overflow,
                "over_max_calls": state.over_max_calls,
                "failed": state.failed,
                "died": died,
                "upstream_failed": state.upstream_failed,
                "upstream_waited": state.upstream_waited,
                "spans": state.spans,
                "rewards": state.rewards,
            }
            for key, state in states.items()
        }
        for state in states.values():  # each itself is kept until its keys have expired
            state.spans, state.rewards = [], []
        return self.source, told

    def _forget(self, state: ReplicaAttempt) -> None:
        """What is kept for an attempt that goes on, here and by vLLM's Responses API."""
        for response in state.responses:
            self.responses.response_store.pop(response, None)
            self.responses.msg_store.pop(response, None)
        state.responses.clear()
        state.runs.clear()
        state.read.clear()

    # the weights

    async def adopt(self, version: int) -> None:
        """The weights this replica loaded when it started are those of `version`."""
        if self.version < 0 and not self.paused:
            self.version = self.holds = version
            self.llm.note_border(version)

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncIterator[None]:
        """For a part of an update. Where EngineCore has died, that is not the update's fault: the replica is being replaced."""
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self.lock:
            try:
                yield
            except EngineDeadError as error:
                raise EngineUnavailable("vLLM's EngineCore has died") from error

    async def begin_update(self, version: int) -> dict[str, Any]:
        """Pause, unless the replica serves `version` already. Asked again it answers the same and notes no second border.

        "parameters" are the names and shapes that an update has to have, "workers" the processes that take it.
        """
        async with self._one_at_a_time():
            if not self.parameters and not self.config.adapters:
                self.parameters = await asyncio.to_thread(_parameters, self.llm.model_config.hf_config)
            about = {
                "source": self.source,
                "node": node_name(),
                "current": self.version == version and not self.paused,
                "parameters": self.parameters,
                "workers": self.llm.vllm_config.parallel_config.world_size,
            }
            if about["current"]:
                return about
            if not self.paused:
                await self.llm.pause_generation(mode="keep", clear_cache=True)
                await self._drain()
                self.paused = True
            if self.updating != version:
                self.llm.note_border(version)
                self.updating = version
            return about

    async def _drain(self) -> None:
        """Every token the engine sampled before the pause has been handed to its request: vLLM's output handler has taken
        all there is and waits for more."""
        queue = self.llm.engine_core.outputs_queue  # type: ignore[attr-defined]
        while queue.qsize() or not queue._getters:
            await self.llm.check_health()
            await asyncio.sleep(0.001)

    async def weights(self, step: str, payload: dict[str, Any] | list[dict[str, Any]]) -> None:
        """A step of an update: vLLM's own init, start, update and finish, or cancel. A current replica takes no part.

        An update that broke off is begun anew; until one was finished the replica stays paused, for what it holds are
        weights of two versions. `cancel` lets it go on where nothing was sent yet.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        async with self._one_at_a_time():
            if not self.paused:
                return
            if step == "cancel":
                if self.holds is not None:
                    self.llm.note_border(self.holds)
                    await self._resume(self.holds)
            elif step == "init":
                assert isinstance(payload, dict)
                await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(self._ranked(payload)))
            elif step == "start":
                if self.begun:
                    await self._finish()
                self.holds = None
                await self.llm.start_weight_update()
                self.begun = True
            elif step == "update":
                self.begun = False  # vLLM ends the update where this raises
                await self.llm.update_weights(WeightTransferUpdateRequest(payload))
                self.begun = True
            elif step == "finish":
                await self._finish()
                self.holds = self.updating
            else:
                raise ValueError(f"weights: no step {step!r}")

    async def load_adapters(self, adapters: dict[str, Files]) -> None:
        """What an update of a run with LoRA brings, all at once: by policy, the files of its adapter."""
        async with self._one_at_a_time():
            if not self.paused:
                return
            self.holds = None
            for name, files in adapters.items():
                await self._load_adapter(name, files)
            self.holds = self.updating

    async def _load_adapter(self, name: str, files: Files) -> None:
        """In place of the one that the policy had: requests that run go on with it."""
        from vllm.lora.request import LoRARequest

        folder = self.scratch.path / "adapters" / name  # as files, for vLLM reads nothing else
        write_files(files, folder)
        number = self.config.adapters.index(name) + 1
        await self.llm.add_lora(LoRARequest(name, number, str(folder), load_inplace=True))
        self.llm.adapters[name] = LoRARequest(name, number, str(folder))

    async def _finish(self) -> None:
        self.begun = False
        await self.llm.finish_weight_update(str(self.updating))

    def _ranked(self, init: dict[str, Any]) -> dict[str, Any]:
        """NCCL's init: the workers of each replica named in "replicas" follow those of the one before."""
        replicas: list[str] = init["replicas"]
        before = self.llm.vllm_config.parallel_config.world_size * replicas.index(self.source)
        kept = {name: value for name, value in init.items() if name != "replicas"}
        return kept | {"rank_offset": init["rank_offset"] + before}

    async def finish_update(self, version: int) -> None:
        """Go on under the new weights: running requests are prefilled again, no old key or value is mixed in."""
        async with self._one_at_a_time():
            if not self.paused:
                return
            if self.holds != version:
                raise EngineUnavailable(f"the weights of version {version} have not arrived: push them again")
            await self._resume(version)

    async def _resume(self, version: int) -> None:
        await self.llm.resume_generation()
        self.version, self.paused, self.updating = version, False, None


def _parameters(hf_config: Any) -> dict[str, list[int]]:
    """Name and shape of each parameter as a learner that loads this model has them; no memory is taken for them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}
