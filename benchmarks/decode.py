"""CPU per event of decoding an event stream: our decoder, httpx-sse's, and those of the `openai` and `anthropic` SDKs.

Two comparisons, each on the same bytes cut into the same reads:

- **events**: bytes to events, nothing of what is in them is looked at. `ours` is `SSEDecoder.feed`, `httpx-sse` its line and
  event decoders behind an incremental UTF-8 decoder (as httpx's `iter_text` has one), `openai` and `anthropic` the
  `SSEDecoder.iter_bytes` that their streams use.
- **deltas**: bytes to what an event means. `ours` is the whole chain (`BodyReader`: decoder, dialect, deltas, into a sink that
  counts), `openai` and `anthropic` what a program gets that iterates over their streams: decoder, JSON, pydantic models.

Streams: `data` lines alone, as OpenAI Chat sends them; `event` and `data`, as Anthropic and OpenAI Responses do; `id` and
`data`, and all three, as resumable servers do. Reads: 64 KiB (what our transport and httpx read at most: a flood), 4 KiB (a
provider somewhat faster than its reader), and one event a read (one that generates at its own pace, which is the usual case).

No sockets: everything runs in this process, in turn, round after round, and the figure is its CPU time. That all contenders
yield the same events is checked before anything is measured.
"""

from __future__ import annotations

import codecs
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import attrs
import measure

from supervisor.dialects import BUILTIN
from supervisor.dialects.reading import BodyReader
from supervisor.wire import SSEDecoder

CONTENDERS = ("ours", "httpx-sse", "openai", "anthropic")
NEEDS = {"httpx-sse": "httpx_sse", "openai": "openai", "anthropic": "anthropic"}
"""What is not among the project's own dependencies; without it the contender is left out, and the results say so."""
ROUNDS = 9
READS = {"64 KiB reads": 1 << 16, "4 KiB reads": 1 << 12}
ONE = "one event a read"
WORDS = (
    "The",
    " answer",
    " is",
    " not",
    " in",
    " the",
    " stars",
    ",",
    " but",
    " in",
    " ourselves",
    ".\\n",
    " «é»",
)


# --- the streams -----------------------------------------------------------------------------------------------------


def chat_chunks(count: int) -> list[bytes]:
    """Return the data of chat chunks as OpenAI sends them: of about 210 bytes, with a word each."""
    head = (
        '{"id":"chatcmpl-9xKqZ1Yb2Vw3Uv4Tt5Ss6Rr7Qq8Pp","object":"chat.completion.chunk","created":1721075653,'
        '"model":"gpt-4o-2024-08-06","system_fingerprint":"fp_a2ff031fb5","choices":[{"index":0,"delta":{"content":"%s"},'
        '"logprobs":null,"finish_reason":null}]}'
    )
    return [(head % WORDS[number % len(WORDS)]).encode() for number in range(count)]


def anthropic_deltas(count: int) -> list[bytes]:
    """Return the data of Anthropic's text deltas."""
    head = '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}'
    return [(head % WORDS[number % len(WORDS)]).encode() for number in range(count)]


@attrs.frozen
class Stream:
    """One stream: its events as sent, one by one, and the data of each."""

    name: str
    blocks: list[bytes]
    data: list[bytes]

    def reads(self, how: str) -> list[bytes]:
        """Return the stream as reads of one event each, or of a size."""
        if how == ONE:
            return self.blocks
        whole, size = b"".join(self.blocks), READS[how]
        return [whole[at : at + size] for at in range(0, len(whole), size)]


HOWS = (*READS, ONE)


def streams(count: int) -> list[Stream]:
    """Return the four streams of the first comparison."""
    chat, claude = chat_chunks(count), anthropic_deltas(count)
    return [
        Stream("data", [b"data: %b\n\n" % data for data in chat], chat),
        Stream(
            "event, data",
            [b"event: content_block_delta\ndata: %b\n\n" % data for data in claude],
            claude,
        ),
        Stream("id, data", [b"id: %d\ndata: %b\n\n" % (n, data) for n, data in enumerate(chat)], chat),
        Stream(
            "id, event, data",
            [b"id: %d\nevent: message\ndata: %b\n\n" % (n, data) for n, data in enumerate(claude)],
            claude,
        ),
    ]


