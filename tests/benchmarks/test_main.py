"""Which measurements the commands run."""

from __future__ import annotations

from benchmarks.__main__ import MEASUREMENTS, _all


def test_the_short_form_leaves_out_what_is_a_part_of_another_measurement():
    assert _all(short=False) == list(MEASUREMENTS)
    left_out = set(MEASUREMENTS) - set(_all(short=True))
    assert left_out == {"table1-presets", "agreement-presets"}
