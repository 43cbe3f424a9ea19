"""The packages that KVShare is compared with, in an environment of their own."""

from __future__ import annotations

import importlib.util
import site
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-bench"


class PeerMissingError(RuntimeError):
    """A package to compare with is not installed; the message says how to install it."""


def python_with(package: str) -> str:
    """A Python that can import `package`: this one, or the one of `ENVIRONMENT`."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise PeerMissingError(f"{package} is not installed; run `make bench-setup`")
    return str(python)


def make_importable(package: str) -> None:
    """Let this process import `package`, from `ENVIRONMENT` if it must.

    Packages of the process's own environment come first, so nothing that works here changes.
    """
    python = python_with(package)
    if python == sys.executable:
        return
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    folder = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    site.addsitedir(folder)
    if importlib.util.find_spec(package) is None:
        raise PeerMissingError(f"{package} is not in {ENVIRONMENT.name}; run `make bench-setup`")
