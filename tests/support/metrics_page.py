"""The tables of the page on metrics, made by `python -m tests.support.metrics_page`."""

from __future__ import annotations

from collections.abc import Iterable

from kvshare_connectors.vllm.metrics import DECLARED, Declared

from kvshare_store.observability.exposition import GROUPS, Family
from tests.support.documents import DOCS
from tests.support.made_parts import Parts, cell, code, remake, table

PAGE = DOCS / "metrics.md"


def parts() -> Parts:
    """What engines export, and the groups of what the daemon does."""
    engines = (one._replace(name=_exported(one)) for one in DECLARED)
    return {"vllm": _table(engines)} | {name: _table(group) for name, group in GROUPS.items()}


def _exported(one: Declared) -> str:
    return one.name + ("_total" if one.kind == "counter" else "")


def _table(metrics: Iterable[Declared | Family]) -> str:
    rows = (
        (code(one.name), one.kind, ", ".join(map(code, one.labels)) or "–", cell(one.help))  # noqa: RUF001
        for one in metrics
    )
    return table(("metric", "kind", "labels", "meaning"), rows)


if __name__ == "__main__":
    remake(PAGE, parts())
