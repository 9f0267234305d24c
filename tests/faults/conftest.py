"""What the upstream sees is the same under both drivers of a body's reading."""

from __future__ import annotations

from tests.upstream.conftest import driver, pytest_generate_tests

__all__ = ["driver", "pytest_generate_tests"]
