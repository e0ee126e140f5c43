"""The engines of a run as other processes reach them: no torch and no vLLM behind it, so that workers start fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from raygent.records import AttemptKey, last_line

CALL_TIMEOUT_S = 300.0
LOST = (RayError, RayServeException, TimeoutError)


class EngineError(RuntimeError):
    """A replica did not do what it was asked."""


class EngineUnavailable(EngineError):
    """No replica answered: it is being replaced, or the app did not come up. Asked again it may be there."""


class EngineFailed(EngineError):
    """A replica answered with an error of its own, the last line of which this is."""


@dataclass(frozen=True)
class EngineHandle:
    """The engines of one run, from any process of the cluster. Each method asks every replica at once."""

    app: str
    base_url: str  # http://host:port/app, with no /v1

    def broadcast(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """The replicas' answers. Raises EngineUnavailable where one died or none is there, whatever the others say of that,
        else EngineFailed where one raised."""
        try:
            answers = (
                serve.get_deployment_handle("Engine", self.app)
                .broadcast(method, *arguments)
                .results(timeout_s=timeout_s, return_exceptions=True)
            )
        except LOST as error:
            raise EngineUnavailable(f"{method}: {error}") from error
        if not answers:
            raise EngineUnavailable(f"{method}: no replica is running")
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if gone := [error for error in errors if _gone(error)]:
            raise EngineUnavailable(f"{method}: {last_line(gone[0])}") from gone[0]
        if errors:
            raise EngineFailed(f"{method}: {last_line(errors[0])}") from errors[0]
        return answers

    def status(self) -> list[dict[str, Any]]:
        return self.broadcast("status", timeout_s=30.0)

    def close_attempts(self, attempts: list[AttemptKey]) -> dict[AttemptKey, dict[str, dict[str, Any]]]:
        """End attempts on every replica: {attempt: {source: what Engine.close_attempts tells of it}}."""
        answers = self.broadcast("close_attempts", attempts)
        return {attempt: {source: closed[attempt] for source, closed in answers} for attempt in attempts}

    def recall_budgets(self) -> list[dict[str, Any]]:
        """No upstream begins a call before `grant_budgets`. What status tells."""
        return self.broadcast("recall_budgets", timeout_s=30.0)

    def grant_budgets(self, budgets: dict[str, float]) -> None:
        """Dollars by upstream, to each replica as many."""
        self.broadcast("grant_budgets", budgets, timeout_s=30.0)

    def adopt(self, version: int) -> None:
        self.broadcast("adopt", version)

    def begin_update(self, version: int) -> list[dict[str, Any]]:
        return self.broadcast("begin_update", version)

    def weights(self, step: str, payload: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.broadcast("weights", step, payload)

    def load_adapters(self, adapters: dict[str, dict[str, bytes]]) -> None:
        """By policy, the files of its LoRA adapter, as the version that begin_update named."""
        self.broadcast("load_adapters", adapters)

    def finish_update(self, version: int) -> None:
        self.broadcast("finish_update", version)


def _gone(error: Exception) -> bool:
    """Whether a replica's answer tells that it's not there; a RayTaskError is what it raised itself."""
    return isinstance(error, EngineUnavailable) or (isinstance(error, LOST) and not isinstance(error, RayTaskError))
