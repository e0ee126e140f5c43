"""ZeRO's stages are ways to lay out the same steps."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from plain import furthest, make_batch
from ranks import Arrays, on_ranks, start_group, weights

STEPS = 5


@pytest.mark.slow
def test_all_stages_give_the_same_weights_after_five_steps(cluster: None, tmp_path: Path) -> None:
    after: dict[int, Arrays] = {}
    for stage in (0, 1, 2, 3):
        group = start_group(tmp_path / str(stage), stage, tie=True)
        try:
            (before, _), batch = on_ranks(group.learners, weights), make_batch(group.model)
            for step in range(STEPS):
                assert group.learners.step(batch.samples(group.learners.config, group), step)["gradient_norm"] > 0
            after[stage], other_rank = on_ranks(group.learners, weights)
        finally:
            group.learners.stop()
        assert furthest(after[stage], other_rank) == 0
        assert furthest(after[stage], before) > 1e-2
    for one, other in combinations(after, 2):
        assert furthest(after[one], after[other]) < 1e-5, f"stage {one} and stage {other}"
