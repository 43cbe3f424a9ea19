"""Python environments that have this project only as pip installs it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def empty_environment(folder: Path) -> Path:
    """The Python of an environment that sees the packages of this one, but not this project."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # a path alone: the .pth files there, which lead to this tree, are not read
    (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, package: Path) -> None:
    """Install a wheel or a source distribution there, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    pip += ["--no-index", "--no-build-isolation", "--no-compile", "--ignore-installed"]
    pip += ["--disable-pip-version-check", "--root-user-action=ignore"]
    run(python.parent, *pip, package)


def run(folder: Path, *command: str | Path) -> str:
    """What a command prints that is run in a folder."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
