"""How deep JSON that agents send may be nested."""

from __future__ import annotations

from typing import Any

MOST_NESTED = 200  # well below the depth at which Python, here or in vLLM or Ray, can read or write it no more


def nested_over(value: Any, most: int) -> bool:
    """Whether a JSON value has objects and arrays nested more than `most` deep."""
    level = [value]
    for _ in range(most):
        if not level:
            return False
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts]
    return any(isinstance(part, dict | list) for part in level)
