"""The pages on frameworks say what stands in the examples, and what the documentation links to is there."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from raygent.algorithms.named import NAMES, algorithm

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sql"
PAGES = sorted((ROOT / "docs" / "frameworks").glob("*.md"))
TEXTS = [ROOT / "README.md", EXAMPLE / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: Path, *languages: str) -> list[tuple[Path, str]]:
    """The file that a block of code names in its first line, and the rest of the block."""
    blocks = re.findall(rf"^```({'|'.join(languages)})\n(?:#|//) (\S+)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(EXAMPLE / name, text) for _, name, text in blocks]


def is_part(told: Any, whole: Any) -> bool:
    if isinstance(told, dict):
        return all(key in whole and is_part(value, whole[key]) for key, value in told.items())
    return told == whole


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_frameworks_page_has_the_examples_lines_its_toml_and_its_commands(page):
    code, configs = snippets(page, "python", "js"), snippets(page, "toml")
    assert code and len(configs) == 1
    for file, text in code:
        there = file.read_text()
        for part in re.split(r"^ *\.\.\.\n", text, flags=re.M):
            assert part.strip("\n") in there, f"{page.name}: not in {file.name}:\n{part}"
    (file, text) = configs[0]
    assert is_part(tomllib.loads(text), tomllib.loads(file.read_text()))
    for command in ("try", "train"):
        assert f"uv run raygent {command} {file.relative_to(ROOT)}\n" in re.sub(r" +#.*", "", page.read_text())
    assert "**What is recorded.**" in page.read_text()


def test_the_table_of_algorithms_has_each_with_its_defaults():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs" / "algorithms.md").read_text(), re.M)
    told = {name: rest.rpartition("|")[2] for name, rest in rows if name in NAMES}
    assert told.keys() == set(NAMES)
    for name, text in told.items():
        settings = tomllib.loads("\n".join(re.findall(r"`(\w+ = [^`]+)`", text)))
        assert settings == algorithm(name, ROOT).defaults, name


def test_each_example_has_a_page():
    told = {file.name for page in PAGES for file, _ in snippets(page, "toml")}
    assert told == {file.name for file in EXAMPLE.glob("*.toml") if not file.match("*qwen.toml")} - {"prompts.toml"}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_what_is_linked_to_is_there(text):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text.read_text()):
        path, _, anchor = target.partition("#")
        file = (text.parent / path).resolve() if path else text
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )
