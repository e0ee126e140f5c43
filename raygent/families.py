"""Which of vLLM's parsers a model's replies need: by its family, and by what its chat template shows that it writes.

A family is taken only where the template has its mark, for that is the text its parser looks for: a base model, or one
with a template of its own, gets none. `model.tool_parser` and `model.reasoning_parser` go before; "none" switches off.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import NamedTuple

NONE = "none"
OPENS = r"(?s)add_generation_prompt.*<think>"  # or closes it again: not those whose template knows thinking from history alone


class Family(NamedTuple):
    model_type: str  # pattern of the `model_type` in config.json
    mark: str  # stands in the chat template of those that call tools this way
    tool_parser: str
    thinking: str = ""  # regular expression, found in the chat template of those that think; "": none does
    reasoning_parser: str = NONE


FAMILIES = (  # the first that fits
    Family("qwen*", "<｜Assistant｜>", NONE, "</think>", "deepseek_r1"),  # DeepSeek-R1, distilled
    Family("llama", "<｜Assistant｜>", NONE, "</think>", "deepseek_r1"),
    Family("qwen*", "<function=", "qwen3_coder", OPENS, "qwen3"),  # Qwen3-Coder, Qwen3.5
    Family("qwen*", "<tool_call>", "hermes", OPENS, "qwen3"),  # Qwen2.5, QwQ, Qwen3
    Family("llama", "with its proper arguments that best answer", "llama3_json"),  # Llama 3.1, 3.2, 3.3
    Family("*mistral*", "[TOOL_CALLS]", "mistral", r"\[THINK\]", "mistral"),  # Ministral, Magistral
    Family("mixtral", "[TOOL_CALLS]", "mistral"),
    Family("gpt_oss", "<|channel|>", "openai", r"<\|channel\|>", "openai_gptoss"),
    Family("glm4_moe*", "<arg_key>", "glm45", OPENS, "glm45"),  # GLM-4.5, 4.6, 4.7
    Family("phi3", "<|tool|>", "phi4_mini_json"),  # Phi-4-mini
    Family("granite*", "<|tool_call|>", "granite"),  # Granite 3
    Family("granite*", "<tool_call>", "granite4"),
    Family("gemma4*", "<|tool_call>", "gemma4", r"<\|channel>", "gemma4"),
    Family("kimi_k2", "<|tool_calls_section_begin|>", "kimi_k2", "<think>", "kimi_k2"),
    Family("minimax_m2", "<minimax:tool_call>", "minimax_m2", OPENS, "minimax_m2"),
    Family("seed_oss", "<seed:tool_call>", "seed_oss", "<seed:think>", "seed_oss"),
    Family("olmo3", "<function_calls>", "olmo3", OPENS, "olmo3"),
    Family("lfm2*", "<|tool_call_start|>", "lfm2"),
)


def parsers(model_type: str, template: str) -> tuple[str, str]:
    """The names of vLLM's tool parser and reasoning parser for a model; "none" where none is known to fit."""
    for family in FAMILIES:
        if fnmatch(model_type, family.model_type) and family.mark in template:
            thinks = family.thinking and re.search(family.thinking, template)
            return family.tool_parser, family.reasoning_parser if thinks else NONE
    return NONE, NONE
