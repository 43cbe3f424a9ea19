"""What an engine's log says of its daemon and of settings, when it starts."""

from __future__ import annotations

from typing import Any

import pytest
from kvshare_connectors.vllm.banner import active, in_vain

from kvshare_store.config import Settings, StoreConfig

pytestmark = pytest.mark.filterwarnings("ignore")

STATS = {"pid": 7, "version": "1.2"}
THEIRS: dict[str, Any] = {
    "policy": "aggressive", "quality_bound": 0.0, "http": "", "min_run": 4, "log_requests": False,
    "log_format": "text", "min_prompt_tokens": 32, "min_saving_ms": 2.0,
}  # fmt: skip
FAR = "tcp://127.0.0.1:7411"


def given(**fields: Any) -> Settings:
    """Settings of which these were given explicitly."""
    return Settings(StoreConfig(**fields), dict.fromkeys(fields, "given"))


def test_a_daemon_of_another_machine_has_no_home_and_no_process_here() -> None:
    near = active(given(home="/srv/store"), THEIRS, STATS)
    assert near == "KVShare active: policy balanced, home /srv/store, daemon pid 7, version 1.2"
    settings = given(connect=FAR, min_run=3)
    assert active(settings, THEIRS, STATS) == (
        f"KVShare active: policy balanced, daemon {FAR}, version 1.2"
    )
    (line,) = in_vain(settings, THEIRS)
    assert line.startswith(f"min_run=3 does not count here: daemon {FAR} runs with 4")
    assert "kvshare stop" not in line


@pytest.mark.parametrize(("policy", "bounded"), [("balanced", True), ("exact", False)])
def test_the_policy_is_named_with_the_bound_that_takes_from_it(policy: str, bounded: bool) -> None:
    line = active(given(policy=policy), THEIRS | {"quality_bound": 0.02}, STATS)
    assert f"policy {policy}" in line
    assert ("under quality_bound 0.02 (new traffic begins at exact)" in line) == bounded


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ({"log_requests": True}, True),
        ({"log_format": "json"}, True),
        ({"min_prompt_tokens": 100}, True),
        ({"min_prompt_tokens": 8}, False),
        ({"min_saving_ms": 50.0}, True),
        ({"min_saving_ms": 0.0}, False),
        ({"policy": "exact"}, True),
        ({"min_run": 3}, False),
        ({"min_run": 4}, True),
    ],
    ids=str,
)
def test_only_what_does_not_count_is_said_not_to(setting: dict[str, Any], counts: bool) -> None:
    lines = [line for line in in_vain(given(**setting), THEIRS) if "does not count here" in line]
    assert len(lines) == (not counts)
