"""Engines of tiny models."""

from __future__ import annotations

import pytest
from kvshare_connectors.transformers.engine import RowEngine

from tests.transformers.tiny import FAMILIES, tiny_model


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """One model family after another."""
    return str(request.param)


@pytest.fixture
def engine(family: str) -> RowEngine:
    """An engine of that family."""
    return RowEngine(tiny_model(family))


@pytest.fixture
def llama() -> RowEngine:
    """A Llama engine."""
    return RowEngine(tiny_model("LlamaConfig"))
