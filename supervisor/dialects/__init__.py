"""Sans-IO: wire events in, deltas, terminal marker, usage and errors out. One file per provider."""

from supervisor.dialects.anthropic import ANTHROPIC
from supervisor.dialects.base import (
    Choice,
    Delta,
    Fault,
    FaultKind,
    Reader,
    Snapshot,
    ToolCall,
    ToolCallDelta,
    UnparseableError,
    Usage,
)
from supervisor.dialects.catalog import BUILTIN, PRESETS, find
from supervisor.dialects.cohere import COHERE
from supervisor.dialects.dialect import Asking, Call, Dialect, Endings, Progress
from supervisor.dialects.fold import Fold
from supervisor.dialects.gemini import GEMINI, GEMINI_JSONARRAY
from supervisor.dialects.generic import GENERIC, generic
from supervisor.dialects.native import NATIVE
from supervisor.dialects.ollama import OLLAMA
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.openai_completions import OPENAI_COMPLETIONS
from supervisor.dialects.openai_responses import OPENAI_RESPONSES
from supervisor.dialects.prefill import PrefillForm, chat_continuation
from supervisor.dialects.reading import BodyReader, Sink

__all__ = [
    "ANTHROPIC",
    "BUILTIN",
    "COHERE",
    "GEMINI",
    "GEMINI_JSONARRAY",
    "GENERIC",
    "NATIVE",
    "OLLAMA",
    "OPENAI_CHAT",
    "OPENAI_COMPLETIONS",
    "OPENAI_RESPONSES",
    "PRESETS",
    "Asking",
    "BodyReader",
    "Call",
    "Choice",
    "Delta",
    "Dialect",
    "Endings",
    "Fault",
    "FaultKind",
    "Fold",
    "PrefillForm",
    "Progress",
    "Reader",
    "Sink",
    "Snapshot",
    "ToolCall",
    "ToolCallDelta",
    "UnparseableError",
    "Usage",
    "chat_continuation",
    "find",
    "generic",
]
