"""What the driver asks of the parts, where it can be told without them."""

from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conversations import config

from raygent.actors import weight_transfer
from raygent.actors.engine_handle import EngineUnavailable
from raygent.cluster.parts import GateError, Parts
from raygent.records import Sample


@pytest.fixture
def parts(tmp_path):
    made = Parts(config(run={"directory": str(tmp_path)}))
    made.version = 2
    return made


def sample(versions: list[int], logprobs: list[float]) -> Sample:
    known = np.array(logprobs, np.float32)
    mask, versions_of = np.ones(len(known), bool), np.array(versions, np.int32)
    return Sample("r", "g", "main", versions_of, mask, known, known * 0, versions_of, known * 0 + 1)


def test_the_gate_compares_tokens_of_the_current_weights_alone(parts):
    parts.learners = SimpleNamespace(logprobs=lambda samples: [np.zeros(len(one), np.float32) for one in samples])
    parts.gate([sample([1, 1], [-9.0, -9.0])])
    assert not parts.gated
    with pytest.raises(GateError, match=r"differ by 0\.5 in mean over 2 tokens"):
        parts.gate([sample([1, 2], [-9.0, -1.0]), sample([2], [0.0])])
    parts.gate([sample([1, 2], [-9.0, 0.0])])
    assert parts.gated


def test_without_learners_a_replaced_replica_adopts_what_it_loaded(parts):
    adopted: list[int] = []
    parts.learners = None
    parts.engine = SimpleNamespace(status=lambda: [{"version": 2}, {"version": -1}], adopt=adopted.append)
    parts.heal()
    assert adopted == [2]


def test_a_push_by_gloo_without_its_receiver_is_the_engines_failing(monkeypatch):
    monkeypatch.setattr(weight_transfer, "GLOO_TIMEOUT", timedelta(seconds=1))
    engine, bucket = SimpleNamespace(weights=lambda *_: None), weight_transfer.Bucket(["w"], ["uint8"], [[8]])
    with pytest.raises(EngineUnavailable):
        weight_transfer._send_gloo(engine, bucket, torch.zeros(8, dtype=torch.uint8), 1, None)
