"""From requests and counted seconds to rows."""

from pathlib import Path

import pytest

from benchmarks.harness.result import Options
from benchmarks.latency import metrics_cost
from benchmarks.latency.metrics_cost import EDITED, NEW, Phase, Served


@pytest.mark.parametrize(
    ("daemon_s", "share", "reached"), [(0.004, 0.003, True), (0.01, 0.006, False)]
)
def test_a_share_is_engine_and_daemon_beside_the_first_token(
    daemon_s: float, share: float, reached: bool
) -> None:
    served = [Served(NEW, 100, 0, 1.0, 0.001), Served(NEW, 300, 0, 1.0, 0.001)]
    phases = {NEW: Phase(served, daemon_s, 20), EDITED: Phase(served, 0.0, 10)}
    made = metrics_cost.result_of(phases, Options(data=Path()), "model")
    ((_, measured, well),) = made.targets
    assert (measured, well) == (f"{share:.3%}", reached)
    assert made.rows[0][:4] == [NEW, 2, 200, 0]
    assert made.rows[0][7:9] == [10.0, pytest.approx(100 * share)]
    metrics_cost.draw(made)


def test_an_edited_prompt_has_its_length_and_other_tokens() -> None:
    tokens = list(range(40))
    changed = metrics_cost.edited(tokens)
    assert len(changed) == len(tokens)
    assert [at for at in tokens if changed[at] != at] == [10, 11, 12, 13]
