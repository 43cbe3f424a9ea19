"""Which measurements the commands run."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.__main__ import MEASUREMENTS, all_names


def test_the_short_form_leaves_out_what_is_a_part_of_another_measurement():
    assert all_names(short=False) == list(MEASUREMENTS)
    left_out = set(MEASUREMENTS) - set(all_names(short=True))
    assert left_out == {"table1-presets", "agreement-presets"}


def test_every_measurement_has_a_module() -> None:
    modules = {name: f"benchmarks.{module}" for name, module in MEASUREMENTS.items()}
    assert [name for name, module in modules.items() if not find_spec(module)] == []
