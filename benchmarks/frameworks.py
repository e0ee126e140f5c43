"""Does the agent of each framework learn? One whole `raygent train` for each example on its held-out questions.

    uv run python benchmarks/frameworks.py [NAME ...] [section.key=value ...]

NAME: openai_agents, responses, mcp, anthropic_agent, node, langgraph, autogen_chat, crew; all where none is named. `gain` is the
mean reward after minus before, with its paired bootstrap 95 % interval. Puts each one's figures and curve into
benchmarks/results/frameworks/ as it ends. 15 to 30 minutes each on 2 cores; of mcp and node, which start a process for
each rollout, 60 to 85.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import whole_runs
from whole_runs import ROOT, SQL, names_and_overrides, prepare, print_gains, save, train

RUNS = ROOT / "runs" / "frameworks"
RESULTS = whole_runs.RESULTS / "frameworks"
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
    summary = train(SQL / toml, folder, [*own, *overrides])
    keys = ("steps", "held_out", "seconds", "mismatch", "rollouts", "tokens")
    save(RESULTS / f"{name}.json", {key: summary[key] for key in keys})
    shutil.copy(folder / "curve.png", RESULTS / f"{name}.png")


def main() -> None:
    asked, overrides = names_and_overrides(sys.argv[1:], EXAMPLE)
    for made in sorted({"prepare_crew.py" if name == "crew" else "prepare_tools.py" for name in asked}):
        prepare(made)
    if "node" in asked and not (SQL / "node" / "node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=SQL / "node", check=True)
    for name in asked:
        run(name, overrides)
    print_gains({name: json.loads((RESULTS / f"{name}.json").read_text())["held_out"] for name in asked})


if __name__ == "__main__":
    main()
