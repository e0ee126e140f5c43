"""What is added to rewards before they are compared."""

from __future__ import annotations

from raygent.config import Algorithm


def overlong_penalty(tokens: int, settings: Algorithm) -> float:
    """DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, eq. 13) of what sampled so many tokens: 0 as long as
    there are `overlong_buffer` and more left to `overlong_tokens`, from there falling to -1."""
    longest, buffer = settings.overlong_tokens, settings.overlong_buffer
    if not longest:
        return 0.0
    return -min(1.0, max(0.0, (tokens - (longest - buffer)) / buffer))
