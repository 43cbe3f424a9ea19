"""Agreement with full compute: what is scored, which pairs are drawn, what the table says."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.harness.result import Options
from benchmarks.methods.base import Prefilled, full_compute
from benchmarks.methods.full import Full
from benchmarks.methods.kvshare import KVShare, kvshare
from benchmarks.quality import agreement, agreement_pairs
from benchmarks.quality.agreement_grid import Lineup, grid, windowed
from benchmarks.quality.agreement_pairs import SimilarPair, Split, similar_pairs
from benchmarks.quality.agreement_scores import Score, floors, score, scores
from tests.transformers.tiny import prompt_of, tiny_model

DONOR = prompt_of(64)
PAIR = SimilarPair("a", (*DONOR[:20], 7, 8, 9, *DONOR[22:]), tuple(DONOR), 0.95)
OTHER = SimilarPair("b", (*DONOR[:40], *DONOR[45:]), tuple(DONOR), 1.0)


class Words:
    """A chat template that adds nothing, with one token per word."""

    def prompt(self, text: str) -> tuple[int, ...]:
        return tuple(int(word) for word in text.split())


def test_full_compute_agrees_with_itself_and_stale_rows_do_not(llama: RowEngine) -> None:
    methods = [Full(), kvshare("aggressive"), KVShare("all", windowed(100))]
    found = list(scores(llama, [PAIR, OTHER], methods))
    assert [[one.pair for one in kept] for kept in found] == [["a"] * 3, ["b"] * 3]
    for full, stale, everything in found:
        assert full.kl < 1e-6
        assert (full.agree, full.first_same, full.reused) == (1.0, True, 0)
        assert stale.kl > 1e-3
        assert stale.reused > 50
        assert everything.kl < 1e-6


def test_the_noise_floor_is_of_bf16(llama: RowEngine) -> None:
    rough = RowEngine(tiny_model("LlamaConfig", torch.bfloat16))
    (found,) = floors(llama, rough, [PAIR])
    assert [one.method for one in found] == ["bf16 twice", "bf16 against fp32"]
    twice, against_fp32 = found
    assert 0 <= twice.kl <= against_fp32.kl  # the tiny model's chunks may agree to the bit
    assert against_fp32.kl > 1e-6


def test_a_score_is_kl_of_full_computes_distribution(llama: RowEngine) -> None:
    truth = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    found = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    filled = Prefilled(full_compute(llama, DONOR).cache, truth[0], 32, 32)
    one = score("m", PAIR, filled, truth, found)
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert one.kl_first == pytest.approx(first, rel=1e-5)
    assert one.kl == pytest.approx(first / 2, rel=1e-5)
    assert (one.first_same, one.agree, one.reused) == (False, 0.5, 32)


def test_a_row_has_both_kinds_of_reuse_and_both_denominators() -> None:
    kept = [
        Score("m", "a", 100, 50, True, 0.1, 0.02, 1.0),
        Score("m", "b", 300, 270, False, 0.3, 0.04, 0.5),
    ]
    floor = {"bf16 twice": 0.01, "bf16 against fp32": 0.02}
    cells = dict(
        zip(
            agreement.COLUMNS,
            agreement.row(kept, floor, {"a": 0.8, "b": 1.0}),
            strict=True,
        )
    )
    assert cells["reused"] == pytest.approx(0.7)
    assert cells["reused, pooled"] == pytest.approx(0.8)
    assert cells["of alignable"] == pytest.approx(320 / 380)
    assert cells["KL 16"] == pytest.approx(0.03)
    assert cells["x bf16 twice"] == pytest.approx(3.0)
    assert cells["x bf16/fp32"] == pytest.approx(1.5)
    assert cells["first token same"] == 0.5


def test_result_and_plot_hold_every_method() -> None:
    noise = [
        Score("bf16 twice", "a", 100, 0, True, 0.001, 0.001, 1.0),
        Score("bf16 against fp32", "a", 100, 0, True, 0.001, 0.002, 1.0),
    ]
    found = [
        Score("kvshare balanced", "a", 100, 80, True, 0.01, 0.004, 1.0),
        Score("window 8", "a", 100, 85, True, 0.01, 0.006, 1.0),
    ]
    tuned, result = (
        agreement.result_of(
            Options(data=Path()), "m", [PAIR], found, noise, name="agreement", split=one
        )
        for one in get_args(Split)
    )
    names = [line[0] for line in result.rows]
    assert names == ["bf16 twice", "bf16 against fp32", "kvshare balanced", "window 8"]
    assert [reached for _, _, reached in result.targets] == [True]
    assert tuned.targets == []
    axes = agreement.draw(result).axes[0]
    assert len(axes.lines) == 4  # two methods, two floors


def text_of(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def write_conversations(folder: Path, texts: list[str]) -> None:
    target = folder / "sharegpt"
    target.mkdir()
    lines = [json.dumps({"id": f"c{at}", "human": [text]}) for at, text in enumerate(texts)]
    (target / "human_turns.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def test_pairs_are_similar_not_identical_and_edited(tmp_path: Path) -> None:
    base = prompt_of(120, 5)
    longer = [*base, *prompt_of(20, 6)]  # its donor is a prefix: nothing is edited
    edited = [*base[:50], 1, 2, 3, *base[50:]]
    texts = [text_of(t) for t in (base, prompt_of(120, 7), longer, base, edited)]
    write_conversations(tmp_path, texts)
    halves = [similar_pairs(tmp_path, Words(), split, 10) for split in ("tune", "report")]
    found = halves[0] + halves[1]
    assert [(pair.id, list(pair.prompt)) for pair in found] == [("c4#0", edited)]
    assert list(found[0].donor) in (base, longer)
    assert found[0].alignable > 0.95


def test_halves_have_no_prompt_in_common_and_samples_nest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement_pairs, "_PER_DONOR", 100)
    base = prompt_of(120, 5)
    write_conversations(
        tmp_path, [text_of(base), *(text_of([*base[:50], 1 + n, *base[51:]]) for n in range(20))]
    )
    tune = similar_pairs(tmp_path, Words(), "tune", 100)
    report = similar_pairs(tmp_path, Words(), "report", 100)
    assert len(tune) + len(report) == 20
    assert min(len(tune), len(report)) > 3
    assert {pair.id for pair in tune}.isdisjoint(pair.id for pair in report)
    assert similar_pairs(tmp_path, Words(), "tune", 2) == tune[:2]


@pytest.mark.parametrize("lineup", get_args(Lineup))
def test_methods_of_a_grid_have_names_of_their_own(lineup: Lineup) -> None:
    names = [method.name for method in grid((), lineup)]
    assert len(names) == len(set(names))
    assert "kvshare balanced" in names


def test_the_frontier_is_what_nothing_else_beats_in_both() -> None:
    points = {
        "most": (0.9, 0.05),
        "same as most": (0.9, 0.05),
        "worse": (0.7, 0.05),
        "between": (0.8, 0.01),
        "least": (0.5, 0.001),
        "less for more": (0.4, 0.002),
    }
    assert agreement.best_points(points) == {"most", "between", "least"}
