"""Fixtures of the transport's tests."""

from __future__ import annotations

import ssl

import pytest
import trustme


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


BOTH_DRIVERS = frozenset(
    {
        "test_reconnect",
        "test_resume",
        "test_resume_providers",
        "test_source",
        "test_source_abort",
        "test_seen_from_the_upstream",
    }
)
"""The modules whose tests run with bodies read by the shared reader, and again with each stream reading for itself."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is in those modules under both drivers."""
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_DRIVERS and "driver" in metafunc.fixturenames:
        metafunc.parametrize("driver", ["shared-reader", "own-loop"], indirect=True)


@pytest.fixture(autouse=True)
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose what reads the bodies."""
    if getattr(request, "param", "shared-reader") == "own-loop":
        monkeypatch.setattr("supervisor.upstream.transport.shared_reading_works", lambda: False)
