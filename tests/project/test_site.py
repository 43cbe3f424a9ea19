"""Commands, options and variables that the documents show exist; the site has all pages."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.__main__ import MEASUREMENTS
from docs.site import drawings, reference
from kvshare_store.config import FIELDS
from tests.support.documents import DOCS, PAGES, ROOT, tables_of
from tests.support.needs import need

SHOWN = re.compile(r"(?<![\w/.\"-])kvshare ((?:vllm )?[a-z]+)\b(?!:)([^`\n│|;#]*)")
"""A command with what follows it on its line."""


def shown() -> Iterator[tuple[str, str, list[str]]]:
    """Where the documents show a command, which, and its options."""
    for page in PAGES:
        text = re.sub(r"\s*\\\n\s*", " ", page.read_text())
        fences = re.findall(r"^ *```.*?^ *```", text, re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`[^`\n]+`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
        for code in (*fences, *spans):
            for name, rest in SHOWN.findall(code):
                yield page.name, name, re.findall(r"(?<!\S)--?[a-zA-Z][^\s=)\]]*", rest)


def test_every_command_that_is_shown_exists_and_has_these_options() -> None:
    known = {name: reference.options(it) for name, it in reference.commands().items()}
    seen = list(shown())
    assert len({name for _, name, _ in seen}) > 20
    assert [(page, name) for page, name, _ in seen if name not in {*known, "vllm"}] == []
    own = {f"--kvshare.{field}" for field in (*FIELDS, "config")}
    wrong = [
        (page, name, option)
        for page, name, options in seen
        for option in options
        if option not in (own if name.startswith("vllm") else known[name])
        and not (name.startswith("vllm") and not option.startswith("--kvshare"))  # vLLM's own
    ]
    assert wrong == []


def test_options_beside_a_command_are_its_own() -> None:
    """In a table of commands: `kvshare gc` | … (`--dry-run`)."""
    known = {name: reference.options(it) for name, it in reference.commands().items()}
    (table,) = tables_of(ROOT / "docs" / "commands.md", "command", "what it does")
    wrong = []
    for row in table[1:]:
        names = re.findall(r"kvshare ((?:vllm )?[a-z]+)", row[0])
        own = set().union(*(known[name] for name in names))
        named = re.findall(r"`(--[a-z-]+)", row[1])
        wrong += [(row[0], option) for option in named if option not in own]
    assert wrong == []


def test_every_variable_that_is_shown_is_a_setting() -> None:
    known = {f"KVSHARE_{field.upper()}" for field in FIELDS} | {"KVSHARE_CONFIG"}
    known |= {"KVSHARE_POLICI"}  # how a mistyped one is told
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?<!env:)\bKVSHARE_[A-Z]\w*", text))
    assert len(named) > 1
    assert named <= known


def test_the_page_of_options_has_every_command() -> None:
    page = reference.page()
    for name, command in reference.commands().items():
        section = page.split(f"## kvshare {name}\n")[1].split("\n## ")[0]
        longs = {it for it in reference.options(command) if it.startswith("--")} - {"--help"}
        assert [option for option in longs if option not in section] == []


def test_every_page_of_the_site_has_a_place() -> None:
    """Named in the navigation, or of a folder for which a pattern stands there."""
    text = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r"([\w/*.-]+\.md)", text)
    made = {"index.md", "options.md"}
    assert [name for name in named if "*" not in name and not (DOCS / name).exists()] == [
        name for name in named if name in made
    ]
    folders = {Path(name).parent for name in named if "*" in name}
    pages = {path.relative_to(DOCS) for path in DOCS.glob("**/*.md")}
    assert [page for page in pages if str(page) not in named and page.parent not in folders] == []


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    python = ROOT / ".venv-docs" / "bin" / "python"
    need(python.exists(), "`make docs-setup`")
    site = [str(python), "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)]
    built = subprocess.run(
        site,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (built.returncode, built.stderr) == (0, "")
    pages = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.html")}
    sources = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.glob("**/*.md")}
    assert {str(source) for source in sources} | {"index.html", "options.html"} <= pages.keys()
    loads = re.compile(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
    assert [found for text in pages.values() for found in loads.findall(text)] == []


def test_the_drawings_are_those_of_the_source() -> None:
    for name, draw in drawings.DRAWINGS.items():
        assert (DOCS / "drawings" / name).read_text("utf-8") == draw()
    assert {path.name for path in (DOCS / "drawings").iterdir()} == set(drawings.DRAWINGS)


def test_modules_and_measurements_that_are_shown_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"python -m ((?:benchmarks|examples|tests)(?:\.\w+)*)", text))
    assert len(named) > 3
    assert [name for name in named if find_spec(name) is None] == []
    run = set(re.findall(r"python -m benchmarks run ([a-z0-9_-]+)", text))
    assert run <= {*MEASUREMENTS, "all"}
