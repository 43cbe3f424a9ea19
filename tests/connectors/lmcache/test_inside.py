"""Runs the tests in `inside` with a Python that has LMCache.

LMCache has an environment of its own (`make lmcache-setup`): an installed LMCache changes what vLLM
does, so the engine tests must run without it.
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
    # LMCache itself warns; in our other tests warnings are errors
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'inside'}", str(INSIDE)],
        cwd=ROOT,
        env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
