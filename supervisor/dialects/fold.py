"""Fold deltas into the answer so far.

A stream is told in thousands of small deltas and asked for its whole answer seldom, so a delta must cost O(1) and the
join is left to whoever asks. Pieces are kept in a list; when it reaches `PIECES` they become one block, and when the
blocks reach `PIECES` they become one text, so that neither the per-piece overhead nor the number of copies grows with
the answer. A snapshot joins what is new and keeps the join.

What the fields mean when they come again:

- text, reasoning, refusal and a tool call's arguments are appended;
- a tool call's id and name replace what was there (a reader that gets a name in pieces gives the whole so far);
- a finish reason and a usage replace the earlier one whole; the usages of one response are never summed, because
  providers that send several send running totals.

A fold can let go of its text (`spill`), where the journal has it and can be folded again: then it holds what came since, and
knows how much came before.

An answer may take several requests. `go_on` joins what follows to what there is, `reset` withdraws what there is; either way
what the earlier request used was used, and its usage is added to that of the next.
"""

from __future__ import annotations

from supervisor.dialects.base import Choice, Delta, Snapshot, ToolCall, ToolCallDelta, Usage
from supervisor.dialects.estimate import output_bytes

__all__ = ["Fold"]

PIECES = 64
"""How many pieces are kept apart before they are joined. Each takes some 60 bytes beside its text, which no account has: with 256 that
was 15 KiB a stream."""

CHOICE_OVERHEAD_BYTES = 512
CALL_OVERHEAD_BYTES = 320


class _Text:
    """A growing text: O(1) to add to, joined when read."""

    __slots__ = ("_blocks", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._blocks: list[str] = []

    def add(self, piece: str) -> None:
        pieces = self._pieces
        pieces.append(piece)
        if len(pieces) >= PIECES:
            self._blocks.append("".join(pieces))
            pieces.clear()
            if len(self._blocks) >= PIECES:
                self._blocks = ["".join(self._blocks)]

    def joined(self) -> str:
        blocks = self._blocks
        if self._pieces:
            blocks.append("".join(self._pieces))
            self._pieces.clear()
        if not blocks:
            return ""
        if len(blocks) > 1:
            self._blocks = blocks = ["".join(blocks)]
        return blocks[0]

    def replace(self, text: str) -> None:
        self._pieces.clear()
        self._blocks = [text] if text else []


class _Call:
    __slots__ = ("arguments", "id", "name")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments = _Text()


class _Choice:
    __slots__ = ("calls", "finish_reason", "reasoning", "refusal", "text")

    def __init__(self) -> None:
        self.text = _Text()
        self.reasoning = _Text()
        self.refusal = _Text()
        self.calls: dict[int, _Call] = {}
        self.finish_reason: str | None = None

    def frozen(self, index: int) -> Choice:
        calls = self.calls
        return Choice(
            index=index,
            text=self.text.joined(),
            reasoning=self.reasoning.joined(),
            refusal=self.refusal.joined(),
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.name, arguments=call.arguments.joined())
                for _, call in sorted(calls.items())
            )
            if calls
            else (),
            finish_reason=self.finish_reason,
        )


