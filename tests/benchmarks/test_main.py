"""Which measurements the commands run."""

from __future__ import annotations

import shlex
from importlib.util import find_spec

import typer.main

from benchmarks.__main__ import MEASUREMENTS, all_names, app
from tests.support.documents import PAGES, commands_of


def test_the_short_form_leaves_out_what_is_a_part_of_another_measurement():
    assert all_names(short=False) == list(MEASUREMENTS)
    left_out = set(MEASUREMENTS) - set(all_names(short=True))
    assert left_out == {"table1-presets", "agreement-presets"}


def test_every_measurement_has_a_module() -> None:
    modules = {name: f"benchmarks.{module}" for name, module in MEASUREMENTS.items()}
    assert [name for name, module in modules.items() if not find_spec(module)] == []


def test_the_commands_of_the_pages_are_understood() -> None:
    group = typer.main.get_command(app)
    shown = [shlex.split(command) for page in PAGES for command in commands_of(page)]
    asked = [words[3:] for words in shown if words[:3] == ["python", "-m", "benchmarks"]]
    assert {words[0] for words in asked} == {"run", "fetch"}
    for name, *rest in asked:
        given = group.commands[name].make_context(name, rest).params
        assert set(given.get("names", ())) <= set(MEASUREMENTS)
