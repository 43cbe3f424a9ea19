"""vLLM's own scheduler and connector tests, with KVShare's schedulers in place of vLLM's.

    python -m tests.upstream [schedulers] [beside]

Runs each pair of arms that is asked for (by default `schedulers`), compares test by test, and
fails if a test differs or if fewer pass than `suite.txt` says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

from tests.upstream.gate import Result, differences, missing, not_called
from tests.upstream.prepare import FOLDER, HERE, SITE


@dataclass(frozen=True)
class Pair:
    """A comparison: the same tests with vLLM's schedulers and with ours."""

    connector: str
    """Where KVShareConnector is configured, in both arms: see `plugin/kvshare_upstream.py`."""
    control_passes: bool
    """Whether every test passes with vLLM's schedulers, also with the connector there."""
    refused: frozenset[str] = frozenset()
    """Tests that ask for what KVShare refuses."""


FAIL_POLICY = frozenset(
    f"tests/v1/kv_connector/unit/{test}"
    for test in (
        "test_cache_pollution_prevention.py::test_invalid_blocks_evicted_prevents_cache_pollution",
        "test_error_propagation.py::test_error_propagation_async_load",
        "test_error_propagation.py::test_error_propagation_sync_load",
        "test_invalid_blocks_correctness.py::test_sync_fail_invalid_blocks_evicted",
    )
)
"""They set the failure policy "fail", with which a failed load would fail its request."""


PAIRS = {
    "schedulers": Pair("none", control_passes=True),
    # Tests that assert on the class of the connector they configured fail here with any scheduler.
    "beside": Pair("beside", control_passes=False, refused=FAIL_POLICY),
}


DEFAULT = ["schedulers"]
"""The other pair has a daemon, which on a busy machine may answer a step later in one arm only."""


def main(names: list[str]) -> int:
    """Run the pairs; the exit status."""
    found = [fault for name in names or DEFAULT for fault in compare(name, PAIRS[name])]
    for fault in found:
        print(fault)
    print("upstream: FAILED" if found else "upstream: no test differs")
    return bool(found)


def compare(name: str, pair: Pair) -> list[str]:
    """The errors in a pair's arms, one line each."""
    known = suite()
    control, ours = (run(name, who, pair, list(known)) for who in ("vllm", "kvshare"))
    called = ["VirtualRows.schedule"]
    if pair.connector == "beside":
        called.append("KVShareConnector.build_connector_meta")
    found = [*differences(control, ours, pair.refused), *not_called(ours, called)]
    found += missing(control, known, ["passed"] if pair.control_passes else ["passed", "failed"])
    return [f"{name}: {fault}" for fault in found]


def suite() -> dict[str, int]:
    """Test file → how many of its tests pass with vLLM's schedulers."""
    lines = (HERE / "suite.txt").read_text().splitlines()
    return {file: int(count) for file, count in (line.split() for line in lines)}


def run(name: str, schedulers: str, pair: Pair, files: list[str]) -> Result:
    """One arm, in a process of its own."""
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    result = results / f"{name}-{schedulers}.json"
    result.unlink(missing_ok=True)
    settings = {
        "KVSHARE_UPSTREAM_SCHEDULERS": schedulers,
        "KVSHARE_UPSTREAM_CONNECTOR": pair.connector,
        "KVSHARE_UPSTREAM_RESULT": str(result),
    }
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini")]
    began = time.monotonic()
    with result.with_suffix(".log").open("w") as log:
        subprocess.run(
            [*command, "--rootdir", str(FOLDER), *files],
            cwd=FOLDER, env=environment() | settings, stdout=log, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
    arm = Result.read(result)
    counted = Counter(arm.outcomes.values())
    print(f"{name}, {schedulers}: {dict(counted)} in {time.monotonic() - began:.0f} s", flush=True)
    return arm


def environment() -> dict[str, str]:
    """Of a process that runs vLLM's tests: its `tests` is the folder in `.upstream/`."""
    paths = [FOLDER, HERE / "plugin", SITE, HERE.parents[1]]
    return os.environ | {
        "HF_HOME": str(FOLDER / "models"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
