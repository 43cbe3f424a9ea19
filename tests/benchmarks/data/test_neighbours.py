"""Which prompts have a similar one."""

from __future__ import annotations

import numpy as np

from benchmarks.data.neighbours import neighbours
from tests.benchmarks.made_prompts import towards


def test_text_without_content_is_like_nothing() -> None:
    vectors = np.stack([np.zeros(384, np.float32), np.zeros(384, np.float32), towards(0.0)])
    found = neighbours(["", " ", "x"], vectors)
    assert found.earlier.tolist() == [2, 2, 1]
