"""Build what a release consists of, check it, tag it, say what to push. No network, no upload.

    make release

The source distribution is built from the files of the commit, the wheel from the source
distribution: so what is tested and uploaded needs nothing that only this folder has. What the
release says on the wire is recorded for the tests of the next one, which also build this one from
its tag (`tests/daemon/test_release_before.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kvshare_store": "kvshare_store", "connectors": "kvshare_connectors"}
"""Folders whose every file is in the wheel, and what they are called there."""
RECORDING = "tests/data/protocol_before.json"
_FIELDS = {"Name", "Version", "Summary", "Keywords", "Requires-Python", "License-Expression"}
_FIELDS |= {"License-File", "Classifier", "Project-URL", "Description-Content-Type"}
_FIELDS |= {"Provides-Extra", "Requires-Dist"}
_BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def build(files: Iterable[str], out: Path) -> tuple[Path, Path]:
    """Build the source distribution of these files of the project, and its wheel, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        for name in files:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
        _python("-c", _BUILD_SDIST, str(out), cwd=source)
        sdist = max(out.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
        wheel_of = ["pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
        _python("-m", *wheel_of, "--wheel-dir", str(out), str(sdist), cwd=out)
    return sdist, max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def faults(sdist: Path, wheel: Path, files: Iterable[str]) -> Iterator[str]:
    """What is missing from a source distribution and a wheel of these files."""
    with tarfile.open(sdist) as archive:
        sent = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(about).decode())
    for name in files:
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and f"{FOLDERS[folder]}/{rest}" not in names:
            yield f"{wheel.name} lacks {name}"
        if folder in {*FOLDERS, "LICENSE", "README.md", "pyproject.toml"} and name not in sent:
            yield f"{sdist.name} lacks {name}"
    folders = {name.partition("/")[0] for name in names}
    if extra := folders - {*FOLDERS.values(), about.partition("/")[0]}:
        yield f"{wheel.name} has {', '.join(sorted(extra))} as well"
    for field in sorted(_FIELDS - set(metadata)):
        yield f"{wheel.name}: no {field} in the metadata"
    if not str(metadata.get_payload()).startswith("# "):
        yield f"{wheel.name}: the README is not its description"


def committed() -> list[str]:
    """Names of the files of the commit."""
    return _git("ls-files").splitlines()


def obstacles(version: str) -> Iterator[str]:
    """Why this folder is not a release."""
    if changed := _git("status", "--porcelain"):
        yield f"not committed:\n{changed}"
    if not re.search(rf"^## {re.escape(version)}(?!\S)", (ROOT / "CHANGELOG.md").read_text(), re.M):
        yield f"CHANGELOG.md has no heading `## {version}`"
    if _git("tag", "--list", f"v{version}"):
        yield f"the tag v{version} exists: change `version` in pyproject.toml"


def make(version: str) -> None:
    """Set the tag, and record the messages. The recording is for the commits that follow."""
    _git("tag", "-a", f"v{version}", "-m", f"KVShare {version}")
    _python("-m", "tests.support.protocol_recording", cwd=ROOT)


def main() -> int:
    """Build, check, tag, record and print what is left to do; 1 if something is wrong."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    os.environ["SOURCE_DATE_EPOCH"] = _git("log", "-1", "--format=%ct").strip()
    files, out = committed(), ROOT / "dist"
    for old in out.glob("kvshare_store-*"):
        old.unlink()
    wrong = list(obstacles(version))
    if not wrong:
        sdist, wheel = build(files, out)
        wrong = list(faults(sdist, wheel, files))
    if wrong:
        print("\n".join(["This is no release:", *wrong]), file=sys.stderr)
        return 1
    make(version)
    print(f"dist/{sdist.name}\ndist/{wheel.name}\ntag v{version}\n\nIf `make test` has passed:\n")
    print(f"    git push origin v{version}")
    print(f"    twine upload dist/{sdist.name} dist/{wheel.name}")
    print(f"    git commit -m 'Messages of {version}, for the next release' {RECORDING}")
    return 0


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _python(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nbuilding failed")


if __name__ == "__main__":
    sys.exit(main())
