"""The Grafana dashboard asks only for metrics that are exposed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.documents import ROOT, quoted, tables_of

BOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "kvshare.json").read_text())
SCRAPED = {"instance", "job"}
"""Labels that Prometheus itself adds."""
OF_VLLM = {"model_name", "engine"}
THEIRS = {"vllm:prompt_tokens_total": OF_VLLM, "vllm:prefix_cache_hits_total": OF_VLLM}
"""Metrics of vLLM itself; a test of the engine checks them."""
NAME = r"(?:vllm:)?[a-z][a-z0-9_]+"
WORDS = {
    "by", "count", "histogram_quantile", "increase", "max", "min", "or", "rate", "sum", "time",
    "topk", "vector",
}  # fmt: skip
"""Functions of the query language that the dashboard uses."""


def exposed() -> dict[str, set[str]]:
    """Labels of each series, by its name; the document agrees with the code."""
    found = dict(THEIRS)
    for table in tables_of(ROOT / "docs" / "metrics.md", "metric", "kind"):
        for name, kind, labels, _ in table[1:]:
            (metric,) = quoted(name)
            bucket = kind == "histogram"
            others = OF_VLLM if metric.startswith("vllm:") else SCRAPED
            found[metric + "_bucket" * bucket] = {*quoted(labels), *others, *["le"] * bucket}
    return found


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in BOARD["panels"] if panel["type"] != "row")


QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in panels()
    for target in panel["targets"]
]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_is_exposed(query: str) -> None:
    known = exposed()
    for opening, closing in ("()", "{}", "[]"):
        assert query.count(opening) == query.count(closing)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", query)
    by = [re.split(r",\s*", names) for names in re.findall(r"by \(([^)]*)\)", bare)]
    names = set(re.findall(NAME, re.sub(r"by \([^)]*\)", "", bare))) - WORDS
    assert names, "no metric"
    assert names <= known.keys()
    labels = set.intersection(*(known[name] for name in names))
    asked = {label for group in by for label in group}
    for name, matchers in re.findall(rf"({NAME})\{{([^}}]*)\}}", query):
        matched = set(re.findall(r"(\w+)(?:=~|!=|!~|=)\"", matchers))
        assert matched <= known[name], f"{name} has no such label"
    assert asked <= labels


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_variables_are_those_that_queries_use() -> None:
    defined = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__rate_interval", "__all"}
    assert used == defined
