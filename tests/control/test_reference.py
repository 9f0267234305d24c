from __future__ import annotations

from pathlib import Path

from supervisor.control import messages, reference, rpc

PAGE = Path(__file__).resolve().parents[2] / "docs" / "control-protocol.md"


def test_the_page_is_what_the_types_say() -> None:
    """docs/control-protocol.md is not stale; `python -m supervisor.control.reference` writes it anew."""
    assert reference.render() == PAGE.read_text("utf-8")


def test_check_tells_a_stale_page(tmp_path: Path) -> None:
    """`--check` answers 1 for a page that differs and 0 for one that was just written."""
    page = tmp_path / "page.md"
    assert reference.main(["--check", str(page)]) == 1
    assert reference.main([str(page)]) == 0
    assert reference.main(["--check", str(page)]) == 0
    page.write_text(page.read_text("utf-8") + "more", "utf-8")
    assert reference.main(["--check", str(page)]) == 1


def test_everything_is_on_the_page() -> None:
    """Each method, notification, error kind, close code and limit is described."""
    page = reference.render()
    wanted = [*messages.METHODS, *messages.NOTIFICATIONS, *(row.kind for row in rpc.ERRORS)]
    wanted += [str(code) for code in messages.CLOSE_CODES] + [
        "max_message_bytes",
        "handshake_s",
        "max_requests",
    ]
    assert [word for word in wanted if f"{word}" not in page] == []
