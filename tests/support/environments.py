"""Python environments that have this project only as pip installs it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def empty_environment(folder: Path, requirements: Iterable[str]) -> Path:
    """The Python of an environment that has these requirements and theirs, and nothing else."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for found in _closure(requirements):
        for name in {file.parts[0] for file in found.files or ()} - {".."}:
            there = Path(str(found.locate_file(name)))
            if not (packages / name).exists() and there.exists():
                (packages / name).symlink_to(there)
    return python


def required(wheel: Path, *extras: str) -> list[str]:
    """What pip would install beside a wheel with these extras, as its metadata says."""
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(about).decode())
    return _that_count(metadata.get_all("Requires-Dist", []), extras)


def _that_count(requirements: Iterable[str], extras: Iterable[str]) -> list[str]:
    """Those whose markers hold here."""
    named = ["", *extras]
    lines = ((line, Requirement(line).marker) for line in requirements)
    return [
        line
        for line, marker in lines
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in named)
    ]


def _closure(requirements: Iterable[str]) -> Iterator[Distribution]:
    """Each distribution of this environment that is asked for, directly or by another."""
    waiting, seen = list(requirements), set[tuple[str, frozenset[str]]]()
    while waiting:
        asked = Requirement(waiting.pop())
        key = (asked.name, frozenset(asked.extras))
        if key not in seen:
            seen.add(key)
            found = distribution(asked.name)
            waiting += _that_count(found.requires or (), asked.extras)
            yield found


def install(python: Path, package: Path) -> None:
    """Install a wheel or a source distribution there, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    pip += ["--no-index", "--no-build-isolation", "--no-compile", "--ignore-installed"]
    pip += ["--disable-pip-version-check", "--root-user-action=ignore"]
    run(python.parent, *pip, package)


def run(folder: Path, *command: str | Path) -> str:
    """What a command prints that is run in a folder. No variable leads it to this tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
