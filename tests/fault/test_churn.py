"""A twentieth of a day with full tiers: memory, budgets, and reuse that does not decline."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.support.churn import churn

pytestmark = [pytest.mark.fault, pytest.mark.slow]


def test_reuse_does_not_fade_and_budgets_hold() -> None:
    # in a process of its own, where memory is that of nobody else
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        figures = alone.submit(churn, 1_300, late=400, pause=0.001).result()
    assert figures.wrong_rows == 0
    assert figures.over_budget == ()
    assert figures.novel > 600
    assert figures.early > 0.5
    assert figures.late >= 0.95 * figures.early, "what recurs is found after 400 novel prompts"
    assert figures.last >= 0.95 * figures.early
    # 2 to 27 MB in twelve runs: caches of LanceDB and of places still fill in so short a day
    assert figures.growth < 48 << 20