# --- bytes to events -------------------------------------------------------------------------------------------------

Decode = Callable[[Sequence[bytes]], Iterator[Any]]


def ours(reads: Sequence[bytes]) -> Iterator[Any]:
    decoder = SSEDecoder()
    for read in reads:
        yield from decoder.feed(read)


def httpx_sse(reads: Sequence[bytes]) -> Iterator[Any]:
    from httpx_sse._decoders import SSEDecoder as Theirs
    from httpx_sse._decoders import SSELineDecoder

    text, lines, decoder = codecs.getincrementaldecoder("utf-8")("replace"), SSELineDecoder(), Theirs()
    for read in reads:
        for line in lines.decode(text.decode(read)):
            # What `EventSource.iter_sse` does with each line.
            event = decoder.decode(line.rstrip("\n"))
            if event is not None:
                yield event


def openai(reads: Sequence[bytes]) -> Iterator[Any]:
    from openai._streaming import SSEDecoder as Theirs

    return Theirs().iter_bytes(iter(reads))


def anthropic(reads: Sequence[bytes]) -> Iterator[Any]:
    from anthropic._streaming import SSEDecoder as Theirs

    return Theirs().iter_bytes(iter(reads))


DECODERS: dict[str, Decode] = {
    "ours": ours,
    "httpx-sse": httpx_sse,
    "openai": openai,
    "anthropic": anthropic,
}


def consume(events: Iterator[Any]) -> int:
    count = 0
    for _ in events:
        count += 1
    return count


def consume_ours(reads: Sequence[bytes]) -> int:
    """Take events as `BodyReader` does: the list of each read, without a generator in between."""
    count = 0
    feed = SSEDecoder().feed
    for read in reads:
        for _ in feed(read):
            count += 1
    return count


# --- bytes to deltas -------------------------------------------------------------------------------------------------


class _Count:
    """A sink that keeps nothing."""

    sealed = False
    events = 0

    def append(self, payload, name, deltas) -> None:  # noqa: ARG002 (the sink's protocol)
        self.events += 1

    def skip(self, payload, why, name="") -> None:  # noqa: ARG002 (the sink's protocol)
        raise AssertionError(why)

    def touch(self) -> None: ...

    def mark(self, reason) -> None: ...

    def complete(self, reason) -> bool:
        raise AssertionError(reason)

    def fail(self, reason, fault) -> bool:
        raise AssertionError(f"{reason}: {fault}")


def our_deltas(dialect: str) -> Callable[[Sequence[bytes]], int]:
    def run(reads: Sequence[bytes]) -> int:
        sink = _Count()
        feed = BodyReader(BUILTIN[dialect], sink).feed
        for read in reads:
            feed(read)
        return sink.events

    return run


class _Response:
    """What the SDKs' streams ask of a response."""

    status_code = 200
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)
    request = None

    def __init__(self, reads: Sequence[bytes]) -> None:
        self.reads = reads

    def iter_bytes(self) -> Iterator[bytes]:
        return iter(self.reads)

    def close(self) -> None: ...


def openai_models() -> Callable[[Sequence[bytes]], int]:
    from openai import OpenAI
    from openai._streaming import Stream as Theirs
    from openai.types.chat import ChatCompletionChunk

    client: Any = OpenAI(api_key="none", base_url="http://127.0.0.1:1")
    return lambda reads: consume(
        iter(Theirs(cast_to=ChatCompletionChunk, response=_Response(reads), client=client))  # type: ignore[arg-type]  # a stand-in
    )


