"""JSON Pointers (RFC 6901): where in a provider's JSON something stands, as its user writes it down.

`/choices/0/delta/content` is the `content` of the `delta` of the first of the `choices`; `~1` stands for a slash in a name and
`~0` for a tilde; the empty pointer is the whole value.
"""

from __future__ import annotations

import re
from typing import Any, Final

from supervisor.errors import ConfigurationError

__all__ = ["MISSING", "Pointer", "lookup", "pointer"]

Pointer = tuple[str, ...]

MISSING: Final = object()
"""What `lookup` returns where nothing stands. (None is what it returns for null.)"""

MAX_TOKENS: Final = 32
_BAD_ESCAPE: Final = re.compile(r"~(?![01])")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")


def pointer(field: str, text: object) -> Pointer:
    """Return a pointer's reference tokens. Raises ConfigurationError, naming `field`, for what is no pointer."""
    if (
        not isinstance(text, str)
        or (text and not text.startswith("/"))
        or _BAD_ESCAPE.search(text)
        or text.count("/") > MAX_TOKENS
    ):
        raise ConfigurationError(field, text, 'a JSON pointer such as "/choices/0/delta/content" (RFC 6901)')
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in text.split("/")[1:])


def lookup(value: Any, tokens: Pointer) -> Any:
    """Return what stands there, or MISSING."""
    for token in tokens:
        if isinstance(value, dict):
            value = value.get(token, MISSING)
        elif isinstance(value, list) and _INDEX.fullmatch(token):
            at = int(token)
            value = value[at] if at < len(value) else MISSING
        else:
            return MISSING
        if value is MISSING:
            return MISSING
    return value
