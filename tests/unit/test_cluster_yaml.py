"""ray_cluster.yaml is what `ray up` accepts, scales from zero, and sends no usage statistics."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FILE = Path(__file__).parents[2] / "ray_cluster.yaml"
COMMANDS = (
    "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def accepted(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` takes it in: the provider's defaults filled in, then checked against Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_up_accepts_it(config):
    prepared = accepted(config)
    assert prepared["available_node_types"].keys() == {"head", "cpu", "gpu"}
    assert prepared["head_node_type"] == "head"


def test_rays_validator_would_say_no(config):
    config["idle_timeout"] = 3
    with pytest.raises(jsonschema.ValidationError):
        accepted(config)


def test_workers_scale_from_zero(config):
    for kind in ("cpu", "gpu"):
        node = accepted(config)["available_node_types"][kind]
        assert node["min_workers"] == 0 < node["max_workers"] <= config["max_workers"]
    assert config["available_node_types"]["gpu"]["node_config"]["InstanceType"].startswith(("g", "p"))


def test_usage_statistics_are_off_on_every_node(config):
    for role in ("head", "worker"):
        (start,) = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        assert "--disable-usage-stats" in start and "RAY_USAGE_STATS_ENABLED=0" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]


def test_the_commands_are_bash_and_install_what_the_repository_has(config):
    lines = [line for name in COMMANDS for line in config[name]]
    for line in lines:
        subprocess.run(["bash", "-n"], input=line, text=True, check=True)
    assert any("uv sync" in line and "--extra" in line for line in lines)
    assert (FILE.parent / "uv.lock").is_file() and list(config["file_mounts"].values()) == ["."]


def test_what_is_to_be_edited_says_so(config):
    """Nothing of an account of ours: images and the file system are placeholders."""
    images = [node["node_config"]["ImageId"] for node in config["available_node_types"].values()]
    assert set(images) == {"ami-EDIT"}
    assert set(re.findall(r"\b(?:ami|fs|sg|subnet)-\w+", FILE.read_text())) == {"ami-EDIT", "fs-EDIT"}
