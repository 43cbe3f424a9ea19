"""The release before this one, built as it was."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.environments import empty_environment, install, required, run

ROOT = Path(__file__).parents[2]
STAND_IN = "65a2beed0c28691dee6ec11bd626d67b73666f70"
"""In place of a release while there is none: a commit that speaks the oldest version of the
protocol, before pools, sources of requests, second looks and scores."""


class Release(NamedTuple):
    """A release that can be run."""

    name: str
    """Its tag, or the beginning of a commit."""
    python: Path
    """Of an environment where its wheel is installed."""
    files: Path
    """A folder with its `tests`."""


def before() -> str | None:
    """The tag of the last release that this commit builds on and is not, or `STAND_IN`. None if the
    clone has neither: it is shallow, or no clone."""
    return next(filter(_is_here, (*_tags(), STAND_IN)), None)


def _tags() -> Iterator[str]:
    own = set(_git("tag", "--points-at", "HEAD").decode().split())
    merged = _git("tag", "--merged", "HEAD", "--list", "v[0-9]*", "--sort=-version:refname")
    yield from (tag for tag in merged.decode().split() if tag not in own)


def _is_here(name: str) -> bool:
    return bool(_git("rev-parse", "--verify", "--quiet", f"{name}^{{tree}}"))


def _git(*arguments: str) -> bytes:
    """What git prints; nothing if it fails."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, check=False
    ).stdout


def built(name: str, folder: Path) -> Release:
    """Build the wheel of a release from its files, and install it."""
    source, files = folder / "source", folder / "files"
    with tarfile.open(fileobj=io.BytesIO(_git("archive", name))) as archive:
        archive.extractall(source, filter="data")
    files.mkdir()
    (source / "tests").rename(files / "tests")
    wheel_of = ("pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation")
    run(folder, sys.executable, "-m", *wheel_of, "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    python = empty_environment(folder / "environment", required(wheel))
    install(python, wheel)
    return Release(name[:12], python, files)
