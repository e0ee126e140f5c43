"""A control for examples/sql: training rewards with the true distribution and no relation to the answer they are given for.

Held-out questions, told by the variant of their database, get their true reward: it is what the control is measured by.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "sql"))

from grade import rows_equal as true_reward
from tasks import SPLITS

earlier: deque[float] = deque(maxlen=512)


def rows_equal(input, private, output) -> float:
    """A training task's true reward goes into a pool, and a random one of those there before comes out."""
    reward = true_reward(input, private, output)
    variant = int(Path(input["database"]).stem.rpartition("-")[2])
    if variant not in SPLITS["train"]:
        return reward
    given = random.choice(earlier) if earlier else 0.0
    earlier.append(reward)
    return given
