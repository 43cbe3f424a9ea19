"""What `make test-upstream` takes for a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.upstream.__main__ import PAIRS, main, suite
from tests.upstream.gate import Result, differences, not_called, not_passed

FILE = "tests/v1/core/test_scheduler.py"
PASSING = Result({f"{FILE}::test_a": "passed", f"{FILE}::test_b": "passed"})


def changed(**outcomes: str) -> Result:
    return Result(PASSING.outcomes | {f"{FILE}::{test}": how for test, how in outcomes.items()})


@pytest.mark.parametrize("how", ["failed", "skipped"])
def test_a_test_that_ends_otherwise_is_named(how: str) -> None:
    assert differences(PASSING, PASSING) == []
    (found,) = differences(PASSING, changed(test_b=how))
    assert found == f"{FILE}::test_b: passed with vLLM's schedulers, {how} with ours"


def test_a_test_that_ran_in_one_arm_alone_is_named() -> None:
    alone = changed(test_c="passed")
    assert "not run with vLLM's" in differences(PASSING, alone)[0]
    assert "not run with ours" in differences(alone, PASSING)[0]


@pytest.mark.parametrize(
    "result",
    [changed(test_b="skipped"), changed(test_b="failed"), changed(test_c="passed"), Result()],
    ids=["skipped", "failed", "one more", "none ran"],
)
def test_the_number_of_passing_tests_is_known(result: Result) -> None:
    assert not_passed(PASSING, {FILE: 2}) == []
    assert not_passed(result, {FILE: 2}) != []


def test_a_file_that_nobody_knows_is_named() -> None:
    assert not_passed(PASSING, {}) != []


def test_tests_that_never_reach_us_show_nothing() -> None:
    assert not_called(Result(calls={"VirtualRows.schedule": 1}), ["VirtualRows.schedule"]) == []
    assert not_called(Result(), ["VirtualRows.schedule"]) != []


def test_an_arm_that_broke_off_has_no_result(tmp_path: Path) -> None:
    assert Result.read(tmp_path / "none.json") == Result()
    written = {"outcomes": PASSING.outcomes, "calls": {"VirtualRows.schedule": 3}}
    (tmp_path / "some.json").write_text(json.dumps(written))
    assert Result.read(tmp_path / "some.json").calls == {"VirtualRows.schedule": 3}


def test_the_suite_is_the_one_that_was_looked_at() -> None:
    assert sum(suite().values()) == 1212
    assert PAIRS["schedulers"].control_passes


@pytest.mark.parametrize("fault", [[], ["a test differs"]])
def test_the_exit_status_says_it(fault: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.upstream.__main__.compare", lambda name, pair: fault)
    assert main(["schedulers"]) == len(fault)
