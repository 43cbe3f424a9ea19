"""Linux namespaces as containers use them: clients whose pid means nothing to the daemon, and two
daemons with different homes at the same path that share everything else."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_PR_SET_PDEATHSIG = 1


@cache
def possible() -> bool:
    """Whether this process may make PID and mount namespaces."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--mount", "--pid", "--fork", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def with_foreign_pid(target: Callable[..., None], *arguments: Any) -> None:
    """Run `target` as process 1 of a new PID namespace; ends with its exit code. If this process is
    killed, that one is killed too."""
    _call("unshare", _CLONE_NEWPID)
    child = os.fork()
    if not child:
        code = 1
        try:
            _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL))
            target(*arguments)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def see_instead(home: Path, other: Path) -> None:
    """From now on this process sees the folder `other` at the path `home`. `/dev/shm` and
    everything else stay shared."""
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", os.fsencode(other), os.fsencode(home), None, _MS_BIND, None)


def _call(name: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
