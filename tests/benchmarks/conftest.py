"""No progress bars in the output of tests, and an engine of a tiny model."""

from __future__ import annotations

import pytest
from kvshare_connectors.transformers.engine import RowEngine

from tests.transformers.tiny import tiny_model


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture
def llama() -> RowEngine:
    """A tiny Llama with random weights."""
    return RowEngine(tiny_model("LlamaConfig"))
