"""Weights from the learners to the engines through vLLM's weight-transfer API.

On GPUs vLLM's own NCCL backend carries them; here stands the CPU backend, registered in every vLLM process by the
`vllm.general_plugins` entry point: buckets through memory both sides map where they are on one node, gloo across nodes.
A push is idempotent by version: replicas that have it already skip it, one that was replaced takes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from raygent.actors.environment import free_port

BACKEND = "raygent_cpu"
BUCKET_BYTES = 256 * 2**20
GLOO_TIMEOUT = timedelta(seconds=120)


class EngineUpdates(Protocol):
    """What a push asks of the engines (EngineHandle): each method reaches every replica, and raises EngineUnavailable where
    one does not answer, EngineFailed where one refuses what it is given. The push has broken off then: replicas it had
    reached stay paused until it is made again."""

    def begin_update(self, version: int) -> list[dict[str, Any]]: ...

    def weights(self, step: str, payload: dict[str, Any] | list[dict[str, Any]]) -> None: ...

    def load_adapters(self, adapters: dict[str, dict[str, bytes]]) -> None: ...

    def finish_update(self, version: int) -> None: ...


@dataclass
class Bucket:
    """One piece of an update: either bytes in a shared-memory file or a broadcast over gloo."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    file: str = ""
    gloo: dict[str, Any] | None = None  # host, port, size


Named = Iterable[tuple[str, torch.nn.Parameter]]


