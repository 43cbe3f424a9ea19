"""What only a GPU can show of the connector's worker side. Needs torch, not vLLM.

    python tests/gpu/check.py RESULT.json

Packages that the GPU's machine lacks may lie in `.gpu-site/`: see CONTRIBUTING.md.
Each check runs in a process of its own, so that one that fails or hangs leaves the others alone.
The result is printed and written after each. Exit status: how many checks are not ok.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 40.0
"""Seconds that one check may take before it is killed."""

CHECKS = {
    "device": "tests.gpu.device:describe",
    "layouts": "tests.gpu.layouts:round_trips",
    "editor": "tests.gpu.layouts:rotation",
    "snapshot_race": "tests.gpu.streams:race",
    "snapshot_memory": "tests.gpu.streams:memory",
    "prefill_time": "tests.gpu.streams:prefill_time",
    "host_register": "tests.gpu.host_memory:registration",
}
Found = dict[str, Any]


def main(out: Path) -> int:
    """Run every check; returns how many failed."""
    import torch  # noqa: F401 - once, before the processes part; CUDA itself starts in each

    found: dict[str, Found] = {}
    for name, place in CHECKS.items():
        began = time.monotonic()
        found[name] = apart(place)
        found[name]["wall_s"] = round(time.monotonic() - began, 2)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        out.write_text(json.dumps(found, indent=1))
    bad = [name for name, result in found.items() if not result.get("ok")]
    print("not ok:", ", ".join(bad) or "none")
    return len(bad)


def apart(place: str) -> Found:
    """What a check finds, in a process forked for it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=answer, args=(place, theirs))
    process.start()
    theirs.close()  # so that the death of a process is noticed at once
    found: Found = {"ok": False, "error": f"no answer in {SECONDS:.0f} s"}
    if ours.poll(SECONDS):
        try:
            found = ours.recv()
        except EOFError:
            process.join()
            found["error"] = f"the process ended with exit code {process.exitcode}"
    process.kill()
    process.join()
    return found


def answer(place: str, theirs: Any) -> None:
    """Run one check. Whatever it raises becomes its result."""
    module, name = place.split(":")
    try:
        check: Callable[[], Found] = getattr(importlib.import_module(module), name)
        theirs.send(check())
    except BaseException:  # noqa: BLE001 - reported to who asked
        theirs.send({"ok": False, "error": traceback.format_exc()})


def find_packages() -> None:
    """Make this checkout importable where it is not installed."""
    names = Path(tempfile.mkdtemp(prefix="kvshare-gpu-"))
    (names / "kvshare_connectors").symlink_to(ROOT / "connectors")
    sys.path[:0] = [str(ROOT), str(names), str(ROOT / ".gpu-site")]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "4"
    find_packages()
    sys.exit(main(Path(sys.argv[1])))
