"""What a test needs besides Python packages."""

from __future__ import annotations

import os

import pytest

EVERYTHING = os.environ.get("REQUIRE_ALL_TESTS", "") == "1"
"""Variables removed from the environment: engines and daemons warn of unknown variables with this
prefix."""


def need(present: bool, what: str) -> None:
    """Skip the test without `what`; with REQUIRE_ALL_TESTS=1 fail instead."""
    if present:
        return
    if EVERYTHING:
        pytest.fail(f"{what} is missing, and REQUIRE_ALL_TESTS=1 asks for everything")
    pytest.skip(f"{what} is missing")
