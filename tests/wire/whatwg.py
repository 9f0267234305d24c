"""The event-stream algorithm of WHATWG HTML section 9.2.6, written down as the standard says it: slow, and an oracle.

The whole stream at once, on decoded text, one character at a time for the line ends.
"""

from __future__ import annotations

import attrs

from supervisor.wire import WireEvent

ASCII_DIGITS = set("0123456789")


@attrs.define
class Interpretation:
    events: list[WireEvent] = attrs.field(factory=list)
    last_event_id: str = ""
    retry: int | None = None
    comments: int = 0
    unknown: list[str] = attrs.field(factory=list)
    rest: str = ""


def lines_of(text: str) -> tuple[list[str], str]:
    """Return the lines ended by CRLF, LF or CR, and what follows the last line end."""
    lines: list[str] = []
    line = ""
    at = 0
    while at < len(text):
        if text[at] == "\r":
            lines.append(line)
            line = ""
            if text[at + 1 : at + 2] == "\n":
                at += 1
        elif text[at] == "\n":
            lines.append(line)
            line = ""
        else:
            line += text[at]
        at += 1
    return lines, line


def interpret(stream: bytes) -> Interpretation:
    text = stream.decode("utf-8", "replace")
    text = text.removeprefix("\ufeff")
    found = Interpretation()
    lines, found.rest = lines_of(text)
    data_buffer = event_type_buffer = last_event_id_buffer = ""
    for line in lines:
        if line == "":
            found.last_event_id = last_event_id_buffer
            if data_buffer == "":
                event_type_buffer = ""
                continue
            data_buffer = data_buffer.removesuffix("\n")
            name = "message"
            if event_type_buffer != "":
                name = event_type_buffer
            found.events.append(
                WireEvent(data_buffer.encode("utf-8"), name, found.last_event_id, found.retry)
            )
            data_buffer = event_type_buffer = ""
        elif line[0] == ":":
            found.comments += 1
        else:
            field, value = line, ""
            if ":" in line:
                colon = line.index(":")
                field, value = line[:colon], line[colon + 1 :]
                if value[:1] == " ":
                    value = value[1:]
            if field == "event":
                event_type_buffer = value
            elif field == "data":
                data_buffer += value
                data_buffer += "\n"
            elif field == "id":
                if "\0" not in value:
                    last_event_id_buffer = value
            elif field == "retry":
                if value != "" and set(value) <= ASCII_DIGITS:
                    found.retry = int(value, 10)
            else:
                found.unknown.append(line)
    return found
