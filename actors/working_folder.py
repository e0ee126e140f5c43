"""The user's files as an actor finds them: on another node, in that node's copy of the job's working folder."""

from __future__ import annotations

import os
from pathlib import Path

from raygent.config import Config


def localised(config: Config, root: str) -> Config:
    """The config with the paths of this node, where the driver's folder `root` is a copy of this process's own."""
    here, path = working_folder(), Path(config.path)
    if root and not path.exists() and path.is_relative_to(root) and (here / path.relative_to(root)).exists():
        config.path = str(here / path.relative_to(root))
    return config


def working_folder() -> Path:
    """Where this process works. Two raylets on one machine share the copy of the job's files, and the second makes it anew:
    this process then works in a folder that is gone, and goes into the new one."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        os.chdir(os.environ["PWD"])
        return Path.cwd()