def full_parameters(named: Named, zero_stage: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters whole, one at a time, in their order.

    Under ZeRO-3 each is gathered from all ranks (a collective: every rank iterates), and freed when the next is asked for.
    """
    if zero_stage < 3:
        for name, parameter in named:
            yield name, parameter.detach()
        return
    from deepspeed import zero

    for name, parameter in named:
        with zero.GatheredParameters([parameter]):
            yield name, parameter.detach()


def buckets(parameters: Iterator[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Parameters in pieces of about BUCKET_BYTES; each tensor is a copy that outlives its gathering."""
    piece: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in parameters:
        piece.append((name, tensor.to("cpu", copy=True).contiguous()))
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def push_cpu(
    model: torch.nn.Module, zero_stage: int, rank: int, engine: EngineUpdates, version: int, force_gloo: bool = False
) -> dict[str, float]:
    """Send `model`'s weights to every engine replica that lacks `version`. All ranks call it; rank 0 sends.

    Returns {"push_bytes", "push_seconds"} (0 on other ranks). Raises ValueError where the engines run another model.
    """
    parameters = full_parameters(model.named_parameters(), zero_stage)
    started = time.monotonic()
    try:
        sent = _send(model, buckets(parameters), engine, version, force_gloo) if rank == 0 else 0
    finally:
        _to_the_end(parameters)
    return {"push_bytes": float(sent), "push_seconds": time.monotonic() - started if rank == 0 else 0.0}


def _send(
    model: torch.nn.Module,
    pieces: Iterator[list[tuple[str, torch.Tensor]]],
    engine: EngineUpdates,
    version: int,
    force_gloo: bool,
) -> int:
    """Bytes sent, over all receivers."""
    behind = _replicas_behind(model, engine, version)
    if not behind:
        return 0
    near = all(replica["node"] == node_name() for replica in behind) and not force_gloo
    receivers = sum(replica["workers"] for replica in behind)
    group: Any = None
    sent = 0
    engine.weights("start", {})
    for piece in pieces:
        bucket = Bucket(
            [n for n, _ in piece],
            [str(t.dtype).removeprefix("torch.") for _, t in piece],
            [list(t.shape) for _, t in piece],
        )
        flat = torch.cat([tensor.view(-1).view(torch.uint8) for _, tensor in piece])
        sent += flat.numel() * receivers
        if near:
            _send_shared(engine, bucket, flat)
        else:
            group = _send_gloo(engine, bucket, flat, receivers, group)
    engine.weights("finish", {})
    engine.finish_update(version)
    return sent


def _replicas_behind(model: torch.nn.Module, engine: EngineUpdates, version: int) -> list[dict[str, Any]]:
    """The replicas that lack `version`, paused for it. Raises ValueError where they run another model than `model`."""
    behind = [replica for replica in engine.begin_update(version) if not replica["current"]]
    for replica in behind:
        if wrong := _difference(replica["parameters"], parameter_shapes(model)):
            engine.weights("cancel", {})
            raise ValueError(f"the weights do not fit the engine's model: {wrong}")
    return behind


def parameter_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """Also of what ZeRO-3 holds in shards."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def _difference(engines: dict[str, list[int]], ours: dict[str, list[int]]) -> str:
    for name in [*engines, *ours]:
        if engines.get(name) != ours.get(name):
            return f"{name} has shape {ours.get(name)}, not {engines.get(name)}"
    return ""


def _to_the_end(parameters: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Gathering is a collective: the other ranks would wait for ever for one that leaves it half-way."""
    for _ in parameters:
        pass


def push_nccl(
    model: torch.nn.Module, zero_stage: int, rank: int, engine: EngineUpdates, version: int
) -> dict[str, float]:
    """As push_cpu, from GPU to GPU by vLLM's own NCCL backend; a fresh group a push, so that replaced replicas join."""
    import ray
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    parameters = full_parameters(model.named_parameters(), zero_stage)

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            return [ParamMeta(name, dtypes[name], tuple(shape)) for name, shape in parameter_shapes(model).items()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return parameters

    class Client:
        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            engine.weights("init", init_info | {"replicas": [replica["source"] for replica in behind]})

        def start_weight_update(self) -> None:
            engine.weights("start", {})

        def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
            engine.weights("update", update_info)

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            engine.weights("finish", {})

    started = time.monotonic()
    behind: list[dict[str, Any]] = []
    workers = 0
    try:
        if rank == 0:
            behind = _replicas_behind(model, engine, version)
            workers = sum(replica["workers"] for replica in behind)
        if behind:
            info = NCCLTrainerInitInfo(ray.util.get_node_ip_address(), free_port(), workers + 1, rank=rank)
            sender = NCCLTrainerWeightTransferEngine.trainer_init(info, client=Client(), source=Source())
            sender.send_weights()
            sender.shutdown()
            engine.finish_update(version)
    finally:
        _to_the_end(parameters)
    size = sum(
        parameter.dtype.itemsize * torch.Size(shape).numel()
        for parameter, shape in zip(model.parameters(), parameter_shapes(model).values(), strict=True)
    )
    return {"push_bytes": float(size * workers), "push_seconds": time.monotonic() - started if rank == 0 else 0.0}


def _send_shared(engine: EngineUpdates, bucket: Bucket, flat: torch.Tensor) -> None:
    """Through anonymous memory: nothing of it stays when this process is killed, and /dev/shm may be small."""
    memory = os.memfd_create("raygent-weights")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(flat.numpy().data)
        bucket.file = f"/proc/{os.getpid()}/fd/{memory}"
        engine.weights("update", asdict(bucket))
    finally:
        os.close(memory)


def _send_gloo(engine: EngineUpdates, bucket: Bucket, flat: torch.Tensor, receivers: int, group: Any) -> Any:
    """Broadcast one bucket to `receivers` processes while the engines wait for it inside their update."""
    from concurrent.futures import ThreadPoolExecutor

    import ray

    from raygent.actors.engine_handle import EngineUnavailable

    host, port = ray.util.get_node_ip_address(), 0
    store: Any = None
    if group is None:
        store = torch.distributed.TCPStore(
            host, 0, receivers + 1, is_master=True, wait_for_workers=False, timeout=GLOO_TIMEOUT
        )
        port = store.port
    bucket.gloo = {"host": host, "port": port, "size": receivers + 1}
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(engine.weights, "update", asdict(bucket))
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            if group is None:
                group = (torch.distributed.ProcessGroupGloo(store, 0, receivers + 1, GLOO_TIMEOUT), store)
            group[0].broadcast([flat], options).wait()
        except RuntimeError as error:  # gloo's, and the store's DistStoreError: a receiver is gone
            raise EngineUnavailable(f"update: {error}") from error
        answered.result()
    return group


def node_name() -> str:
    """Names the machine, and on it the processes that can open each other's memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def register() -> None:
    """Entry point of `vllm.general_plugins`: makes the backend known in every vLLM process, EngineCore included."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "raygent.actors.weight_receiver", "CpuWeightReceiver")