def anthropic_models() -> Callable[[Sequence[bytes]], int]:
    from anthropic import Anthropic
    from anthropic._streaming import Stream as Theirs
    from anthropic.types import RawMessageStreamEvent

    client: Any = Anthropic(api_key="none", base_url="http://127.0.0.1:1")
    cast_to: Any = RawMessageStreamEvent
    return lambda reads: consume(
        iter(Theirs(cast_to=cast_to, response=_Response(reads), client=client))  # type: ignore[arg-type]  # a stand-in
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def cpu_us(run: Callable[[Sequence[bytes]], int], reads: Sequence[bytes], events: int) -> float:
    """Return the CPU time per event of one run over the whole stream, in µs."""
    gc.collect()
    before = time.thread_time()
    count = run(reads)
    spent = time.thread_time() - before
    assert count == events, f"{count} events of {events}"
    return 1e6 * spent / events


def agree(stream: Stream, contenders: Sequence[str]) -> None:
    """Check that every contender yields the stream's events, in either cut."""
    wanted = [data.decode() for data in stream.data]
    for name in contenders:
        for how in HOWS:
            got = [
                event.data if isinstance(event.data, str) else event.data.decode()
                for event in DECODERS[name](stream.reads(how))
            ]
            assert got == wanted, f"{name} reads another stream ({stream.name}, {how})"


def compare(
    report: measure.Report,
    title: str,
    runs: dict[str, Callable[[Sequence[bytes]], int]],
    reads: Sequence[bytes],
    events: int,
    *,
    options: Any,
) -> None:
    """Measure each contender once a round, in turn, and add the table."""
    for run in runs.values():
        run(
            reads[: max(1, len(reads) // 10)]
        )  # imports, caches and specialised bytecode, outside of what is measured
    results = measure.in_turn(
        tuple(runs), options.rounds, lambda name: {"us": cpu_us(runs[name], reads, events)}, only=options.only
    )
    report.table(
        title, "µs", {name: [one["us"] for one in found] for name, found in results.items()}, baseline="ours"
    )


def fastest(report: measure.Report, title: str) -> tuple[str, float] | None:
    """Return the contender that needs the least CPU beside ours, and by how much ours needs less."""
    found = [
        (ratio, name)
        for name in report.tables[title]["rows"]
        if name != "ours" and (ratio := report.ratio(title, name, "ours")) is not None
    ]
    return (min(found)[1], min(found)[0]) if found else None


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS)
    count = 2_000 if options.quick else 20_000
    contenders = [name for name in CONTENDERS if name not in NEEDS or find_spec(NEEDS[name]) is not None]
    report = measure.Report("decode", options.quick, {"rounds": options.rounds, "events": count})
    titles: list[str] = []
    for stream in streams(count):
        agree(stream, contenders)
        for how in HOWS:
            titles.append(f"events, {stream.name}, {how}")
            runs = {name: _counting(name) for name in contenders}
            compare(report, titles[-1], runs, stream.reads(how), count, options=options)
    chat, claude, *_ = streams(count)
    for dialect, stream, name, models in (
        ("openai-chat", chat, "openai", openai_models),
        ("anthropic", claude, "anthropic", anthropic_models),
    ):
        if dialect not in BUILTIN or name not in contenders:
            continue
        for how in HOWS[1:]:
            few = max(500, count // 10)  # models are slow; the cost per event is constant
            part = Stream(stream.name, stream.blocks[:few], stream.data[:few])
            titles.append(f"deltas, {dialect}, {how}")
            runs = {"ours": our_deltas(dialect), name: models()}
            compare(report, titles[-1], runs, part.reads(how), few, options=options)
    print()
    for title in titles:
        found = fastest(report, title)
        name, value = found if found is not None else ("others", None)
        report.aim(f"{title}: {name} / ours at least 5", value, least=5)
    for name in sorted(set(CONTENDERS) - set(contenders)):
        report.note(f"{name} is not installed and was left out.")
    report.note(f"A chat chunk has {len(chat.blocks[0])} bytes, an Anthropic delta {len(claude.blocks[0])}.")
    report.write(options.json)


def _counting(name: str) -> Callable[[Sequence[bytes]], int]:
    if name == "ours":
        return consume_ours
    decode = DECODERS[name]
    return lambda reads: consume(decode(reads))


if __name__ == "__main__":
    sys.exit(main())
