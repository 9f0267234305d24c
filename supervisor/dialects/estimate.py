"""What an answer probably cost, where the provider did not say.

A provider that states usage does so at the end, so an answer that was stopped before it often has none. What is left is the
answer itself. One token is taken for four bytes of UTF-8, rounded up: that is what the providers' own documentation gives as
a rule of thumb for English (https://platform.openai.com/tokenizer: "one token generally corresponds to ~4 characters"), and
counting bytes in place of characters brings other scripts, whose characters take two to four bytes and more tokens each,
nearer to the truth. It is an estimate of output alone, for budgets and for a record that says `estimated`; a tokenizer for
each model would be closer, but it would be a dependency with megabytes of tables, and still wrong about reasoning that was
never shown.

Counted is what the model wrote: text, reasoning, refusal, and the names and arguments of tool calls, of all choices. Ids are
the server's.
"""

from __future__ import annotations

from typing import Final

from supervisor.dialects.base import Snapshot, Usage

__all__ = ["BYTES_PER_TOKEN", "estimate_tokens", "estimate_usage", "output_bytes"]

BYTES_PER_TOKEN: Final = 4


def estimate_tokens(nbytes: int) -> int:
    """Return how many tokens so many bytes of UTF-8 probably are: 0 only for 0."""
    return -(-nbytes // BYTES_PER_TOKEN)


def output_bytes(snapshot: Snapshot) -> int:
    """Return the length in UTF-8 of all that the model wrote. Costs as much as the answer is long."""
    return sum(
        _length(choice.text)
        + _length(choice.reasoning)
        + _length(choice.refusal)
        + sum(_length(call.name) + _length(call.arguments) for call in choice.tool_calls)
        for choice in snapshot.choices
    )


def estimate_usage(nbytes: int) -> Usage | None:
    """Return the output that an answer of this length probably took, None if there is none. Nothing is said of the input."""
    return Usage(output=estimate_tokens(nbytes)) if nbytes else None


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
