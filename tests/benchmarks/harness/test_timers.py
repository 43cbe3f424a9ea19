"""Timers around the parts of a request."""

import time

import pytest

from benchmarks.harness.timers import Timers


class Machine:
    """Something with a part inside a part."""

    def outer(self) -> str:
        time.sleep(0.02)
        self.inner()
        return "done"

    def inner(self) -> None:
        time.sleep(0.04)

    def fails(self) -> None:
        raise ValueError("no")


def test_time_in_a_part_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed(Machine):
        pass

    timers = Timers()
    for name in ("outer", "inner", "fails"):
        timers.wrap(Timed, name, name)
    machine = Timed()
    start = time.perf_counter()
    assert machine.outer() == "done"
    total = time.perf_counter() - start
    with pytest.raises(ValueError, match="no"):
        machine.fails()
    taken = timers.take()
    assert taken["inner"] >= 0.04
    assert taken["outer"] >= 0.02
    assert taken["outer"] + taken["inner"] <= total
    assert taken["fails"] < 0.01
    assert timers.take() == {}
