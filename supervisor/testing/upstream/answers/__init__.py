"""The shapes in which providers tell an answer, one file each: pure functions from an `Answer` to events."""

from __future__ import annotations

from supervisor.testing.upstream.answers.anthropic import ANTHROPIC
from supervisor.testing.upstream.answers.cohere import COHERE
from supervisor.testing.upstream.answers.events import EVENTS
from supervisor.testing.upstream.answers.gemini import GEMINI, GEMINI_ARRAY
from supervisor.testing.upstream.answers.ollama import OLLAMA_CHAT, OLLAMA_GENERATE
from supervisor.testing.upstream.answers.openai_chat import OPENAI_CHAT
from supervisor.testing.upstream.answers.openai_completions import OPENAI_COMPLETIONS
from supervisor.testing.upstream.answers.openai_responses import OPENAI_RESPONSES, response, response_id
from supervisor.testing.upstream.answers.shape import Answer, Event, Failure, Shape, frame

__all__ = [
    "ANTHROPIC",
    "COHERE",
    "EVENTS",
    "GEMINI",
    "GEMINI_ARRAY",
    "OLLAMA_CHAT",
    "OLLAMA_GENERATE",
    "OPENAI_CHAT",
    "OPENAI_COMPLETIONS",
    "OPENAI_RESPONSES",
    "Answer",
    "Event",
    "Failure",
    "Shape",
    "frame",
    "response",
    "response_id",
]
