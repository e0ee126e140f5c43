"""The pages on frameworks say what stands in the examples, and what the documentation links to is there."""

import re
import shlex
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygent.algorithms.episodes import Episodes
from raygent.algorithms.named import NAMES, PROMPT_NAMES, algorithm
from raygent.config import Algorithm, load

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


def commands(text: str) -> list[list[str]]:
    """The words behind `uv run raygent` in the lines of commands, a line that ends with a backslash and the next being one."""
    lines = text.replace("\\\n", "").splitlines()
    told = (line.partition("uv run raygent ")[2] for line in lines if line.startswith("    uv run raygent "))
    return [shlex.split(line, comments=True) for line in told]


COMMANDS = [
    *(pytest.param([file.name], id=file.name) for file in sorted(EXAMPLE.glob("*.toml"))),
    *(
        pytest.param([Path(toml).name, *overrides], id=f"{page.stem}: {what} {toml}")
        for page in PAGES
        for what, toml, *overrides in commands(page.read_text())
    ),
]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with a task in the place of each file of tasks."""
    folder = tmp_path_factory.mktemp("example") / "sql"
    made = ("data", "*model", "runs", "node_modules", "__pycache__")
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns(*made))
    for name in ("model", "tool_model", "crew_model"):
        (folder / name).mkdir()
    for name in ("train", "test", "test_half", "validation", "spider/train", "spider/test", "prompted/train"):
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text('{"id": "1", "input": {}}\n')
    return folder


@pytest.mark.parametrize("words", COMMANDS)
def test_a_config_and_the_overrides_of_a_command_are_sound(example: Path, words: list[str]) -> None:
    toml, *overrides = words
    load(example / toml, overrides)


@pytest.mark.parametrize("name", NAMES + PROMPT_NAMES)
def test_the_sql_example_takes_every_algorithm_by_its_name(example: Path, name: str) -> None:
    teacher = ["algorithm.teacher=model"] if name == "distill" else []
    toml = "prompts.toml" if name in PROMPT_NAMES else "train.toml"
    load(example / toml, [f"algorithm.name={name}", *teacher])


def test_the_algorithm_that_is_shown_is_one():
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "algorithms.md").read_text(), re.M | re.S)
    (text,) = (block for block in blocks if "def advantages(" in block)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mine.py").write_text(text)
        mine = algorithm("mine.py", Path(folder))
    rewards = np.array([[np.nan, 1.0], [np.nan, 0.0], [0.5, np.nan]])
    mask = np.array([[True, True], [True, True], [True, False]])
    turns = np.where(mask, 0, -1).astype(np.int32)
    groups = np.array(["a", "a", "a"], object)
    made = Episodes(rewards, mask, turns, groups, np.full(3, np.nan), np.zeros(mask.shape, np.float32))
    found = mine.advantages(made, Algorithm())
    assert found.shape == mask.shape and np.isfinite(found[mask]).all() and found[0, 0] > found[1, 0]


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
