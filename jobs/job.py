"""What the jobs share: a command line of CONFIG [section.key=value ...], of which wrong input is one line and status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from raygent.cluster.start import quiet_environment
from raygent.config import Config, ConfigError, load
from raygent.jobs.check import check


def run_job(arguments: list[str], do: Callable[[Config], None], learn: bool = True) -> int:
    """`do(config)` once the config is known to be right (see check()); the exit status. Import Ray and torch within `do`, not
    before."""
    quiet_environment()
    try:
        if not arguments:
            raise ConfigError("CONFIG: missing; give the run's TOML, then overrides as run.steps=20")
        config = load(arguments[0], arguments[1:])
        check(config, learn)
        do(config)
    except ConfigError as error:
        print(f"raygent: {error}", file=sys.stderr)
        return 2
    return 0
