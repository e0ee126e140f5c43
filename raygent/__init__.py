"""raygent trains any AI agent, unchanged, behind another base_url. What an agent may import from here needs no Ray."""

from raygent.callables import ModelEndpoint
from raygent.emit import agent, emit_reward, headers, span, tag
from raygent.prompts import prompt

__all__ = ["ModelEndpoint", "agent", "emit_reward", "headers", "prompt", "span", "tag"]
