"""Make a release: name it, build and check what it consists of, commit, tag, say what to push. No
network, no upload.

    make release VERSION=1.2.3

The source distribution is built from the files of the commit, the wheel from the source
distribution: so what is tested and uploaded needs nothing that only this folder has. Nothing is
changed before both are built and checked. Whatever ends it, the same command goes on.

What the release says on the wire is recorded for the tests of the next one, which also build this
one from its tag (`tests/daemon/test_release_before.py`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kvshare_store": "kvshare_store", "connectors": "kvshare_connectors"}
"""Folders whose every file is in the wheel, and what they are called there."""
RECORDING = "tests/data/protocol_before.json"
PLACES = {
    "pyproject.toml": r'(?m)^(version = ")[^"]+',
    "CHANGELOG.md": r"(?m)^(## )Unreleased$",
    "deploy/kubernetes/kustomization.yaml": r"(newTag: )\S+",
    "docs/deploying.md": r"(-t kvshare(?:-vllm)?:)\S+",
}
"""Where the version stands, behind what the first group matches."""
_FIELDS = {"Name", "Version", "Summary", "Keywords", "Requires-Python", "License-Expression"}
_FIELDS |= {"License-File", "Classifier", "Project-URL", "Description-Content-Type"}
_FIELDS |= {"Provides-Extra", "Requires-Dist"}
_BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def build(
    files: Iterable[str], out: Path, edited: Mapping[str, str] | None = None
) -> tuple[Path, Path]:
    """Build the source distribution of these files of the project, and its wheel, into `out`.
    `edited`: what some of them shall say instead."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        for name in files:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
        for name, text in (edited or {}).items():
            (source / name).write_text(text)
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


def edits(version: str) -> dict[str, str]:
    """Files that do not name this version yet, and what they say once they do."""
    texts = {name: (ROOT / name).read_text() for name in PLACES}
    named = {name: re.sub(PLACES[name], rf"\g<1>{version}", texts[name]) for name in PLACES}
    return {name: text for name, text in named.items() if text != texts[name]}


def obstacles(version: str) -> Iterator[str]:
    """Why this folder is not a release."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        yield f"`{version}` is no version: make release VERSION=1.2.3"
        return
    if changed := _git("status", "--porcelain"):
        yield f"not committed:\n{changed}"
    changes = edits(version).get("CHANGELOG.md") or (ROOT / "CHANGELOG.md").read_text()
    if len(re.findall(rf"(?m)^## {re.escape(version)}$", changes)) != 1:
        yield f"CHANGELOG.md must have one heading, `## Unreleased` or `## {version}`"
    if _tagged(version) and _since(version) - {RECORDING}:
        yield f"the tag v{version} exists, and there are commits since"


def publish(version: str, edited: Mapping[str, str]) -> None:
    """Commit the edits, set the tag, and record the messages for the commits that follow. What was
    done before is not done again."""
    for name, text in edited.items():
        (ROOT / name).write_text(text)
    _commit(f"Release {version}", edited)
    if not _tagged(version):
        _git("tag", "-a", f"v{version}", "-m", f"KVShare {version}")
    _python("-m", "tests.support.protocol_recording", version, cwd=ROOT)
    _commit(f"Messages of {version}, for the next release", [RECORDING])


def main(version: str) -> int:
    """Make the release and print what is left to do; 1 if something is wrong."""
    wrong = list(obstacles(version))
    if not wrong:
        edited = edits(version)
        _date(edited)
        with tempfile.TemporaryDirectory() as folder:
            built = build(committed(), Path(folder), edited)
            wrong = list(faults(*built, committed()))
            names = [] if wrong else _kept(built)
    if wrong:
        print("\n".join(["This is no release:", *wrong]), file=sys.stderr)
        return 1
    publish(version, edited)
    print(f"Release {version}: {' '.join(names)}\n\nIf `make test` has passed:\n")
    print(f"    git push origin HEAD v{version}\n    twine upload {' '.join(names)}")
    return 0


def _date(edited: Mapping[str, str]) -> None:
    """The time in all files of the release is that of its commit: they are the same bytes whenever
    they are built."""
    at = _git("log", "-1", "--format=%ct", "--", *PLACES).strip()
    moment = str(int(time.time())) if edited else at
    os.environ |= {"SOURCE_DATE_EPOCH": moment, "GIT_COMMITTER_DATE": f"{moment} +0000"}


def _kept(built: Iterable[Path]) -> list[str]:
    """Move the files to `dist`, in place of those of an older release; returns their names."""
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    for old in out.glob("kvshare_store-*"):
        old.unlink()
    return [str(Path(shutil.move(path, out)).relative_to(ROOT)) for path in built]


def _tagged(version: str) -> bool:
    return bool(_git("tag", "--list", f"v{version}"))


def _since(version: str) -> set[str]:
    """Files that differ from the tag's."""
    return set(_git("diff", "--name-only", f"v{version}", "HEAD").splitlines())


def _commit(message: str, names: Iterable[str]) -> None:
    """Commit what has changed in these files. If that fails they are as before, so that the next
    try begins where this one did."""
    if not _git("status", "--porcelain", "--", *names):
        return
    try:
        _git("commit", "-qm", message, "--", *names)
    except subprocess.CalledProcessError:
        _git("checkout", "-q", "HEAD", "--", *names)
        raise SystemExit(
            f"not committed, git says why: `{message}`. Mend it and try again"
        ) from None


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
    sys.exit(main(*sys.argv[1:2] or [""]))
