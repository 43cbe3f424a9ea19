"""Waiting for another machine."""

from __future__ import annotations

from benchmarks.store.across_machines import reused_after


def test_waiting_for_another_machine_ends() -> None:
    class Late:
        asked = 0

        def serve(self, seed: int) -> int:
            self.asked += 1
            return 63 if self.asked == 3 else 0

    late = Late()
    assert reused_after(late, 1) > 0  # type: ignore[arg-type]
    assert late.asked == 3
