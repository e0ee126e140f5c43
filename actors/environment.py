"""What the environment of a run's processes says, and which ports are free there."""

from __future__ import annotations

import socket

NO_TELEMETRY = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}


def offline(*models: str) -> dict[str, str]:
    """Where all of `models` are folders, nobody asks the hub for anything."""
    local = all(model.startswith("/") for model in models)
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if local else {}


def free_port(host: str = "") -> int:
    """Of `host`, "" for all addresses; free until somebody takes it."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
