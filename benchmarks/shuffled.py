"""A control for examples/sql: rewards with the true distribution and no relation to the answer they are given for."""

from __future__ import annotations

import random
import sys
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "sql"))

from grade import rows_equal as true_reward

earlier: deque[float] = deque(maxlen=512)


def rows_equal(input, private, output) -> float:
    """The true reward goes into a pool; a random one of the pool's comes out."""
    earlier.append(true_reward(input, private, output))
    return random.choice(earlier)
