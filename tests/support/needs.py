"""What a test needs beside Python packages."""

from __future__ import annotations

import os

import pytest

EVERYTHING = os.environ.get("REQUIRE_ALL_TESTS", "") == "1"
"""Taken out of the environment: engines and daemons warn of a variable that begins so and is no
setting of theirs."""


def need(present: bool, what: str) -> None:
    """Skip the test without `what`; with REQUIRE_ALL_TESTS=1 fail instead."""
    if present:
        return
    if EVERYTHING:
        pytest.fail(f"{what} is missing, and REQUIRE_ALL_TESTS=1 asks for everything")
    pytest.skip(f"{what} is missing")
