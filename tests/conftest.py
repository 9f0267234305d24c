"""What tests of several folders share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_share(monkeypatch):
    """Have each stream held back while the store is behind, however little of it waits to be written."""
    monkeypatch.setattr("supervisor.streams.output.SMALL_SHARE_BYTES", -1)
