"""pytest plugin for vLLM's own tests: puts KVShare in its place before a test imports anything.

KVSHARE_UPSTREAM_SCHEDULERS   vllm | kvshare: whose schedulers the tests get
KVSHARE_UPSTREAM_CONNECTOR    none | beside: whether KVShareConnector goes into every VllmConfig,
                              under MultiConnector after a connector that it names already
KVSHARE_UPSTREAM_RESULT       where to write the outcome of each test, as JSON
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_WORST_LAST = ("passed", "skipped", "failed")

outcomes: dict[str, str] = {}
calls: Counter[str] = Counter()
"""How often the tests called methods of ours: nothing is shown if they never did."""


def _count(cls: type, method: str) -> None:
    plain = getattr(cls, method)

    @functools.wraps(plain)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[f"{cls.__name__}.{method}"] += 1
        return plain(self, *args, **kwargs)

    setattr(cls, method, counted)


def _put_schedulers() -> None:
    import vllm.v1.core.sched.async_scheduler as theirs_async
    import vllm.v1.core.sched.scheduler as theirs
    from kvshare_connectors.vllm.scheduler import (
        KVShareAsyncScheduler,
        KVShareScheduler,
        VirtualRows,
    )

    _count(VirtualRows, "schedule")
    theirs.Scheduler = KVShareScheduler
    theirs_async.AsyncScheduler = KVShareAsyncScheduler


def _put_connector() -> None:
    from kvshare_connectors.vllm.connector import KVShareConnector
    from vllm.config import KVTransferConfig, VllmConfig

    _count(KVShareConnector, "build_connector_meta")
    ours = _our_connector()
    init = VllmConfig.__init__

    @functools.wraps(init)
    def with_kvshare(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs = kwargs.get("kv_transfer_config")
        if theirs is None and kwargs.get("model_config") is not None:
            kwargs["kv_transfer_config"] = KVTransferConfig(**ours)
        elif theirs is not None and theirs.kv_connector != "MultiConnector":
            kwargs["kv_transfer_config"] = KVTransferConfig(
                kv_connector="MultiConnector",
                kv_role=theirs.kv_role,
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"connectors": [_named_again(theirs), ours]},
            )
        init(self, *args, **kwargs)

    VllmConfig.__init__ = with_kvshare


def _our_connector() -> dict[str, Any]:
    home = tempfile.mkdtemp(prefix="kvshare-upstream-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": "kvshare_connectors.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "kvshare.home": home,
            "kvshare.semantic": "never",
            "kvshare.host_bytes": 1 << 28,
            "kvshare.idle_exit_s": 20.0,
        },
    }


def _named_again(theirs: Any) -> dict[str, Any]:
    """A connector's configuration as MultiConnector takes it."""
    fields = ("kv_connector", "kv_role", "kv_connector_extra_config", "kv_connector_module_path")
    found = {field: getattr(theirs, field) for field in fields}
    return {field: value for field, value in found.items() if value is not None}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    before = outcomes.get(report.nodeid, "passed")
    outcomes[report.nodeid] = max(before, report.outcome, key=_WORST_LAST.index)


def pytest_sessionfinish() -> None:
    result = {"outcomes": outcomes, "calls": calls}
    Path(os.environ["KVSHARE_UPSTREAM_RESULT"]).write_text(json.dumps(result, indent=1))


if os.environ["KVSHARE_UPSTREAM_SCHEDULERS"] == "kvshare":
    _put_schedulers()
if os.environ["KVSHARE_UPSTREAM_CONNECTOR"] == "beside":
    _put_connector()
