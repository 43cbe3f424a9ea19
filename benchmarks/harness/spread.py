"""Medians of repeated measurements, and their spread, as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles


def median_and_range(values: Sequence[float], digits: int = 2) -> list[float | str]:
    """The median, and `least to greatest`."""
    return [median(values), low_to_high(min(values), max(values), digits)]


def median_and_middle_half(values: Sequence[float], digits: int = 3) -> list[str]:
    """The median, and where the middle half of the values lies."""
    low, _, high = quantiles(values, n=4)
    return [f"{median(values):.{digits}f}", low_to_high(low, high, digits)]


def low_to_high(low: float, high: float, digits: int = 2) -> str:
    """`low to high`."""
    return f"{low:.{digits}f} to {high:.{digits}f}"
