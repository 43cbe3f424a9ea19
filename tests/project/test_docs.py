"""What the documents say about settings, commands, dependencies, packages and tests is true."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks.harness.dead_links import broken
from kvshare_store.cli.main import app
from kvshare_store.commit import home
from kvshare_store.config import FIELDS, StoreConfig, load_settings
from kvshare_store.config.settings import SIZES
from kvshare_store.lookup import text_vectors
from kvshare_store.lookup.policy import LEAST_WINDOW, PRESETS
from kvshare_store.tensors import frame
from tests.support.documents import DOCS, PAGES, ROOT, quoted, tables_of
from tests.support.made_parts import parts_in
from tests.support.settings_page import PAGE, parts
from tests.support.short_model import short_model
from tests.support.source_fields import fields_of

DESIGN = DOCS / "design"


# --- settings -------------------------------------------------------------------------------------


def test_the_tables_of_settings_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.support.settings_page` writes them anew."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert parts_in(PAGE) == parts()


def test_every_setting_says_what_it_is() -> None:
    fields = fields_of(StoreConfig)
    assert [field.name for field in fields] == list(FIELDS)
    assert [field.name for field in fields if not field.about.endswith(".")] == []


def test_a_unit_that_a_name_has_is_the_unit_of_its_type() -> None:
    """Of what `_seconds`, `_ms` and their like end."""
    units = {"seconds": "Seconds", "s": "Seconds", "ms": "Milliseconds", "bytes": "Bytes",
             "tokens": "Tokens"}  # fmt: skip
    wrong = [
        field.name
        for field in fields_of(StoreConfig)
        if (unit := units.get(field.name.rpartition("_")[2])) and field.kind != unit
    ]
    assert wrong == []
    assert {field.name for field in fields_of(StoreConfig) if field.kind == "Bytes"} == set(SIZES)


def test_the_settings_file_that_is_shown_is_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    file = tmp_path / "kvshare.yaml"
    file.write_text(shown)
    given = load_settings(file=file, environ={}).given()
    assert given == {"host_bytes": 16 * 2**30, "policy": "faithful", "disk": True}


def test_the_policies_are_the_presets() -> None:
    (table,) = tables_of(PAGE, "policy")
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
    """Names of all packages that pyproject.toml and the benchmarks require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [requirement for extra in extras for requirement in extra]
    for name in ("lmcache.txt", "bench.txt", "docs.txt", "schemas.txt"):
        pins = (ROOT / "requirements" / name).read_text().splitlines()
        asked += [line for line in pins if line and not line.startswith(("#", "-r "))]
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in asked}


def test_every_dependency_has_a_line() -> None:
    found = tables_of(DESIGN / "dependencies.md", "library")
    lines = [row[0].lower() for table in found for row in table[1:]]
    assert len(lines) == len(set(lines)), "a line for each, once"
    assert set(lines) == required()


def test_every_package_has_a_place() -> None:
    (table,) = tables_of(DESIGN / "architecture.md", "package or module")
    named = [name for row in table[1:] for name in quoted(row[0])]
    paths = [*(ROOT / "kvshare_store").iterdir(), *(ROOT / "connectors").iterdir()]
    here = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name.rpartition("/")[2] for name in named} - {"eviction", "remotes", "tiers"} == {
        name for name in here if not name.startswith("__")
    }


def test_every_folder_of_tests_is_described() -> None:
    (table,) = tables_of(ROOT / "CONTRIBUTING.md", "folder", "what its tests are about")
    named = {name.partition("/")[0] for row in table[1:] for name in quoted(row[0])} - {"tests"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert named == folders - {"__pycache__"}


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


def test_pictures_of_the_page_are_those_that_its_tests_take() -> None:
    """And they are small enough for a clone."""
    folder = DOCS / "images"
    shown = set(re.findall(r"images/page-(\w+)\.png\)", "\n".join(p.read_text() for p in PAGES)))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "engine").glob("test_*.py"))
    assert shown == set(re.findall(r'pictures\.take\(tab, "(\w+)"', tests))
    assert {path.name for path in folder.iterdir()} == {f"page-{name}.png" for name in shown}
    assert [path.name for path in folder.iterdir() if path.stat().st_size > 100_000] == []


