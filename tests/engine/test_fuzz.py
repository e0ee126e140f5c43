"""The short form of benchmarks/gateway_fuzz.py: whatever a client sends, no 5xx, and errors in the vendor's own shape."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gateway_fuzz import fuzz


def test_wrong_requests_are_refused_as_the_vendor_does(engine, store, attempt):
    ended, *mine = [attempt() for _ in range(101)]
    ended.close()
    endpoints = [(f"{one.base_url}/v1", one.key) for one in mine]  # so many that none makes more than MAX_CALLS calls
    answers, faults = asyncio.run(fuzz(endpoints, ended.key, requests=600, seed=3))
    print(dict(answers))
    assert not faults, "\n".join(faults)
    assert sum(answers.values()) == 600
    assert answers["ended 401"] and answers["json 400"] and answers["key 401"]
    assert all(name.split()[1] in ("401", "404") for name in answers if name.split()[0] in ("ended", "key"))
    assert answers["over 413"]
