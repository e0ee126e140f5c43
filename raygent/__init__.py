"""raygent trains any AI agent, unchanged, behind another base_url. What an agent may import from here needs no Ray."""

from raygent.agent import ModelEndpoint
from raygent.emit import emit_reward, span

__all__ = ["ModelEndpoint", "emit_reward", "span"]
