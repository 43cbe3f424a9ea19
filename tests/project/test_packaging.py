"""What pip installs works where the source tree is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy import release
from deploy.requirements import requirements
from tests.support.environments import empty_environment, install, required, run
from tests.support.protocol_recording import recorded

ROOT = Path(__file__).parents[2]

_SAVE_AND_PLAN = """
import sys
from pathlib import Path
import numpy as np
import kvshare_connectors, kvshare_store
from kvshare_store import KVLayout, Namespace, Store, StoreConfig

for package in (kvshare_connectors, kvshare_store):
    assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
    assert (Path(package.__file__).parent / "py.typed").exists()
layout = KVLayout(2, 1, 4, "float32")
space = Namespace(model="m", layout=layout)
tokens = list(range(600))
with Store(StoreConfig(home="home", host_bytes=1 << 22)) as store:
    store.save(tokens, space, np.ones(layout.shape(600), np.uint32))
    plan = store.plan(tokens, space)
print("exact:", plan.exact, plan.declined)
"""

_LOAD_ALL = """
import pkgutil, sys
from importlib import import_module
import kvshare_store

without = tuple(f"kvshare_store.{name}" for name in sys.argv[1:])
for module in pkgutil.walk_packages(kvshare_store.__path__, "kvshare_store."):
    if not module.name.startswith(without):
        import_module(module.name)
"""


@pytest.fixture(scope="module")
def files() -> list[str]:
    """The project's files as they are now, whether committed or not."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


