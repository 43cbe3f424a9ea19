"""Every reason for which nothing is reused is in a document, and no document names another."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

import pytest

from tests.support.documents import DOCS, ROOT, quoted, tables_of

WHERE = (
    "kvshare_store/lookup", "kvshare_store/daemon/handling.py", "kvshare_store/namespace",
    "connectors/vllm",
)  # fmt: skip
CALLS = {
    "_declined", "_let_go", "_missed", "abandon", "Adapter", "decline", "give_up", "plan",
    "Promise", "start_over",
}  # fmt: skip
"""Functions that are given a reason."""
NAMES = {"declined", "failed", "reason", "QUALITY_BOUND", "UNPROVEN"}
"""What holds a reason."""
NO_REASONS = {"off"}
"""A policy that is compared where a reason is chosen."""


def name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def words(node: ast.AST | None) -> Iterator[str]:
    """The texts in an expression that are plain words."""
    for each in ast.walk(node) if node is not None else ():
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            word = each.value
            if word.isidentifier() and word.islower() and not word.endswith("_"):
                yield word


def targets(node: ast.Assign) -> set[str]:
    several = [one.elts if isinstance(one, ast.Tuple) else [one] for one in node.targets]
    return {name_of(one) for found in several for one in found}


def codes(node: ast.Call) -> Iterator[ast.AST]:
    """Of `_first((code, condition), …)` the codes."""
    for pair in node.args:
        if isinstance(pair, ast.Tuple):
            code = pair.elts[0]
            yield code.args[1] if isinstance(code, ast.Call) else code


def said(node: ast.AST) -> Iterator[ast.AST | None]:
    """The expressions in which this node says reasons."""
    if isinstance(node, ast.Call):
        if name_of(node.func) in CALLS:
            yield from node.args
        if name_of(node.func) == "_first":
            yield from codes(node)
        yield from (one.value for one in node.keywords if one.arg in NAMES)
    if isinstance(node, ast.Assign):
        if targets(node) & NAMES:
            yield node.value
        if "_DECLINED_ROPE_TYPES" in targets(node) and isinstance(node.value, ast.Dict):
            yield from node.value.values
    if isinstance(node, ast.FunctionDef) and node.name in ("_decline_reason", "_refused"):
        yield from (one.value for one in ast.walk(node) if isinstance(one, ast.Return))


def reasons_in(text: str) -> set[str]:
    """What a module can give as a reason."""
    found = (words(part) for node in ast.walk(ast.parse(text)) for part in said(node))
    return {word for each in found for word in each} - NO_REASONS


def given() -> set[str]:
    """What the code can give."""
    texts: set[str] = set()
    for place in WHERE:
        path = ROOT / place
        for module in path.glob("*.py") if path.is_dir() else [path]:
            texts |= reasons_in(module.read_text())
    return texts | {"worker_unsupported"}  # made of a kind of error


def listed(page: str, *heads: str) -> list[str]:
    rows: Iterable[list[str]] = (
        row for head in heads for table in tables_of(DOCS / page, head) for row in table[1:]
    )
    at = 0 if heads == ("reason",) else 1
    return [word for row in rows for word in quoted(row[at])]


def test_the_documents_list_each_reason_once_and_no_other() -> None:
    answers = [word for word in listed("vllm.md", "reason") if word != "min_prompt_tokens"]
    others = [
        word
        for word in listed(
            "design/vllm.md", "engines that are not served", "requests that reuse nothing"
        )
        if not word.endswith("_")
    ]
    assert len(given()) > 60
    assert sorted(answers + others) == sorted(given())


@pytest.mark.parametrize(
    "text",
    [
        "return _declined(bare, 'why')", "state.looked_up, state.reason = True, 'why'",
        "Outcome(failed='why')", "return lookup.plan(known or 'why')",
        "declined = declined or 'why'",
        "def _refused():\n    return 'why' if full else ''", "_first(('why', x == 'other'))",
        "QUALITY_BOUND = 'why'",
    ],
)  # fmt: skip
def test_reasons_are_found_where_they_are_given(text: str) -> None:
    assert reasons_in(text) == {"why"}
