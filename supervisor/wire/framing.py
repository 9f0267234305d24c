"""Which framing a body is in: what it is said to be, corrected by its first bytes.

Servers label one framing as another, errors come as JSON in place of a stream, and a recorded body has no label at all. But
the framings begin so differently that a few bytes tell:

| first byte that is not blank | framing |
|---|---|
| `{` | lines, if lines are expected (by the content type or the dialect) and the first line is whole JSON; else JSON values |
| `[` | lines, if the content type says so and the first line is whole JSON; else a JSON array |
| `"` | the one that is expected |
| any other | an event stream: no JSON begins like its fields or comments, and its decoder survives whatever else it is |

Streams of bare numbers or of `true` are not expected of anybody: `404 page not found` begins like one.

The decision depends on the bytes only, not on how they were cut into reads.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

__all__ = ["BodyFraming", "FramingChooser", "framing_by_type"]

BodyFraming = Literal["sse", "ndjson", "json-array"]

MAX_INDENT_BYTES: Final = 1024
"""How many blanks before the first other byte of its line are waited for; after that, it is what is expected."""

_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = b" \t\r\n\x1e"
_LINE_END: Final = re.compile(rb"[\r\n]")
_LINES: Final = re.compile(
    r"application/(x-)?(ndjson|jsonl|jsonlines|json-lines|json-?seq|json-stream|stream\+json)"
    r"|text/(x-)?(ndjson|jsonl|jsonlines)"
)
_JSON: Final = re.compile(r"(application|text)/(x-)?json|[a-z]+/[a-z0-9.-]+\+json")


def framing_by_type(content_type: str | None) -> BodyFraming | None:
    """Return the framing that a content type names, if it names one."""
    media = (content_type or "").partition(";")[0].strip().lower()
    if media == "text/event-stream":
        return "sse"
    if _LINES.fullmatch(media):
        return "ndjson"
    return "json-array" if _JSON.fullmatch(media) else None


class FramingChooser:
    """Looks at the beginning of a body until its framing is clear, and keeps what it has looked at: `head`.

    dialect: the dialect's framing. content_type: what the response says. max_line_bytes: how long a first line may be, to be
    judged by whether it is JSON.
    """

    __slots__ = ("_dialect", "_kept", "_limit", "_line_from", "_said", "comments", "head")

    def __init__(
        self, dialect: BodyFraming, content_type: str | None = None, *, max_line_bytes: int = 1 << 20
    ) -> None:
        self.head = bytearray()
        """What was fed, from the first line on that is not blank, with at most one blank line before it."""
        self.comments = 0
        """Blank lines before that."""
        self._dialect = dialect
        self._kept = 0
        self._said = framing_by_type(content_type)
        self._limit = max_line_bytes
        self._line_from = -1
        """Where the first line begins, once it is clear that it has to be judged."""

    def feed(self, data: bytes) -> BodyFraming | None:
        """Take bytes; return the framing once it is clear, and None before that."""
        head = self.head
        looked = len(head)
        head += data
        if self._line_from >= 0:
            return self._judge_line(looked)
        if len(head) < len(_BOM) and _BOM.startswith(head):
            return None
        begin = len(_BOM) if head.startswith(_BOM) else 0
        text = head[begin:].lstrip(_BLANK)
        at = len(head) - len(text)
        line = max(head.rfind(b"\n", 0, at), head.rfind(b"\r", 0, at)) + 1
        if at - max(line, begin) > MAX_INDENT_BYTES:
            return self._said or self._dialect
        if not text:
            if line:
                # One of them stays, so that a byte order mark after them is not at the start for the decoder either.
                self.comments += head.count(b"\n", self._kept, line)
                self._kept = 1
                head[:line] = b"\n"
            return None
        first = bytes(text[:1])
        if first in {b"{", b"["}:
            by_lines = self._said == "ndjson" or (first == b"{" and self._dialect == "ndjson")
            if not by_lines:
                return "json-array"
            self._line_from = at
            return self._judge_line(at)
        if first == b'"':
            return self._said or self._dialect
        return "sse"

    def end(self) -> BodyFraming:
        """Return the framing of a body that has ended before it was clear."""
        return "json-array" if self._line_from >= 0 else "sse"

    def _judge_line(self, looked: int) -> BodyFraming | None:
        """Decide by the first line whether there is one JSON value to a line."""
        start = self._line_from
        end = _LINE_END.search(self.head, looked, start + self._limit + 1)
        if end is None:
            return None if len(self.head) <= start + self._limit else "json-array"
        try:
            msgspec.json.decode(self.head[start : end.start()])
        except (ValueError, RecursionError):
            return "json-array"
        return "ndjson"
