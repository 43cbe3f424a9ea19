"""What the documents say about settings, commands, dependencies, rooms and tests is so."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from benchmarks.links import broken
from kvshare_store import home, text_vectors
from kvshare_store.cli.main import app
from kvshare_store.config import FIELDS, StoreConfig
from kvshare_store.lookup.policy import LEAST_WINDOW, PRESETS
from kvshare_store.tensors import frame
from kvshare_store.tensors.rope import Rope

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs" / "design"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])

Table = list[list[str]]
"""Rows of cells, the header first."""


def tables(text: str) -> Iterator[Table]:
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            for line in block.splitlines()
        )
        yield [head, *rows]


def tables_of(path: Path, *head: str) -> list[Table]:
    """The tables of a document whose header begins (or, for one name, ends) so."""
    found = [
        table
        for table in tables(path.read_text())
        if tuple(table[0][: len(head)]) == head or table[0][-len(head) :] == list(head)
    ]
    assert found, f"{path.name} has no table with {head}"
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- settings -------------------------------------------------------------------------------------


def told(value: Any) -> str:
    """A default as the table writes it."""
    if value is None:
        return "the policy's"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"`{value.replace(str(Path.home()), '~')}`" if value else "none"
    if isinstance(value, int):
        gib = value / 2**30
        return f"{gib:g} GiB" if gib >= 1 else str(value)
    return f"{value:g}"


def test_every_setting_has_a_row_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    path = ROOT / "docs" / "configuration.md"
    rows = [row for table in tables_of(path, "field", "default") for row in table[1:]]
    written = {name: default for cell, default, _ in rows for name in quoted(cell)}
    assert len(written) == len(rows), "a row for each, once"
    defaults = StoreConfig()
    assert written == {name: told(getattr(defaults, name)) for name in FIELDS}


def test_the_policies_are_the_presets() -> None:
    (table,) = tables_of(ROOT / "docs" / "configuration.md", "policy")
    written = {quoted(row[0])[0]: row[2:] for row in table[1:]}
    expected = {}
    for name, preset in PRESETS.items():
        window = str(preset.edit_window)
        if preset.edit_growth:
            window = f"{preset.edit_growth:g} × the edit, {LEAST_WINDOW} to {window}"  # noqa: RUF001
        numbers = (window, preset.min_run, preset.tail, preset.max_generation)
        nothing = "–"  # noqa: RUF001
        expected[name] = [str(number) if preset.edited else nothing for number in numbers]
    assert written == {name: cells for name, cells in expected.items() if name != "off"}


# --- what else has a place ------------------------------------------------------------------------


def required() -> set[str]:
    """Names of all that pyproject.toml and the benchmarks ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [requirement for extra in extras for requirement in extra]
    pins = (ROOT / "requirements" / "bench.txt").read_text().splitlines()
    asked += [line for line in pins if line and not line.startswith("#")]
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in asked}


def test_every_dependency_has_a_line() -> None:
    found = tables_of(DESIGN / "dependencies.md", "library")
    lines = [row[0].lower() for table in found for row in table[1:]]
    assert len(lines) == len(set(lines)), "a line for each, once"
    assert set(lines) == required()


def test_every_room_has_a_place() -> None:
    (table,) = tables_of(DESIGN / "architecture.md", "room")
    named = [name for row in table[1:] for name in quoted(row[0])]
    paths = [*(ROOT / "kvshare_store").iterdir(), *(ROOT / "connectors").iterdir()]
    rooms = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name.rpartition("/")[2] for name in named} - {"eviction", "remotes"} == {
        room for room in rooms if not room.startswith("__")
    }


def test_versions_of_what_is_stored() -> None:
    page = (DESIGN / "format.md").read_text()
    assert f"version of everything below: `{home.FORMAT}`" in page
    assert f"| version | {frame.VERSION} |" in page


def test_every_command_is_named() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    names = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert names
    assert [name for name in names if not re.search(rf"kvshare {name}\b", text)] == []


def test_every_make_target_that_is_named_exists() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)(?=[`\n]|  | [A-Z])", text, re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "chaos"} <= named <= set(targets)


def test_links_lead_somewhere() -> None:
    assert list(broken(ROOT)) == []


# --- order of writes ------------------------------------------------------------------------------


def test_every_step_names_a_test_that_exists() -> None:
    steps = [row for table in tables_of(DESIGN / "ordering.md", "test") for row in table[1:]]
    assert len(steps) > 40
    named = {name for row in steps for name in quoted(row[-1])}
    assert [row[0] for row in steps if not quoted(row[-1])] == []
    assert sorted(name for name in named if not exists(name)) == []


def exists(test: str) -> bool:
    """Whether a `file.py::function` is there; a file without a folder may be anywhere in tests."""
    file, _, function = test.partition("::")
    definition = re.compile(rf"^ *(?:async )?def {re.escape(function)}\(", re.MULTILINE)
    found = (ROOT / "tests").rglob(file)
    return bool(function) and any(definition.search(path.read_text()) for path in found)


# --- examples -------------------------------------------------------------------------------------


def test_the_library_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there; what it leaves open is the model's rotary table."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (example,) = (block for block in blocks if "StoreConfig" in block)
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    # whether the real model loads is another test's; here it would only take its time
    monkeypatch.setattr(text_vectors, "text_embeddings_installed", lambda: False)
    angles = torch.outer(torch.arange(1024.0), 10_000.0 ** -(torch.arange(32.0) / 32))
    rope = Rope(angles.cos(), angles.sin(), neox=True)
    names = runpy.run_path("example.py", {"my_models_rope_table": rope})
    assert names["plan"].declined == ""
    assert names["plan"].exact == 500
    assert len(names["loaded"].positions) == names["plan"].reused
    assert names["loaded"].rows.shape == names["layout"].shape(names["plan"].reused)
    assert capsys.readouterr().out.startswith(f"500 {names['plan'].reused} ")
