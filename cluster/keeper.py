"""The keeper: a small detached actor, one a run, that deletes the run's Serve app when the driver is gone.

The driver owns the store, so the store's name is the driver's sign of life: Ray takes it away with the driver, however that
ended. A driver that comes back within `run.grace_s` finds its keeper there. A keeper that dies Ray starts again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygent.config import Config

logger = logging.getLogger("raygent")
LOOK_S = 1.0


class Keeper:
    def __init__(self, app: str, store_name: str, namespace: str, grace_s: float) -> None:
        self.app, self.store_name, self.namespace, self.grace_s = app, store_name, namespace, grace_s
        threading.Thread(target=self._watch, name="keeper", daemon=True).start()

    def _watch(self) -> None:
        """Deletes the app, and ends this actor, once the driver was gone for the grace time."""
        try:
            seen = time.monotonic()
            while time.monotonic() - seen < self.grace_s:
                time.sleep(LOOK_S)
                if self._driver_lives():
                    seen = time.monotonic()
            end_app(self.app)
            ray.kill(ray.get_runtime_context().current_actor)
        except Exception:  # whatever Ray or Serve raised: Ray starts the keeper again, and it looks once more
            logger.exception("keeper of %s", self.app)
            os._exit(1)

    def _driver_lives(self) -> bool:
        try:
            ray.get_actor(self.store_name, self.namespace)
        except ValueError:
            return False
        except RayError as error:  # nobody could tell
            logger.warning("keeper of %s: %s", self.app, error)
        return True


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """For what has to live as long as the driver: its node is the head, others may be taken back at any time."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def keeper_name(app: str) -> str:
    return f"{app}-keeper"


def start_keeper(config: Config, app: str, store_name: str, namespace: str) -> None:
    """The run's keeper, watching; a left-over of an earlier life is replaced. Call it once the store is there."""
    stop_keeper(app, namespace)
    actor: Any = ray.remote(Keeper)
    actor.options(
        name=keeper_name(app),
        namespace=namespace,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy=beside_the_driver(),
    ).remote(app, store_name, namespace, config.run.grace_s)


def stop_keeper(app: str, namespace: str) -> None:
    try:
        ray.kill(ray.get_actor(keeper_name(app), namespace))
    except ValueError:
        return  # none is there


def end_app(app: str) -> None:
    """Delete the app, and Serve itself where no other app is left, nor the keeper of a run that may be about to have one."""
    if serve.context._get_global_client(raise_if_no_controller_running=False) is None:
        return
    if app in serve.status().applications:
        serve.delete(app)
    keepers = {actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["name"].endswith("-keeper")}
    if not serve.status().applications and not keepers - {keeper_name(app)}:
        serve.shutdown()