class Fold:
    """The answer so far, of one stream.

    `nbytes` is what it holds: the UTF-8 length of its texts and a fixed overhead for each choice and tool call.
    """

    __slots__ = (
        "_choices",
        "_joined_at",
        "_let_go_bytes",
        "_model",
        "_response_id",
        "_spent",
        "_spilled_bytes",
        "_spilled_chars",
        "_usage",
        "nbytes",
        "spilled",
    )

    def __init__(self) -> None:
        self.nbytes = 0
        self.spilled = False
        """Whether it has let go of text: then `snapshot` has only what came since."""
        self._let_go_bytes = 0  # of `nbytes`
        self._spilled_bytes = 0  # of what the model wrote
        self._spilled_chars = 0  # of the text of choice 0
        self._choices: dict[int, _Choice] = {}
        self._usage: Usage | None = None
        self._spent: Usage | None = None
        self._joined_at: tuple[int, ...] = ()
        self._model: str | None = None
        self._response_id: str | None = None

    def __repr__(self) -> str:
        return f"<Fold of {len(self._choices)} choices, {self.nbytes} bytes>"

    @property
    def usage(self) -> Usage | None:
        """The last usage stated, with what the requests before this one used."""
        return self._spent if self._usage is None else self._usage.plus(self._spent)

    @property
    def spent(self) -> Usage | None:
        """What the requests before the last one are known to have used."""
        return self._spent

    @property
    def finish_reason(self) -> str | None:
        """The finish reason of choice 0."""
        first = self._choices.get(0)
        return None if first is None else first.finish_reason

    @property
    def output_bytes(self) -> int:
        """How much the model wrote, in UTF-8, what was let go of included. Costs as much as there is in memory."""
        return self._spilled_bytes + output_bytes(self.snapshot())

    @property
    def grown_bytes(self) -> int:
        """What `nbytes` would be had nothing been let go of: at least what the model wrote. Costs nothing."""
        return self._let_go_bytes + self.nbytes

    @property
    def response_id(self) -> str | None:
        """The provider's id of the response."""
        return self._response_id

    @property
    def joined_at(self) -> tuple[int, ...]:
        """Where in the text of choice 0, in characters, another request went on."""
        return self._joined_at

    def reset(self) -> None:
        """Withdraw the answer so far: the next delta begins another one. What was used stays used."""
        self.nbytes = self._let_go_bytes = self._spilled_bytes = self._spilled_chars = 0
        self.spilled = False
        self._choices = {}
        self._spent, self._usage = self.usage, None
        self._model = self._response_id = None
        self._joined_at = ()

    def go_on(self, *, dropped: int = 0) -> None:
        """Let the next delta, of another request, go on from the text of choice 0 without its last `dropped` characters."""
        self._spent, self._usage = self.usage, None
        self._model = self._response_id = None
        first = self._choices.get(0)
        text = "" if first is None else first.text.joined()
        length = self._spilled_chars + len(text)
        if first is not None and dropped:
            kept = text[: max(0, len(text) - dropped)]
            self.nbytes -= _utf8_length(text) - _utf8_length(kept)
            first.text.replace(kept)
            length -= dropped
            self._spilled_chars = length - len(kept)
        self._joined_at += (length,)

    @property
    def spillable_bytes(self) -> int:
        """How much `spill` would let go of."""
        return self.nbytes - len(self._choices) * CHOICE_OVERHEAD_BYTES

    def spill(self) -> None:
        """Let go of all text, and of the tool calls: whoever asks for the answer folds the journal again."""
        self.spilled = True
        self._spilled_bytes = self.output_bytes
        first = self._choices.get(0)
        self._spilled_chars += 0 if first is None else len(first.text.joined())
        rest = len(self._choices) * CHOICE_OVERHEAD_BYTES
        self._let_go_bytes += self.nbytes - rest
        self.nbytes = rest
        for index, choice in self._choices.items():
            kept = self._choices[index] = _Choice()
            kept.finish_reason = choice.finish_reason

    def apply(self, delta: Delta) -> None:
        """Add one delta. O(1) amortised, whatever came before."""
        choice = self._choices.get(delta.choice)
        if choice is None:
            choice = self._open(delta)
        text = delta.text
        if text:
            choice.text.add(text)
            self.nbytes += len(text) if text.isascii() else _utf8_length(text)
        text = delta.reasoning
        if text:
            choice.reasoning.add(text)
            self.nbytes += len(text) if text.isascii() else _utf8_length(text)
        if delta.tool_calls:
            for piece in delta.tool_calls:
                self._apply_call(choice, piece)
        text = delta.refusal
        if text:
            choice.refusal.add(text)
            self.nbytes += _utf8_length(text)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
        if delta.usage is not None:
            self._usage = delta.usage
        if delta.model is not None:
            self._model = delta.model
        if delta.response_id is not None:
            self._response_id = delta.response_id

    def snapshot(self, epoch: int = 1, seq: int = 0) -> Snapshot:
        """Return the answer so far, labelled with the position it was folded up to."""
        choices = tuple(choice.frozen(index) for index, choice in sorted(self._choices.items()))
        if not choices or choices[0].index != 0:
            return Snapshot(
                choices=choices,
                usage=self.usage,
                model=self._model,
                response_id=self._response_id,
                epoch=epoch,
                seq=seq,
                joined_at=self._joined_at,
            )
        first = choices[0]
        return Snapshot(
            text=first.text,
            reasoning=first.reasoning,
            refusal=first.refusal,
            tool_calls=first.tool_calls,
            finish_reason=first.finish_reason,
            choices=choices,
            usage=self.usage,
            model=self._model,
            response_id=self._response_id,
            epoch=epoch,
            seq=seq,
            joined_at=self._joined_at,
        )

    def _open(self, delta: Delta) -> _Choice:
        choice = _Choice()
        # A delta without content (usage, model, the end marker) names choice 0 only by default.
        if (
            delta.choice
            or delta.text
            or delta.reasoning
            or delta.refusal
            or delta.tool_calls
            or delta.finish_reason is not None
        ):
            self._choices[delta.choice] = choice
            self.nbytes += CHOICE_OVERHEAD_BYTES
        return choice

    def _apply_call(self, choice: _Choice, piece: ToolCallDelta) -> None:
        call = choice.calls.get(piece.index)
        if call is None:
            call = choice.calls[piece.index] = _Call()
            self.nbytes += CALL_OVERHEAD_BYTES
        if piece.id:
            self.nbytes += _utf8_length(piece.id) - _utf8_length(call.id)
            call.id = piece.id
        if piece.name:
            self.nbytes += _utf8_length(piece.name) - _utf8_length(call.name)
            call.name = piece.name
        if piece.arguments:
            call.arguments.add(piece.arguments)
            self.nbytes += _utf8_length(piece.arguments)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
