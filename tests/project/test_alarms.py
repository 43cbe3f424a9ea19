"""Alarms are explained, ask for metrics that exist, and fire."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.documents import ROOT, quoted, tables_of
from tests.support.needs import need

RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_every_alarm_is_explained() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    explained = re.findall(r"^### (KVShare\w+)$", page, re.MULTILINE)
    assert explained == [rule["alert"] for rule in rules()]


def test_alarms_are_of_metrics_that_exist() -> None:
    tables = tables_of(ROOT / "docs" / "metrics.md", "metric")
    known = {name for table in tables for row in table[1:] for name in quoted(row[0])}
    assert len(known) > 40
    for rule in rules():
        used = re.findall(r"\b(?:vllm:)?kvshare_\w+", rule["expr"])
        named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
        assert named <= known, rule["alert"]
        assert named or rule["expr"].startswith("up{")


FIRING = {
    "KVShareDown": ("up", {"job": "kvshare"}, "0x30"),
    "KVShareDegraded": ("kvshare_healthy", {}, "0x30"),
    "KVShareThreadGone": ("kvshare_thread_alive", {"part": "kvshare-io"}, "0x30"),
    "KVShareCommitterHangs": ("kvshare_commit_busy_seconds", {}, "0+60x30"),
    "KVShareJanitorLate": (
        "kvshare_part_last_success_timestamp_seconds", {"part": "kvshare-janitor"}, "0x30",
    ),
    "KVShareSavesRefused": ("kvshare_commit_refused_total", {}, "0x15 1x15"),
    "KVShareTierNotAsked": (
        "kvshare_tier_breaker_state", {"tier": "remote", "state": "open"}, "1x30",
    ),
    "KVShareDamagedBlocks": ("kvshare_quarantined_blocks_total", {"tier": "disk"}, "0x15 1x15"),
    "KVShareClientsCutOff": ("kvshare_cut_off_total", {}, "0x15 1x15"),
    "KVShareQualityUnknown": ("kvshare_quality_silent_classes", {}, "0x3 2x27"),
    "KVShareEnginesAlone": ("vllm:kvshare_requests_total", {"reason": "unavailable"}, "0+1x30"),
    "KVShareLoadsFail": ("vllm:kvshare_requests_total", {"reason": "load_failed"}, "0+1x30"),
}  # fmt: skip
"""A series under which each alarm fires after 20 minutes: name, labels, a value a minute."""
SLOW = {f'kvshare_lookup_seconds_bucket{{instance="i",le="{le}"}}': f"0+{n}x30"
        for le, n in (("0.1", 90), ("0.2", 100), ("+Inf", 100))}  # fmt: skip


_JANITOR = '{instance="i",part="kvshare-janitor"}'
NEVER_ROUND = {
    'kvshare_start_time_seconds{instance="i"}': "0x30",
    f"kvshare_thread_alive{_JANITOR}": "1x30",
}
"""A janitor that runs, and has not once done its work since the daemon started."""
HEALTHY = {
    'up{job="kvshare",instance="i"}': "1x30",
    'kvshare_healthy{instance="i"}': "1x30",
    'kvshare_thread_alive{instance="i",part="kvshare-io"}': "1x30",
    'kvshare_commit_busy_seconds{instance="i"}': "0x9 50 0x20",
    **NEVER_ROUND,
    f"kvshare_part_last_success_timestamp_seconds{_JANITOR}": "0+60x30",
    'kvshare_commit_refused_total{instance="i"}': "7x30",
    'kvshare_tier_breaker_state{instance="i",tier="remote",state="open"}': "0x30",
    'kvshare_tier_breaker_state{instance="i",tier="remote",state="closed"}': "1x30",
    'kvshare_quarantined_blocks_total{instance="i",tier="disk"}': "3x30",
    'kvshare_cut_off_total{instance="i"}': "2x30",
    'kvshare_lookup_seconds_bucket{instance="i",le="0.1"}': "0+100x30",
    'kvshare_lookup_seconds_bucket{instance="i",le="+Inf"}': "0+100x30",
    'kvshare_quality_silent_classes{instance="i"}': "0x30",
    'vllm:kvshare_requests_total{instance="i",reason="unavailable"}': "4x30",
    'vllm:kvshare_requests_total{instance="i",reason="load_failed"}': "0x15 1x15",
    'vllm:kvshare_requests_total{instance="i",reason="no_donor"}': "0+50x30",
}
"""Series under which no alarm fires: what went wrong is over, and the janitor comes round."""
QUIET = {
    "healthy": HEALTHY,
    "no janitor (gc_seconds 0)": {'kvshare_start_time_seconds{instance="i"}': "0x30"},
    "a start five minutes ago": {
        'kvshare_start_time_seconds{instance="i"}': "_x14 900x15",
        f"kvshare_thread_alive{_JANITOR}": "_x14 1x15",
    },
}


def firing(rule: dict[str, Any]) -> dict[str, Any]:
    """A test of one alarm in the words of promtool."""
    name = rule["alert"]
    if name == "KVShareSlowLookups":
        series, labels = SLOW, {}
    else:
        metric, labels, values = FIRING[name]
        named = ",".join(f'{key}="{value}"' for key, value in {"instance": "i", **labels}.items())
        series = {f"{metric}{{{named}}}": values}
    if name in ("KVShareEnginesAlone", "KVShareLoadsFail"):  # sums by instance
        labels = {}
    shown = {"instance": "i", **labels}
    summary = re.sub(
        r"{{ \$labels\.(\w+) }}", lambda it: shown[it[1]], rule["annotations"]["summary"]
    ).replace("{{ $value }}", "2")
    expected = {
        "exp_labels": {**shown, **rule["labels"]},
        "exp_annotations": {"summary": summary},
    }
    return after_twenty_minutes(series, {name: [expected]})


def after_twenty_minutes(series: dict[str, str], alarms: dict[str, list[Any]]) -> dict[str, Any]:
    """A test, in the words of promtool, of which alarms fire over these series."""
    return {
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "alert_rule_test": [
            {"eval_time": "20m", "alertname": name, "exp_alerts": expected}
            for name, expected in alarms.items()
        ],
    }


def test_every_alarm_fires(tmp_path: Path) -> None:
    """Over series that are as bad as each alarm says."""
    check_rules(tmp_path, [firing(rule) for rule in rules()])


def test_a_janitor_that_never_came_round_is_late(tmp_path: Path) -> None:
    (late,) = [rule for rule in rules() if rule["alert"] == "KVShareJanitorLate"]
    expected = {
        "exp_labels": {"instance": "i", **late["labels"]},
        "exp_annotations": {"summary": "No upkeep on i for ten minutes"},
    }
    check_rules(tmp_path, [after_twenty_minutes(NEVER_ROUND, {late["alert"]: [expected]})])


@pytest.mark.parametrize("series", QUIET.values(), ids=QUIET)
def test_no_alarm_fires_where_all_is_well(tmp_path: Path, series: dict[str, str]) -> None:
    check_rules(tmp_path, [after_twenty_minutes(series, {rule["alert"]: [] for rule in rules()})])


def test_healthy_is_said_of_every_alarm() -> None:
    """A series that is not there keeps an alarm silent as well."""
    there = {re.split("{", series)[0] for series in HEALTHY}
    for rule in rules():
        wanted = re.findall(r"\b(?:vllm:)?kvshare_\w+|\bup\b", rule["expr"])
        assert wanted
        assert set(wanted) <= there, rule["alert"]


def check_rules(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    """Prometheus' own tool evaluates the rules over made-up series."""
    need(shutil.which("promtool") is not None, "promtool (package prometheus)")
    said = {"rule_files": [str(RULES)], "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(said))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
