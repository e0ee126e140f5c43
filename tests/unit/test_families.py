"""The parsers of a model's family: chosen by what its chat template writes, overruled by the config, in what a run uses."""

import json
from pathlib import Path

import pytest
from tiny_model import TEMPLATE, THINKING_TEMPLATE, make_tiny_model

from raygent.actors.engine import vllm_flags
from raygent.config import ConfigError, load
from raygent.families import FAMILIES, NONE, parsers
from raygent.jobs.check import check, vllm_parsers
from raygent.jobs.dry_run import dry_run

QWEN = '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
HEADER = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
HISTORY = "{{- '<think>' + message.reasoning_content + '</think>' }}"
SWITCH = "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>' }}{% endif %}"


@pytest.mark.parametrize(
    ("model_type", "template", "expected"),
    [
        ("qwen2", QWEN + HEADER, ("hermes", NONE)),
        ("qwen3", QWEN + HISTORY + HEADER + SWITCH, ("hermes", "qwen3")),
        ("qwen3", QWEN + HISTORY + HEADER, ("hermes", NONE)),  # one that only knows of others' thinking
        ("qwen3_moe", QWEN + HISTORY + HEADER + "{{- '<think>\\n' }}", ("hermes", "qwen3")),
        ("qwen3_moe", "<tool_call>\n<function=example>" + HEADER, ("qwen3_coder", NONE)),
        ("qwen2", "{{'<｜Assistant｜>' + content.split('</think>')[-1]}}", (NONE, "deepseek_r1")),
        ("llama", "{{'<｜Assistant｜>' + content.split('</think>')[-1]}}", (NONE, "deepseek_r1")),
        ("llama", "a function call with its proper arguments that best answers the prompt", ("llama3_json", NONE)),
        ("mistral", '{{- "[TOOL_CALLS] [" }}', ("mistral", NONE)),
        ("gpt_oss", "<|start|>assistant<|channel|>analysis", ("openai", "openai_gptoss")),
        ("glm4_moe", "<arg_key>{k}</arg_key>" + HEADER + SWITCH, ("glm45", "glm45")),
        ("phi3", "<|tool|>{{ tools }}<|/tool|>", ("phi4_mini_json", NONE)),
        ("granitemoehybrid", QWEN, ("granite4", NONE)),
        ("qwen2", "{{ messages }}", (NONE, NONE)),  # a template that knows no tools
        ("llama", TEMPLATE, (NONE, NONE)),
        ("llama", THINKING_TEMPLATE, (NONE, NONE)),
        ("never_heard_of", QWEN, (NONE, NONE)),
        ("qwen3", "", (NONE, NONE)),
    ],
)
def test_a_family_is_known_by_its_template(model_type: str, template: str, expected: tuple[str, str]) -> None:
    assert parsers(model_type, template) == expected


def test_vllm_has_every_parser() -> None:
    assert {family.tool_parser for family in FAMILIES} - {NONE} <= set(vllm_parsers("tool_parsers"))
    assert {family.reasoning_parser for family in FAMILIES} - {NONE} <= set(vllm_parsers("reasoning"))


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A run of a model that says it is a Qwen3, by its config and its template."""
    folder = make_tiny_model(tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"model_type": "qwen3"}))
    (folder / "chat_template.jinja").write_text(QWEN + HEADER + SWITCH)
    (tmp_path / "agent.py").write_text("def answer(task, model):\n    return 1.0\n")
    (tmp_path / "train.jsonl").write_text('{"id": "1", "input": "1 + 1"}\n')
    path = tmp_path / "train.toml"
    path.write_text('[model]\npath = "model"\n[agent]\nrun = "agent.py:answer"\n[data]\ntrain = "train.jsonl"\n')
    return path


def flags(path: Path, *overrides: str) -> str:
    """vLLM's arguments in such a run."""
    config = load(path, list(overrides))
    check(config)
    return " ".join(vllm_flags(config, config.model.path))


def test_a_run_takes_the_familys_parsers_unless_told_otherwise(toml: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--tool-call-parser hermes --enable-auto-tool-choice --reasoning-parser qwen3 " in flags(toml)
    assert "--tool-call-parser granite --enable" in flags(toml, "model.tool_parser=granite")
    without = flags(toml, "model.reasoning_parser=none")
    assert "hermes" in without and "reasoning" not in without
    assert "parser" not in flags(toml, "model.reasoning_parser=none", "model.tool_parser=none")
    (toml.parent / "plain.jinja").write_text("{{ messages }}")
    assert "parser" not in flags(toml, "model.chat_template=plain.jinja")
    with pytest.raises(ConfigError, match=r"model\.tool_parser: vLLM has no 'hermez'; did you mean hermes\?"):
        flags(toml, "model.tool_parser=hermez")
    config = load(toml)
    dry_run(config)
    assert "tool calls: hermes, reasoning: qwen3" in capsys.readouterr().out
    assert 'tool_parser = "hermes"' in config.to_toml()


def test_templates_are_found_wherever_a_model_keeps_them(toml: Path) -> None:
    template, folder = QWEN + HEADER, toml.parent / "model"
    (folder / "chat_template.jinja").unlink()
    assert "parser" not in flags(toml)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": template}]
    for kept in (template, named):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": kept}))
        assert "--tool-call-parser hermes" in flags(toml)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert "--tool-call-parser hermes" in flags(toml)