@pytest.fixture(scope="module")
def built(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sdist, wheel = release.build(files, tmp_path_factory.mktemp("dist"))
    return {"sdist": sdist, "wheel": wheel}


def installed(built: dict[str, Path], kind: str, folder: Path, *extras: str) -> Path:
    """The Python of an environment with one of the files, and what its metadata asks for."""
    to_build = ["setuptools"] if kind == "sdist" else []
    python = empty_environment(folder, [*required(built["wheel"], *extras), *to_build])
    install(python, built[kind])
    return python


@pytest.fixture(scope="module")
def plain(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and no extra."""
    return installed(built, "wheel", tmp_path_factory.mktemp("plain") / "env")


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works(
    kind: str, built: dict[str, Path], plain: Path, tmp_path: Path
) -> None:
    python = plain if kind == "wheel" else installed(built, kind, tmp_path / "env")
    now = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(tmp_path, python.with_name("kvshare"), "--version") == f"kvshare {now}\n"
    assert run(tmp_path, python, "-c", _SAVE_AND_PLAN) == "exact: 599 \n"


def test_a_daemon_needs_only_what_its_recipe_installs(
    built: dict[str, Path], tmp_path: Path
) -> None:
    """docs/deploying.md, for a host without engines: no torch."""
    python = empty_environment(tmp_path / "env", requirements(["http"]))
    install(python, built["wheel"])
    assert run(tmp_path, python, "-c", _SAVE_AND_PLAN) == "exact: 599 \n"
    run(tmp_path, python, "-c", "import kvshare_store.daemon.server, kvshare_store.http.serving")
    said = run(tmp_path, python.with_name("kvshare"), "stats", "--home", "home")
    assert "1 node" in said


@pytest.mark.parametrize(
    ("extras", "without"),
    [
        ((), ("http", "blocks.remotes", "observability.exposition", "testing")),
        (("http", "s3", "redis", "encryption"), ("testing",)),
    ],
    ids=["no extra", "extras"],
)
def test_its_modules_need_nothing_that_it_does_not_ask_for(
    extras: tuple[str, ...],
    without: tuple[str, ...],
    built: dict[str, Path],
    plain: Path,
    tmp_path: Path,
) -> None:
    python = installed(built, "wheel", tmp_path / "env", *extras) if extras else plain
    run(tmp_path, python, "-c", _LOAD_ALL, *without)


def test_nothing_is_missing(built: dict[str, Path], files: list[str]) -> None:
    """Every file of the packages, and all that an index shows of them."""
    assert list(release.faults(built["sdist"], built["wheel"], files)) == []


def test_what_is_missing_is_named(built: dict[str, Path], files: list[str]) -> None:
    new = ["kvshare_store/page/style.css", "connectors/new/__init__.py"]
    named = "\n".join(release.faults(built["sdist"], built["wheel"], [*files, *new]))
    assert named.count("lacks") == 4
    assert "kvshare_store/page/style.css" in named


# --- `make release` -------------------------------------------------------------------------------

NEXT = "9.8.7"


@pytest.fixture
def clone(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's files, committed, in a folder of their own."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@localhost")
    for variable in ("SOURCE_DATE_EPOCH", "GIT_COMMITTER_DATE"):
        monkeypatch.setenv(variable, "1700000000 +0000")  # a release sets them
    folder = tmp_path / "clone"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "init", "-q")
    git(folder, "add", "--force", ".")
    git(folder, "commit", "-qm", "all")
    return folder


@pytest.fixture
def quick(clone: Path, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose releases consist of files that were built already."""

    def build(names: list[str], out: Path, edited: object) -> list[Path]:
        return [Path(shutil.copy(path, out)) for path in built.values()]

    monkeypatch.setattr(release, "ROOT", clone)
    monkeypatch.setattr(release, "build", build)
    return clone


def git(folder: Path, *command: str) -> str:
    return run(folder, "git", *command)


def state(folder: Path) -> str:
    """What is committed, tagged and changed."""
    return "".join(git(folder, *it) for it in (("show-ref",), ("status", "--porcelain")))


def test_a_release_is_one_command(clone: Path) -> None:
    with (clone / "CHANGELOG.md").open("a") as changes:
        changes.write("- ## Unreleased is no heading here.\n")
    git(clone, "commit", "-qam", "more")
    said = run(clone, sys.executable, "deploy/release.py", NEXT)
    names = [f"dist/kvshare_store-{NEXT}{end}" for end in (".tar.gz", "-py3-none-any.whl")]
    assert f"git push origin HEAD v{NEXT}\n    twine upload {' '.join(names)}\n" in said
    assert all((clone / name).is_file() for name in names)
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "log", "-3", "--format=%s").splitlines() == [
        f"Messages of {NEXT}, for the next release", f"Release {NEXT}", "more"
    ]  # fmt: skip
    assert git(clone, "tag", "--points-at", "HEAD~") == f"v{NEXT}\n"
    changed = git(clone, "diff", "--name-only", "HEAD~2", "HEAD~").splitlines()
    assert sorted(changed) == sorted(release.PLACES)
    assert f"\n## {NEXT}\n" in (clone / "CHANGELOG.md").read_text()
    assert json.loads((clone / release.RECORDING).read_text()) == recorded(NEXT)


def test_a_release_that_was_made_is_only_built_again(quick: Path) -> None:
    assert release.main(NEXT) == 0
    made = state(quick)
    assert release.main(NEXT) == 0
    assert state(quick) == made
    git(quick, "tag", "-d", f"v{NEXT}")  # as if it had ended before
    git(quick, "reset", "-q", "--hard", "HEAD~")
    assert release.main(NEXT) == 0
    assert git(quick, "tag", "--points-at", "HEAD~") == f"v{NEXT}\n"


def test_what_fails_changes_nothing(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (quick / "dist").mkdir()
    (quick / "dist" / "kvshare_store-9.8.6.tar.gz").touch()
    (quick / "kvshare_store" / "new.py").touch()
    git(quick, "add", ".")
    git(quick, "commit", "-qm", "a file that was not built")
    before = state(quick)
    assert release.main(NEXT) == 1
    assert "lacks kvshare_store/new.py" in capsys.readouterr().err
    monkeypatch.setattr(release, "faults", lambda *_: ())
    hook = quick / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o700)
    assert (quick / "dist" / "kvshare_store-9.8.6.tar.gz").exists()
    with pytest.raises(SystemExit, match="not committed"):
        release.main(NEXT)
    assert state(quick) == before
    hook.unlink()
    assert release.main(NEXT) == 0


def test_what_is_no_release_is_refused(quick: Path) -> None:
    def why(version: str = NEXT) -> list[str]:
        return [one.splitlines()[0] for one in release.obstacles(version)]

    assert why() == []
    assert ["is no version" in one for one in (*why(""), *why("1.2"))] == [True, True]
    (quick / "new").touch()
    assert why() == ["not committed:"]
    assert release.main(NEXT) == 1
    git(quick, "add", ".")
    git(quick, "commit", "-qm", "new")
    assert why() == []
    git(quick, "tag", f"v{NEXT}", "HEAD~")
    assert why() == [f"the tag v{NEXT} exists, and there are commits since"]
    (quick / "CHANGELOG.md").write_text("# Changelog\n")
    git(quick, "commit", "-qam", "no heading")
    assert ["must have one heading" in one for one in why("9.8.8")] == [True]
