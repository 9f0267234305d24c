"""Which dialects there are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from supervisor.dialects.anthropic import ANTHROPIC
from supervisor.dialects.cohere import COHERE
from supervisor.dialects.dialect import Dialect
from supervisor.dialects.gemini import GEMINI, GEMINI_JSONARRAY
from supervisor.dialects.native import NATIVE
from supervisor.dialects.ollama import OLLAMA
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.openai_completions import OPENAI_COMPLETIONS
from supervisor.dialects.openai_responses import OPENAI_RESPONSES
from supervisor.errors import ConfigurationError

__all__ = ["BUILTIN", "find"]

BUILTIN: Final[Mapping[str, Dialect]] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            ANTHROPIC,
            COHERE,
            GEMINI,
            GEMINI_JSONARRAY,
            NATIVE,
            OLLAMA,
            OPENAI_CHAT,
            OPENAI_COMPLETIONS,
            OPENAI_RESPONSES,
        )
    }
)
"""The dialects of this package, by name."""


def find(name: str) -> Dialect:
    """Return a built-in dialect. Raises ConfigurationError, naming what exists, for a name that does not."""
    try:
        return BUILTIN[name]
    except KeyError:
        raise ConfigurationError("dialect", name, f"one of {', '.join(sorted(BUILTIN))}") from None
