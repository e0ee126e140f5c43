"""The Serve app of a run: start it, find it again from any process, delete it."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus, ProxyStatus

from raygent.actors.engine import Engine, environment
from raygent.actors.engine_handle import EngineHandle, EngineUnavailable
from raygent.actors.environment import free_port
from raygent.config import Config

logger = logging.getLogger("raygent")
START_DEADLINE_S = 1800.0
PROXY_DEADLINE_S = 300.0


def app_name(config: Config) -> str:
    return f"raygent-{config.run.name}"


def start_app(
    config: Config,
    secret: str,
    store_name: str,
    namespace: str,
    version: int | None,
    model: str,
) -> EngineHandle:
    """Start the engines on `model` (whose weights are policy version `version`) and wait until all of them serve.

    With None for a version they have loaded it and serve nobody before they are given their weights. The upstreams' keys go
    to the engines as an argument: a runtime_env would be logged.

    An app of the same name from an earlier life of the run is deleted first: its key and its weights are over.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    name = app_name(config)
    host, port = _start_proxies(config)
    delete_app(config)
    options: dict[str, Any] = {
        "num_replicas": config.engine.replicas,
        "ray_actor_options": {
            "num_cpus": 1,
            "num_gpus": config.engine.gpus,
            "runtime_env": {"env_vars": environment(config)},
        },
    }
    bound = Engine.options(**options).bind(config, secret, store_name, namespace, model, config.upstream_keys())  # type: ignore[attr-defined]
    _deploy(bound, name)
    engine = EngineHandle(name, f"http://{host}:{port}/{name}")
    if version is not None:
        engine.adopt(version)
    return engine


def delete_app(config: Config) -> None:
    """Delete the run's app and wait until it is gone; nothing happens where there is none."""
    if app_name(config) in serve.status().applications:
        serve.delete(app_name(config))


def _deploy(bound: Any, name: str) -> None:
    target = serve.RunTarget(bound, name=name, route_prefix=f"/{name}")
    serve.run_many([target], wait_for_applications_running=False)
    started = told = time.monotonic()
    while (status := serve.status().applications[name]).status != ApplicationStatus.RUNNING:
        if status.status == ApplicationStatus.DEPLOY_FAILED or time.monotonic() - started > START_DEADLINE_S:
            raise EngineUnavailable(f"the engine did not start: {status.message or status.status}")
        if time.monotonic() - told > 15:
            told = time.monotonic()
            print(f"waiting for the engine: {told - started:.0f} s", flush=True)
        time.sleep(0.5)


def _start_proxies(config: Config) -> tuple[str, int]:
    """Serve's address: that of the Serve that runs, else one started on engine.host and engine.port (0: a free port)."""
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        options = client.http_config
        host, port = options.host or "127.0.0.1", options.port
    else:
        host, port = config.engine.host, config.engine.port or free_port(config.engine.host)
        options = {"host": host, "port": port, "location": "HeadOnly"}
        try:
            serve.start(http_options=options, logging_config={"log_level": "WARNING"})
        except (RayError, TimeoutError) as error:  # Serve waits for it for a minute, too little on a busy machine
            logger.warning("Serve's proxy is slow to start: %s", str(error).splitlines()[0])
    _wait_for_proxies()
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]  # the proxy is there, wherever the driver is
    return (head if host == "0.0.0.0" else host), port


def _wait_for_proxies() -> None:
    started = time.monotonic()
    while ProxyStatus.HEALTHY not in (proxies := serve.status().proxies).values():
        if time.monotonic() - started > PROXY_DEADLINE_S:
            raise EngineUnavailable(f"Serve's HTTP proxies did not start: {proxies}")
        time.sleep(0.5)
