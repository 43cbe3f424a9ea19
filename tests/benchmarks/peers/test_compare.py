"""Every prompt goes to every arm, and answers are compared with plain vLLM's."""

import sys
from pathlib import Path

import pytest

from benchmarks.data.edited_prompts import Texts
from benchmarks.harness.engines import Timed, in_turn
from benchmarks.harness.result import Options
from benchmarks.peers import compare
from tests.benchmarks.made_prompts import numbers


def timed(seconds: float, tokens: int = 2048, token_ids: tuple[int, ...] = (1,)) -> Timed:
    parts = {"lookup": seconds / 4, "prefill": seconds / 2, "rest": seconds / 4}
    return Timed(seconds, tokens, 0, list(token_ids), "", parts)


class FakeEngine:
    """Answers every prompt in one second and records how it was asked."""

    def __init__(self, name: str, calls: list[tuple[str, str]]) -> None:
        self.name, self.calls = name, calls

    def ask(self, tokens: list[int], salt: str, *, max_tokens: int) -> Timed:
        self.calls.append((self.name, salt))
        return timed(1.0, len(tokens))

    def settle(self) -> None:
        self.calls.append((self.name, "settled"))


class FakeHome:
    def flush(self) -> None: ...

    def wait_idle(self) -> None: ...


@pytest.mark.parametrize("salted", [True, False])
def test_each_kind_of_prompt_goes_to_every_arm(
    monkeypatch: pytest.MonkeyPatch, salted: bool
) -> None:
    monkeypatch.setattr(compare, "_STORED_S", 0.0)
    calls: list[tuple[str, str]] = []
    arms = {name: FakeEngine(name, calls) for name in ("plain", "prefix", "peer", "kvshare")}
    peer = compare.Peer("peer", {}, sys.executable, salted)
    samples = list(compare.serve(arms, peer, FakeHome(), Texts(numbers()), 0))  # type: ignore[arg-type]
    assert [sample.kind for sample in samples] == ["miss", "again", "similar"]
    asked = [name for name, salt in calls if salt != "settled"]
    assert asked == in_turn(list(arms), 0) * 3
    settled = [at for at, call in enumerate(calls) if call == ("kvshare", "settled")]
    assert [calls[at - 1][0] for at in settled] == ["kvshare"] * 3
    assert len(calls) == 3 * (len(arms) + 1)
    assert len({salt for name, salt in calls if name == "kvshare" and salt != "settled"}) == 1
    assert all(bool(salt) is salted for name, salt in calls if name == "peer")


def test_answers_are_compared_with_plain_ones() -> None:
    served = {"plain": timed(1.0), "prefix": timed(0.5), "lmcache": timed(0.25),
              "kvshare": timed(0.2, token_ids=(2,))}  # fmt: skip
    samples = [compare.Sample(kind, served) for kind in ("miss", "again", "similar")] * 2
    made = compare.table("lmcache", "title", [], samples, Options(data=Path(), model="model"))
    row = next(row for row in made.rows if row[:2] == ["similar", "kvshare"])
    assert row[4] == "0.200"
    assert row[-1] == "0 of 2"
    compare.draw(made)
