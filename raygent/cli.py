"""The command `raygent`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from raygent.cluster.start import before_ray, submit_and_follow
from raygent.config import Config, ConfigError, expanded, load

CONFIG_COMMANDS = {
    "train": "train the agent of CONFIG (given again: go on where the run stood)",
    "evaluate": "run the held-out tasks on the run's last checkpoint (another: evaluate.checkpoint), or the model of a run without one",
    "try": "run one task without training: the conversation, the reward, what was recorded",
}
MODULES = {
    "train": "raygent.jobs.train",
    "evaluate": "raygent.jobs.evaluate",
    "try": "raygent.jobs.try_agent",
}


class Parser(argparse.ArgumentParser):
    """Its errors are one line, as all of raygent's are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    try:
        asked = _parse(arguments)
        before_ray()
        if asked.command == "store":
            return _store(asked.what, expanded("RUN", asked.run))
        return _run(asked, load(asked.config, asked.overrides))
    except ConfigError as error:
        print(f"raygent: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="raygent", description="Train any AI agent, unchanged, on Ray.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in CONFIG_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", metavar="CONFIG", help="the run's TOML")
        command.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
        if name == "train":
            command.add_argument("--dry-run", action="store_true", help="check everything, start nothing")
        if name == "try":
            command.add_argument("--task", metavar="ID", help="the training task to run (default: the first)")
    store = commands.add_parser("store", help="look at a run's replay store")
    store.add_argument("what", choices=["inspect", "verify"])
    store.add_argument("run", metavar="RUN", help="the run's folder, as runs/NAME")
    asked, rest = parser.parse_known_args(arguments)
    if rest and (asked.command == "store" or any(word.startswith("-") for word in rest)):
        parser.error(f"unknown argument {rest[0]}")
    if rest:
        asked.overrides += rest  # argparse leaves those behind an option
    return asked


def _run(asked: argparse.Namespace, config: Config) -> int:
    from raygent.jobs.check import check
    from raygent.jobs.dry_run import dry_run

    if asked.command == "train" and asked.dry_run:
        dry_run(config)
        return 0
    arguments = [_path_for_job(config), *asked.overrides]
    if asked.command == "try":
        from raygent.jobs.try_agent import choose_task, config_to_try

        config = config_to_try(config)
        choose_task(config, asked.task)
        arguments += ["--task", asked.task] if asked.task else []
    if asked.command == "evaluate":
        from raygent.jobs.evaluate import held_out_tasks

        held_out_tasks(config)
    check(config, learn=asked.command == "train", emptied=asked.command == "try")
    return submit_and_follow(config, MODULES[asked.command], arguments)


def _path_for_job(config: Config) -> str:
    """The TOML as the job finds it: on a cluster in its own copy of the TOML's folder."""
    from raygent.jobs.check import SHARED, cluster_resources

    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        return config.path
    if not address.startswith("http"):
        raise ConfigError(
            f"RAY_ADDRESS: {address} is no dashboard; give http://HOST:8265, or unset it to run on this machine"
        )
    cluster_resources(address)
    if Path(config.run.directory).is_relative_to(config.folder):
        raise ConfigError(
            f"run.directory: {config.run.directory} would lie in the job's own copy of your files, {SHARED}"
        )
    return Path(config.path).name


def _store(what: str, run: Path) -> int:
    if not (run / "store" / "log").is_dir() and not (run / "log").is_dir():
        raise ConfigError(f"{run}: no run's folder; give runs/NAME, which holds store/")
    from raygent.jobs.store import inspect, verify

    return {"inspect": inspect, "verify": verify}[what](run)


if __name__ == "__main__":
    sys.exit(main())
