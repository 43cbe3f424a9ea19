"""Timers around the parts of a request."""

import pytest

from benchmarks.harness import timers as timers_module
from benchmarks.harness.timers import Timers


class Machine:
    """Something with a part inside a part, and the clock that both go by."""

    now = 100.0

    def outer(self) -> str:
        self.now += 2
        self.inner()
        return "done"

    def inner(self) -> None:
        self.now += 4

    def fails(self) -> None:
        raise ValueError("no")


def test_time_in_a_part_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed(Machine):
        pass

    timers = Timers()
    for name in ("outer", "inner", "fails"):
        timers.wrap(Timed, name, name)
    machine = Timed()
    monkeypatch.setattr(timers_module, "perf_counter", lambda: machine.now)
    assert machine.outer() == "done"
    with pytest.raises(ValueError, match="no"):
        machine.fails()
    assert timers.take() == {"outer": 2.0, "inner": 4.0, "fails": 0.0}
    assert timers.take() == {}
