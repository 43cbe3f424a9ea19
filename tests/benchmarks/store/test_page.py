"""From what a browser reports to rows."""

from pathlib import Path

from benchmarks.harness.result import Options
from benchmarks.store import page
from benchmarks.store.page import FIRST, FLOOR, Seen


def test_the_first_view_must_be_fast_each_time() -> None:
    cold = {FIRST: [Seen(200.0, 90.0), Seen(310.0, 100.0)], FLOOR: [Seen(20.0, 1.0)] * 2}
    warm = {name: [Seen(10.0, 5.0)] * 99 + [Seen(40.0, 6.0)] for name in cold}
    made = page.result_of(cold, warm, page.NODES, Options(data=Path()))
    assert made.rows[0] == [FIRST, 255.0, 310.0, 95.0, 100.0, 10.0, 10.0, 5.0, 5.0]
    assert made.n == {"starts of the daemon": 2, "later looks at a view": 100}
    assert not made.targets[0][2]
    cold[FIRST] = [Seen(200.0, 90.0)]
    assert page.result_of(cold, warm, page.NODES, Options(data=Path())).targets[0][2]
    assert not page.result_of(cold, warm, 10, Options(data=Path())).targets[0][2], "too few nodes"
