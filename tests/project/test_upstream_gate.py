"""What `make test-upstream` takes for a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.upstream.__main__ import PAIRS, main, suite
from tests.upstream.gate import Result, differences, missing, not_called

FILE = "tests/v1/core/test_scheduler.py"
PASSING = Result({f"{FILE}::test_a": "passed", f"{FILE}::test_b": "passed"})


def changed(**outcomes: str) -> Result:
    return Result(PASSING.outcomes | {f"{FILE}::{test}": how for test, how in outcomes.items()})


@pytest.mark.parametrize("how", ["failed", "skipped"])
def test_a_test_that_ends_otherwise_is_named(how: str) -> None:
    assert differences(PASSING, PASSING) == []
    (found,) = differences(PASSING, changed(test_b=how))
    assert found == f"{FILE}::test_b: expected passed, {how} with our schedulers"


def test_a_test_that_ran_in_one_arm_alone_is_named() -> None:
    alone = changed(test_c="passed")
    assert "expected not run, passed" in differences(PASSING, alone)[0]
    assert "expected passed, not run" in differences(alone, PASSING)[0]


def test_what_we_refuse_must_be_refused() -> None:
    refused = {f"{FILE}::test_b"}
    assert differences(PASSING, changed(test_b="failed"), refused) == []
    assert differences(PASSING, PASSING, refused) != []


@pytest.mark.parametrize(
    "result",
    [changed(test_b="skipped"), changed(test_b="failed"), Result()],
    ids=["skipped", "failed", "none ran"],
)
def test_the_number_of_tests_must_not_shrink(result: Result) -> None:
    assert missing(PASSING, {FILE: 2}, ["passed"]) == []
    assert missing(result, {FILE: 2}, ["passed"]) != []


def test_a_test_that_may_fail_must_run() -> None:
    assert missing(changed(test_b="failed"), {FILE: 2}, ["passed", "failed"]) == []
    assert missing(changed(test_b="skipped"), {FILE: 2}, ["passed", "failed"]) != []


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
