"""The engines of a run as other processes reach them: no torch and no vLLM behind it, so that workers start fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

CALL_TIMEOUT_S = 300.0


class EngineUnavailable(RuntimeError):
    """No replica answered: it is being replaced, or the app did not come up."""


@dataclass(frozen=True)
class EngineHandle:
    """The engines of one run, from any process of the cluster. Each method asks every replica at once."""

    app: str
    base_url: str  # http://host:port/app, with no /v1

    def broadcast(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """The replicas' answers. Raises EngineUnavailable where one died or none is there."""
        try:
            answers = (
                serve.get_deployment_handle("Engine", self.app)
                .broadcast(method, *arguments)
                .results(timeout_s=timeout_s)
            )
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineUnavailable(f"{method}: {error}") from error
        if not answers:
            raise EngineUnavailable(f"{method}: no replica is running")
        return answers

    def status(self) -> list[dict[str, Any]]:
        return self.broadcast("status", timeout_s=30.0)

    def close_attempts(self, attempts: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
        """End attempts on every replica: {attempt: {source: {"calls", "overflow", "over_max_calls", "failed", "spans"}}}."""
        answers = self.broadcast("close_attempts", attempts)
        return {attempt: {source: closed[attempt] for source, closed in answers} for attempt in attempts}

    def adopt(self, version: int) -> None:
        self.broadcast("adopt", version)

    def begin_update(self, version: int) -> list[dict[str, Any]]:
        return self.broadcast("begin_update", version)

    def weights(self, step: str, payload: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.broadcast("weights", step, payload)

    def finish_update(self, version: int) -> None:
        self.broadcast("finish_update", version)
