"""Figure 4: sets, rows and methods."""

from __future__ import annotations

import pytest

from benchmarks.paper import figure4
from benchmarks.store.metadata_replay import (
    Served,
)
from tests.benchmarks.made_prompts import prompts_of


def test_figure_4_rows_and_sets() -> None:
    prompts = prompts_of(["a", "a", "b", "c"], [0.0, 0.0, 0.1, 1.5])
    sets = figure4.similar_sets(prompts)
    assert sets.similar.tolist() == [False, True, True, False]
    assert sets.distinct.tolist() == [False, False, True, False]
    method = figure4.Method("m", [Served(100, 0), Served(100, 95), Served(100, 40), Served(300, 0)])
    row = figure4.row_of(method, "all turns", sets)
    assert row[:2] == ["m", "all turns"]
    assert row[2:] == pytest.approx([0.3375, 135 / 600, 0.25, 0.675, 0.5, 0.4, 0.0])


def test_every_method_is_replayed_and_drawn() -> None:
    prompts = prompts_of(["a", "a", "b"], [0.0, 0.0, 1.0])
    brief = {m.name: m.served for m in figure4.methods(prompts, (), brief=True)}
    assert set(brief) == set(figure4.DRAWN)
    assert all(len(served) == 3 for served in brief.values())
    full = {m.name for m in figure4.methods(prompts, (), brief=False)}
    assert set(brief) < full
    assert len(full) == 12
