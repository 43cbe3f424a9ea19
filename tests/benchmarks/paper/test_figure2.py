"""Figure 2: similar prompts are counted."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.data.neighbours import neighbours
from benchmarks.paper import figure2
from tests.benchmarks.made_prompts import prompts_of


def test_figure_2_counts_what_came_before() -> None:
    # distances: b to a is 1 - cos(0.3) = 0.045, c to b 0.08, d to all others 1 or more
    prompts = prompts_of(["a", "b", "a", "c", "d"], [0.0, 0.3, 0.0, 0.7, 2.5])
    found = neighbours(prompts.texts, prompts.vectors)
    assert found.duplicate.tolist() == [False, False, True, False, False]
    assert found.earlier[0] == 2
    assert found.earlier[1] == pytest.approx(1 - np.cos(0.3), abs=1e-6)
    assert found.any[0] == pytest.approx(1 - np.cos(0.3), abs=1e-6)
    line = figure2.shares("all", found, np.ones(5, np.bool_))
    assert line.prompts == 5
    assert line.duplicate == 1 / 5
    assert line.within == (1 / 5, 2 / 5, 2 / 5)
    assert line.any_order == 3 / 5  # a, b and the second a


def test_figure_2_looks_at_first_turns_apart() -> None:
    prompts = prompts_of(["a", "b", "b", "c"], [0.0, 1.0, 1.0, 2.0])
    lines = figure2.count_lines(prompts, [0, 2])
    counts = {line.what: (line.prompts, line.duplicate) for line in lines}
    assert counts["first turns"] == (2, 0.0)
    assert counts["all human turns"] == (4, 0.25)
