"""Which dialects there are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from supervisor.dialects.anthropic import ANTHROPIC
from supervisor.dialects.cohere import COHERE
from supervisor.dialects.dialect import Dialect
from supervisor.dialects.gemini import GEMINI, GEMINI_JSONARRAY
from supervisor.dialects.generic import GENERIC
from supervisor.dialects.native import NATIVE
from supervisor.dialects.ollama import OLLAMA
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.openai_completions import OPENAI_COMPLETIONS
from supervisor.dialects.openai_responses import OPENAI_RESPONSES
from supervisor.dialects.presets import COHERE_V1_NDJSON, GOOGLE_INTERACTIONS, OPENAI_ASSISTANTS
from supervisor.errors import ConfigurationError

__all__ = ["BUILTIN", "PRESETS", "find"]

BUILTIN: Final[Mapping[str, Dialect]] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            ANTHROPIC,
            COHERE,
            GEMINI,
            GEMINI_JSONARRAY,
            GENERIC,
            NATIVE,
            OLLAMA,
            OPENAI_CHAT,
            OPENAI_COMPLETIONS,
            OPENAI_RESPONSES,
        )
    }
)
"""The dialects of this package, by name."""

PRESETS: Final[Mapping[str, Dialect]] = MappingProxyType(
    {dialect.name: dialect for dialect in (COHERE_V1_NDJSON, GOOGLE_INTERACTIONS, OPENAI_ASSISTANTS)}
)
"""Providers' streams that are read as `generic`, by name."""


def find(name: str) -> Dialect:
    """Return a built-in dialect or a preset. Raises ConfigurationError, naming what exists, for a name that does not."""
    dialect = BUILTIN.get(name) or PRESETS.get(name)
    if dialect is None:
        raise ConfigurationError("dialect", name, f"one of {', '.join(sorted([*BUILTIN, *PRESETS]))}")
    return dialect
