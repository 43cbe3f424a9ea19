"""One daemon with a page for all tests that change nothing of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.page import World, world


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Tests of one file share it."""
    with world(tmp_path_factory.mktemp("page")) as made:
        yield made
