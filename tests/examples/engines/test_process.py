"""An engine's process takes its commands as lines of JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.engines.process import EngineError, EngineProcess

STAND_IN = """
from examples.engines.process import answer_commands

class Commands:
    def add(self, one, other):
        print("this is not an answer")
        return one + other

answer_commands(lambda: ("1.2", Commands()))
"""


class Adder(EngineProcess):
    def add(self, one: int, other: int) -> int:
        return int(self._do("add", one=one, other=other))


def test_commands_are_answered_and_other_output_goes_to_the_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STAND_IN]
    with (tmp_path / "log").open("w") as log, Adder("adder", command, log) as adder:
        assert adder.ready() == "1.2"
        assert adder.add(1, 2) == 3
        assert adder.add(3, 4) == 7
    assert (tmp_path / "log").read_text().count("this is not an answer") == 2


def test_an_engine_that_has_stopped_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no engine today')"]
    with (
        (tmp_path / "log").open("w") as log,
        Adder("adder", command, log) as adder,
        pytest.raises(EngineError, match="'adder' has stopped"),
    ):
        adder.ready()
    assert "no engine today" in (tmp_path / "log").read_text()
