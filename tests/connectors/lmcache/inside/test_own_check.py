"""LMCache's own check of an L2 adapter, which its wheel ships, run on ours as an operator would.

It looks up keys that nobody stored, stores a batch, looks it up, loads it and compares each value.
Its process ends well whatever it found, so its table says what passed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from kvshare_store.daemon.client import Client
from tests.connectors.lmcache.inside.lmcache_support import PATIENCE_S, spec

PHASES = ("LOOKUP (absent)", "STORE", "LOOKUP (exist)", "LOAD")


def checked(home: Path, *options: str) -> str:
    """What `lmcache.v1.basic_check` prints of an adapter on `home`."""
    command = [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter"]
    command += ["--l2-adapter", json.dumps(spec(home)), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(printed: str) -> dict[str, str]:
    """For each phase, the objects that passed of all, as `5/5`."""
    rows = re.findall(r"^\| ([A-Z]+(?: \([a-z]+\))?) +\|.*?\| +(\d+/\d+) \|", printed, re.MULTILINE)
    return dict(rows)


def test_every_phase_passes(tmp_path: Path) -> None:
    """With more than the arena of 4 MiB holds, in objects of an odd size."""
    printed = checked(tmp_path, "--num-keys", "40", "--obj-size", "98301")
    try:
        assert "=== Testing L2 adapter #0 (KVShareL2Adapter) ===" in printed
        assert passed(printed) == dict.fromkeys(PHASES, "40/40"), printed
    finally:
        with Client(tmp_path) as client:
            client.stop()
