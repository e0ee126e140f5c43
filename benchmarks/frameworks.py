"""Does the agent of each framework learn? One whole `raygent train` for each example on its held-out questions.

    uv run python benchmarks/frameworks.py [NAME ...] [section.key=value ...]

NAME: openai_agents, responses, mcp, anthropic_agent, node, langgraph, autogen_chat, crew; all where none is named. `gain` is the
mean reward after minus before, with its paired bootstrap 95 % interval. Puts each one's figures and curve into
benchmarks/results/frameworks/ as it ends. About 15 minutes each on 2 cores; of mcp, node and crew, a process a rollout, an
hour.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "sql"
RUNS = ROOT / "runs" / "frameworks"
RESULTS = ROOT / "benchmarks" / "results" / "frameworks"
EXAMPLE = {  # the TOML, and what is given besides
    "openai_agents": ("openai_agents.toml", []),
    "responses": ("openai_agents.toml", ["agent.run=openai_agents.py:answer_by_responses"]),
    "mcp": ("mcp.toml", []),
    "anthropic_agent": ("anthropic_agent.toml", []),
    "node": ("node.toml", []),
    "langgraph": ("langgraph.toml", []),
    "autogen_chat": ("autogen_chat.toml", []),
    "crew": ("crew.toml", []),
}


def run(name: str, overrides: list[str]) -> None:
    toml, own = EXAMPLE[name]
    folder = RUNS / name
    shutil.rmtree(folder, ignore_errors=True)
    where = [f"run.directory={RUNS}", f"run.name={name}"]
    command = [sys.executable, "-m", "raygent.cli", "train", str(EXAMPLES / toml), *where, *own, *overrides]
    subprocess.run(command, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    told = {key: summary[key] for key in ("steps", "held_out", "seconds", "mismatch", "rollouts", "tokens")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    shutil.copy(folder / "curve.png", RESULTS / f"{name}.png")


def main() -> None:
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    asked = [argument for argument in sys.argv[1:] if "=" not in argument] or list(EXAMPLE)
    if unknown := set(asked) - set(EXAMPLE):
        sys.exit(f"no example {', '.join(sorted(unknown))}; there are {', '.join(EXAMPLE)}")
    for made in sorted({"prepare_crew.py" if name == "crew" else "prepare_tools.py" for name in asked}):
        subprocess.run([sys.executable, str(EXAMPLES / made)], check=True)
    if "node" in asked and not (EXAMPLES / "node" / "node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=EXAMPLES / "node", check=True)
    for name in asked:
        run(name, overrides)
    print(f"{'example':16} {'n':>4} {'before':>7} {'after':>7} {'gain':>7}  95 % interval")
    for name in asked:
        found = json.loads((RESULTS / f"{name}.json").read_text())["held_out"]
        low, high = found["gain_ci95"]
        print(
            f"{name:16} {found['n']:4} {found['before']:7.3f} {found['after']:7.3f} {found['gain']:+7.3f}  [{low:+.3f}, {high:+.3f}]"
        )


if __name__ == "__main__":
    main()
