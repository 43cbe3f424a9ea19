"""The demo's report: its structure, sums, verdict and appearance."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from examples.demo import report, terminal
from examples.demo.report import Answer, FollowerResult, Results, Reuse

TEXT = "the cat sat on the mat"


def answer(seconds: float, *, tokens: int = 1200, ids: tuple[int, ...] = (7, 8), text: str = TEXT):
    return Answer(seconds, tokens, 0, list(ids), text)


def follower(family: str = "contract", *, tokens: int = 1200, recomputed: int = 100, **ours):
    result = FollowerResult(family)
    for _ in range(2):
        result.add("full", answer(0.8, tokens=tokens))
        result.add("prefix", answer(0.6, tokens=tokens))
        result.add("kvshare", answer(0.1, tokens=tokens, **ours))
        result.reuses.append(Reuse(100, tokens - 100 - recomputed, recomputed))
    return result


def results(*followers: FollowerResult) -> Results:
    return Results(
        list(followers),
        [{"full": [1.0, 1.0], "kvshare": [1.02, 1.02]}],
        [{"full": [0.9], "again": [0.1]}],
        {"timeout": 0},
    )


def summary_of(measured: Results) -> dict:
    return report.build_report("vllm 1", "m", measured)["summary"]


def test_the_report_has_the_promised_shape() -> None:
    made = report.build_report("vllm 1", "m", results(follower()))
    assert list(made) == ["engine", "model", "machine", "followers", "summary"]
    assert list(made["followers"][0]) == [
        "family", "tokens", "reused_exact", "reused_edited", "recomputed",
        "ttft_full_s", "ttft_prefix_s", "ttft_kvshare_s", "first_token_same", "rougeL_vs_full",
        "rougeL_prefix_vs_full",
    ]  # fmt: skip
    assert {
        "median_speedup_vs_full", "median_speedup_vs_prefix", "share_reused",
        "first_token_agreement", "miss_overhead",
    } <= set(made["summary"])  # fmt: skip
    json.dumps(made)


def test_a_row_holds_medians_and_the_reuse() -> None:
    measured = follower()
    measured.add("kvshare", answer(5.0))
    row = report.follower_row(measured)
    assert row["ttft_kvshare_s"] == 0.1
    assert (row["reused_exact"], row["reused_edited"], row["recomputed"]) == (100, 1000, 100)
    assert row["first_token_same"] is True
    assert row["rougeL_vs_full"] == 1.0


def test_the_reuse_of_a_follower_is_one_that_happened() -> None:
    measured = FollowerResult("f", reuses=[Reuse(0, 0, 9), Reuse(1, 2, 6), Reuse(2, 2, 5)])
    assert measured.reuse == Reuse(1, 2, 6)


def test_another_first_token_and_text_are_noticed() -> None:
    row = report.follower_row(follower(ids=(9, 8), text="the dog sat on the mat"))
    assert row["first_token_same"] is False
    assert 0.5 < row["rougeL_vs_full"] < 1.0


def test_the_summary_counts_what_it_says() -> None:
    light, heavy = follower(), follower(recomputed=400)
    heavy.ttfts["kvshare"] = [0.4]
    short = follower(tokens=500)
    short.ttfts["full"] = [0.2]
    summary = summary_of(results(light, heavy, short))
    assert summary["median_speedup_vs_full"] == 2.0
    assert summary["speedup_1k_10pct"] == {"median": 8.0, "n": 1}
    assert summary["speedup_1k_balanced"] == {"median": 5.0, "n": 2}
    assert summary["share_reused"] == pytest.approx((1100 + 800 + 400) / 2900, abs=1e-4)
    assert summary["miss_overhead"] == pytest.approx(0.02)
    assert summary["identical_again_speedup"] == pytest.approx(9.0)


def test_the_noise_floor_is_prefix_caching_against_full_prefill() -> None:
    agreed, other = follower(), follower()
    other.answers["prefix"] = answer(0.6, ids=(1,), text="nothing in common here")
    floor = summary_of(results(agreed, other))["noise_floor"]
    assert floor == {"first_token_agreement": 0.5, "mean_rougeL_vs_full": 0.5}


def test_nothing_measured_is_null_and_not_zero() -> None:
    summary = summary_of(Results())
    assert summary["median_speedup_vs_full"] is None
    assert summary["miss_overhead"] is None
    assert summary["share_reused"] is None
    lines = dict(terminal.summary_lines(summary))
    assert lines["Tokens reused"] == "–"  # noqa: RUF001
    assert "Speedup of an identical prompt" not in lines, "the short demo does not send any"


def test_the_cost_of_a_few_misses_is_not_shown() -> None:
    measured = results(follower())
    assert "Cost of a miss" not in dict(terminal.summary_lines(summary_of(measured)))
    measured.misses *= 11
    assert dict(terminal.summary_lines(summary_of(measured)))["Cost of a miss"] == "2.0% (n=11)"


def test_texts_without_words_can_be_compared() -> None:
    assert report.rouge_l("…", "…") == 1.0
    assert report.rouge_l("…", "word") == 0.0


def test_a_job_that_worked_has_no_problems() -> None:
    assert report.problems(results(follower())) == []


def test_a_silent_engine_is_a_problem() -> None:
    assert "contract" in report.problems(results(follower(ids=())))[0]


def test_no_edited_reuse_is_a_problem() -> None:
    assert report.problems(results(follower(recomputed=1100))) == ["no follower reused edited KV"]


def test_an_error_in_the_store_is_a_problem() -> None:
    measured = results(follower())
    measured.errors = {"corrupt": 2, "timeout": 0}
    assert report.problems(measured) == ["the store counted errors: {'corrupt': 2}"]


def test_an_empty_run_is_a_problem() -> None:
    assert len(report.problems(Results())) == 2


def test_the_terminal_shows_everything_in_eighty_columns() -> None:
    measured = results(follower("medical_report", tokens=1999), follower("book_character"))
    measured.followers[0].answers["prefix"] = answer(0.6, text=f"{'other ' * 60}mat")
    console = Console(width=80, record=True, file=io.StringIO())
    terminal.show(report.build_report("vllm 1", "m", measured), measured, console)
    shown = console.export_text()
    assert "…" not in shown.replace(TEXT, "")
    assert re.search(r"^medical_report +100 +1,799 +100 .* 8\.0× same +1\.00 +0\.03$", shown, re.M)  # noqa: RUF001
    assert max(map(len, shown.splitlines())) <= 80
    assert "something else ran." in shown.replace("\n", " ")
    assert "Time to first token, KVShare under policy balanced" in shown
    assert "book_character, with KVShare" in shown


def test_answers_are_shown_as_they_are() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal.side_by_side(follower(text="[bold]not markup[/]")))
    assert "[bold]not markup[/]" in console.export_text()


def test_the_machine_is_read_and_not_assumed(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu amx_tile\n\nmodel name\t: Other\n")
    assert report.cpu_info(info) == {"model name": "Some CPU", "flags": "fpu amx_tile"}
    assert report.cpu_info(tmp_path / "absent") == {}
    assert set(report.machine()) == {"cpu", "cores", "amx"}
