"""Tests look from outside: what reaches into private state of the product is listed here, with the
reason, and the list does not grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ["kvshare_store", "connectors", "benchmarks", "examples"]
OTHERS = {"_preempt_request", "_replace"}
"""Names that vLLM and `NamedTuple` have given."""
ALLOWED = {
    # memory that is given back leaves nothing to see from outside
    "lookup/test_nobody_waits.py": {"_models", "_rows"},
    "nodes/test_index.py": {"_nodes"},
    # what is sent between two looks of a purge can be sent at no other moment
    "maintenance/test_purge_lineage.py": {"_remove"},
    # vLLM made the connector and keeps it: the harness looks through it
    "engine/harness.py": {"_worker"},
    # that of Python's `logging`
    "engine/test_connector.py": {"_cache"},
    # both ways must write the same bytes: the test has to know that it compares two ways
    "engine/test_paged_cache.py": {"_joined"},
    # snapshots without the parts that a GPU is needed for are put together by hand
    "gpu/streams.py": {"_copied", "_copy_blocks", "_format"},
    # that of LanceDB, whose thread daemons begin once they are forked
    "support/loaded.py": {"_start"},
    # its own: a second constructor
    "support/power_cut.py": {"_durable", "_name"},
}


def is_private(name: str) -> bool:
    """Constants may be set by tests: CONTRIBUTING says how."""
    return name.startswith("_") and not name.startswith("__") and not name.isupper()


def defined(tree: ast.Module) -> Iterator[str]:
    """Private functions, classes and attributes that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Attribute) and is_own(node):
            name = node.attr
        else:
            continue
        if is_private(name):
            yield name


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def reached(tree: ast.Module, private: set[str]) -> Iterator[str]:
    """The private names of others that a module uses: as attributes, imported, or patched."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_own(node):
            used = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            patched = node.func.attr in ("setattr", "getattr", "object")
            used = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)] * patched
        else:
            continue
        yield from private.intersection(used)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_tests_reach_into_nothing_that_is_not_listed() -> None:
    sources = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    private = {name for path in sources for name in defined(parsed(path))} - OTHERS
    assert len(private) > 500
    tests = ROOT / "tests"
    found = {
        path.relative_to(tests).as_posix(): set(reached(parsed(path), private))
        for path in tests.rglob("*.py")
    }
    assert {path: names for path, names in found.items() if names} == ALLOWED


def test_every_way_of_reaching_in_is_seen() -> None:
    text = """
from kvshare_store.module import _function
store._attribute
monkeypatch.setattr(store, "_patched", None)
self._own
_LIMIT
"""
    names = {"_function", "_attribute", "_patched", "_own"}
    assert set(reached(ast.parse(text), names)) == names - {"_own"}
