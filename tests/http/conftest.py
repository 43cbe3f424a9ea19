"""Two daemons with pages, for all tests that leave what is stored as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.page import World, owned_world, world


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Only its own user is answered."""
    with world(tmp_path_factory.mktemp("page")) as made:
        yield made


@pytest.fixture(scope="session")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Only who has the token is answered."""
    with owned_world(tmp_path_factory.mktemp("owned")) as made:
        yield made
