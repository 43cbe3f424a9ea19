"""A prompt with a marker, and whether a log tells of it: as text, or as tokens in any form."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

MARKER = "zanzibar"
MARKED = f"The secret of the house is {MARKER}. " * 8


def check_silent(log: str, marker: Sequence[int]) -> None:
    """No line has the marker, or its tokens."""
    packed = np.asarray(marker, np.int32).tobytes()
    plain = log.replace("\\\\", "\\")  # JSON writes the second for the first
    assert MARKER not in plain.lower()
    assert not re.search(r"\D+".join(map(str, marker)), plain)
    assert packed.hex() not in plain
    assert repr(packed)[2:-1] not in plain
