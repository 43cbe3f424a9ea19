"""Counts, and why a request missed, as people read them."""

from __future__ import annotations

import re
from pathlib import Path

from kvshare_store.cli.log import request_lines
from kvshare_store.readable import many, miss_text
from tests.cli.test_cli import REQUEST

PAGE = Path(__file__).parents[1] / "docs/vllm.md"


def test_one_is_no_plural() -> None:
    assert [many(count, "node") for count in (0, 1, 2, 1234)] == [
        "0 nodes", "1 node", "2 nodes", "1,234 nodes"]  # fmt: skip


def test_each_reason_that_an_answer_gives_has_a_meaning() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| reason | meaning |")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    reasons = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(reasons) > 15
    assert [name for name in reasons if not miss_text(name)] == []
    assert miss_text("architecture_unlisted") == "", "it speaks for itself"


def test_a_request_that_missed_says_what_its_reason_means() -> None:
    missed = REQUEST | {
        "outcome": "miss", "reason": "load_timeout", "policy": "exact", "model": "m",
        "held": 0.0, "saving_ms": 0.0, "donors": (), "spans": (),
    }  # fmt: skip
    lines = [str(line) for line in request_lines(missed)]
    (line,) = [line for line in lines if line.startswith("load_timeout: ")]
    assert line.endswith("the answer says load_failed")
