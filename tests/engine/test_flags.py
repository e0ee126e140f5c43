"""What the TOML's [engine] says reaches vLLM's own parser as it was meant."""

import json
from itertools import pairwise

from attempts import engine_config

from raygent.actors.engine import vllm_flags


def test_settings_reach_vllm(tmp_path):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = {
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "enable_chunked_prefill": True,
        "max_num_seqs": 7,
        "gpu_memory_utilization": 0.5,
        "hf_overrides": {"rope_scaling": {"factor": 2.0}},
        "override_generation_config": {"top_k": 5},
        "allowed_media_domains": ["one.org", "two.org"],
    }
    config = engine_config("flags", tmp_path, tmp_path / "model", **given)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm_flags(config, "model"))
    assert {name: getattr(parsed, name) for name in given} == given
    assert parsed.enable_auto_tool_choice and not parsed.enable_log_requests
    assert parsed.logprobs_mode == "processed_logprobs"


def test_weights_go_through_memory_where_one_gpu_is_shared(tmp_path):
    for learner, engine, backend, size in ((1, 2, "nccl", 2), (0.5, 0.5, "raygent_cpu", 1), (1, 0.5, "raygent_cpu", 1)):
        config = engine_config("flags", tmp_path, tmp_path / "model")
        config.learner.gpus, config.engine.gpus = learner, engine
        flags = vllm_flags(config, "model")
        told = dict(pairwise(flags))
        assert json.loads(told["--weight-transfer-config"])["backend"] == backend
        assert told["--tensor-parallel-size"] == str(size)
