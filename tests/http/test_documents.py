"""What the documents say about the HTTP server, and what a wheel has of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from kvshare_store.config import StoreConfig
from tests.support.http_page import PAGE, described, parts
from tests.support.made_parts import parts_in

ROOT = Path(__file__).parents[2]
HTTP = ROOT / "kvshare_store" / "http"


def test_the_table_is_what_the_code_says() -> None:
    """`python -m tests.support.http_page` writes it anew."""
    assert parts_in(PAGE) == parts()


def test_every_answer_has_a_type() -> None:
    document = described()
    for path, methods in document["paths"].items():
        for found in methods.values():
            assert found["summary"], path
            assert found["description"], path
            ((_, content),) = found["responses"]["200"]["content"].items()
            schema = content["schema"]
            assert schema.keys() & {"$ref", "items", "type"}, path


def test_the_examples_name_settings_that_exist() -> None:
    page = PAGE.read_text()
    assert set(re.findall(r"--set (\w+)=", page)) <= set(StoreConfig.__struct_fields__)
    assert "KVSHARE_HTTP=" in page


def test_a_wheel_has_pages_and_styles(tmp_path: Path) -> None:
    """Built of a copy, as a release is: nothing that lies about here can help."""
    source = tmp_path / "source"
    for folder in ("kvshare_store", "connectors"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (source / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("kvshare_store/http/")}
    here = [path for path in HTTP.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert packed == {path.relative_to(ROOT).as_posix() for path in here}
    assert {
        "kvshare_store/http/static/page.css",
        "kvshare_store/http/templates/base.html",
    } <= packed
