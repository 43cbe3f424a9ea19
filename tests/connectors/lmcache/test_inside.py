"""Runs the tests in `inside` with a Python that has LMCache.

LMCache has an environment of its own (`make lmcache-setup`): vLLM takes an LMCache that it finds
for a part of itself, and the tests of engines must not meet it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-lmcache" / "bin" / "python"
INSIDE = Path(__file__).parent / "inside"


def test_inside_lmcache(require: Callable[[bool, str], None], tmp_path: Path) -> None:
    require(PYTHON.exists(), "LMCache (the extra `lmcache`; here: `make lmcache-setup`)")
    # LMCache warns of what it finds in its environment; our own warnings are errors elsewhere
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'inside'}", str(INSIDE)],
        cwd=ROOT,
        env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
