"""What an outcome, and what a reward, depends on besides task, weights and prompts, in 8 hexadecimal digits: by these rollouts and
evaluations of before are known to tell of the same thing, or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from raygent.config import Config


def evaluation_digest(config: Config) -> str:
    """A digest of what an outcome depends on besides the task, the weights and the prompts, as it is when this process begins. Of
    files, the text of those that the config names; what they import is not looked at."""
    template = config.model.chat_template
    return digest(
        config.agent.model_dump(exclude={"train", "policies"}),
        _texts(config, _agent(config)),
        config.model.model_dump(exclude={"path", "chat_template"}),
        template and Path(template).read_text(errors="replace"),
        [config.engine.continuation, config.engine.vllm_arguments()],
        {name: [one.agents, one.base_url, one.model] for name, one in config.upstream.items()},
        judge_digest(config),
    )


def judge_digest(config: Config) -> str:
    """The same of a reward, besides the task and the output: the grader, or else the agent itself."""
    judges = [config.grader.run] if config.grader.run else _agent(config)
    return digest(judges, _texts(config, judges), config.grader.failed_reward, config.grader.timeout_s)


def _agent(config: Config) -> list[str]:
    return [config.agent.run] if config.agent.run else config.agent.command or []


def _texts(config: Config, words: list[str]) -> list[str]:
    """Of the files beside the TOML that are named in `words`, as "file.py:function", or anywhere in a shell's command."""
    named = [part for word in words for part in word.split()]
    paths = [config.folder / part.partition(":")[0] for part in named]
    # os.path's is False of a word that cannot be a path; Path's raises
    return [path.read_text(errors="replace") for path in paths if os.path.isfile(path)]


def digest(*of: Any) -> str:
    """8 hexadecimal digits of what JSON has of these."""
    return hashlib.sha256(json.dumps(of, default=str).encode()).hexdigest()[:8]
