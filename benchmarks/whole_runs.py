"""What the benchmarks share that compare whole `raygent train` runs by their held-out gains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SQL = ROOT / "examples" / "sql"
RESULTS = ROOT / "benchmarks" / "results"


def prepare(script: str = "prepare.py") -> None:
    """The SQL example's data and a model of it, where they are not made yet."""
    subprocess.run([sys.executable, str(SQL / script)], check=True)


def train(toml: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The summary.json of a run made anew in `folder`. Raises CalledProcessError where it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    where = [f"run.directory={folder.parent}", f"run.name={folder.name}"]
    subprocess.run([sys.executable, "-m", "raygent.cli", "train", str(toml), *where, *overrides], check=True)
    return json.loads((folder / "summary.json").read_text())


def names_and_overrides(
    arguments: list[str], known: Iterable[str], default: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """The names and the `section.key=value` of a command line; without a name `default`, or all that are known. Ends the process
    where one is unknown."""
    names = [argument for argument in arguments if "=" not in argument]
    if unknown := set(names) - set(known):
        sys.exit(f"no {', '.join(sorted(unknown))} here; there are {', '.join(known)}")
    return names or list(default or known), [argument for argument in arguments if "=" in argument]


def save(path: Path, found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def print_gains(held_out: dict[str, dict[str, Any]]) -> None:
    """A line for each name's `held_out` of its summary."""
    wide = max(map(len, held_out))
    print(f"{'':{wide}} {'n':>4} {'before':>7} {'after':>7} {'gain':>7}  95 % interval")
    for name, told in held_out.items():
        low, high = told["gain_ci95"]
        print(
            f"{name:{wide}} {told['n']:4} {told['before']:7.3f} {told['after']:7.3f} {told['gain']:+7.3f}  [{low:+.3f}, {high:+.3f}]"
        )