# --- order of writes ------------------------------------------------------------------------------


def test_every_step_names_a_test_that_exists() -> None:
    steps = [row for table in tables_of(DESIGN / "ordering.md", "test") for row in table[1:]]
    assert len(steps) > 40
    named = {name for row in steps for name in quoted(row[-1])}
    assert [row[0] for row in steps if not quoted(row[-1])] == []
    assert sorted(name for name in named if not exists(name)) == []


def exists(test: str) -> bool:
    """Whether a `file.py::function` exists; a file without a folder may be anywhere in tests."""
    file, _, function = test.partition("::")
    definition = re.compile(rf"^ *(?:async )?def {re.escape(function)}\(", re.MULTILINE)
    found = (ROOT / "tests").rglob(file)
    return bool(function) and any(definition.search(path.read_text()) for path in found)


# --- examples -------------------------------------------------------------------------------------


def examples() -> dict[str, str]:
    """The Python blocks of the page on the library, by what they are about."""
    page = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == len(set(blocks)) == 2, "a new block needs a test here"
    return {("library" if "StoreConfig" in block else "transformers"): block for block in blocks}


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[dict[str, Any], str]]:
    """`run_example(name)`: its names and what it printed, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    # whether the real model loads is another test's; here it would only take its time
    monkeypatch.setattr(text_vectors, "text_embeddings_installed", lambda: False)

    def run(name: str) -> tuple[dict[str, Any], str]:
        (tmp_path / "example.py").write_text(examples()[name])
        names = runpy.run_path("example.py")
        return names, capsys.readouterr().out

    return run


def test_the_library_example_runs(
    run_example: Callable[[str], tuple[dict[str, Any], str]],
) -> None:
    names, out = run_example("library")
    assert names["plan"].declined == ""
    assert names["plan"].exact == 500
    assert names["plan"].reused > 900
    assert len(names["loaded"].positions) == names["plan"].reused
    assert names["loaded"].rows.shape == names["layout"].shape(names["plan"].reused)
    assert out.startswith(f"500 {names['plan'].reused} ")


@pytest.mark.slow
def test_the_transformers_example_reuses_more_than_the_chat_template(
    run_example: Callable[[str], tuple[dict[str, Any], str]], tmp_path: Path
) -> None:
    (tmp_path / "model-folder").symlink_to(short_model())
    names, out = run_example("transformers")
    answer = names["answer"]
    assert answer.reused > 0.7 * answer.prompt_tokens > 200
    assert out.startswith(f"{answer.reused} of {answer.prompt_tokens} tokens reused: ")


# --- what a stranger must be told -----------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_the_front_pages_say_when_which_policy_is_right(page: str) -> None:
    """That larger models repeat old values must stand beside the table, not only in a design
    note."""
    text = (ROOT / page).read_text()
    assert re.search(r"8 ?(B|billion) parameters follow", " ".join(text.split())), page
    (table,) = (table for table in tables_of(ROOT / page, "traffic"))
    column = table[0].index("policy")
    named = {name for row in table[1:] for name in quoted(row[column])}
    assert named == {"exact", "faithful", "balanced", "aggressive"}
    records = next(row for row in table[1:] if "medical" in row[0])
    assert quoted(records[column]) == ["exact"]


def test_the_picture_in_the_readme_is_no_record_of_a_person() -> None:
    """Its default policy is approximate, but a patient's values must be right."""
    picture = (ROOT / "README.md").read_text().split("```")[1]
    assert "reused" in picture
    assert not re.search("patient|diagnos|HbA1c", picture, re.IGNORECASE)


def test_the_limits_say_what_others_in_the_namespace_can_do() -> None:
    limits = (ROOT / "README.md").read_text().split("## Honest limits")[1]
    assert "cache_salt" in limits
    assert "docs/design/security.md" in limits
