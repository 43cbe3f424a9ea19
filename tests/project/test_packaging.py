"""What pip installs works where the source tree is not."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from deploy import release
from kvshare_store.observability.version import version
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


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    python = installed(built, kind, tmp_path / "env")
    now = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(tmp_path, python.with_name("kvshare"), "--version") == f"kvshare {now}\n"
    assert run(tmp_path, python, "-c", _SAVE_AND_PLAN) == "exact: 599 \n"


@pytest.mark.parametrize(
    ("extras", "without"),
    [
        ((), ("http", "blocks.remotes", "observability.exposition", "testing")),
        (("http", "s3", "redis", "encryption"), ("testing",)),
    ],
    ids=["no extra", "extras"],
)
def test_its_modules_need_nothing_that_it_does_not_ask_for(
    extras: tuple[str, ...], without: tuple[str, ...], built: dict[str, Path], tmp_path: Path
) -> None:
    python = installed(built, "wheel", tmp_path / "env", *extras)
    run(tmp_path, python, "-c", _LOAD_ALL, *without)


def test_nothing_is_missing(built: dict[str, Path], files: list[str]) -> None:
    """Every file of the packages, and all that an index shows of them."""
    assert list(release.faults(built["sdist"], built["wheel"], files)) == []


def test_what_is_missing_is_named(built: dict[str, Path], files: list[str]) -> None:
    new = ["kvshare_store/page/style.css", "connectors/new/__init__.py"]
    named = "\n".join(release.faults(built["sdist"], built["wheel"], [*files, *new]))
    assert named.count("lacks") == 4
    assert "kvshare_store/page/style.css" in named


def test_what_is_no_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "ROOT", tmp_path)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0\n")
    run(tmp_path, *git, "init", "-q")
    assert [why.splitlines()[0] for why in release.obstacles("1.2.0")] == ["not committed:"]
    run(tmp_path, *git, "add", ".")
    run(tmp_path, *git, "commit", "-qm", "all")
    assert list(release.obstacles("1.2.0")) == []
    assert ["no heading" in why for why in release.obstacles("1.2")] == [True]
    run(tmp_path, *git, "tag", "v1.2.0")
    assert ["tag v1.2.0 exists" in why for why in release.obstacles("1.2.0")] == [True]


def test_a_release_is_tagged_and_what_it_says_is_recorded(
    built: dict[str, Path], files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make release` in a small copy of the project, with files that were built already."""
    for name in files:
        if name.startswith("tests/") and name.endswith((".py", release.RECORDING)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {version()}\n")
    recording = tmp_path / release.RECORDING
    recording.write_text("{}")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@localhost")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    for git in (("init", "-q"), ("add", "."), ("commit", "-qm", "all")):
        run(tmp_path, "git", *git)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "build", lambda *_: (built["sdist"], built["wheel"]))
    assert release.main() == 0
    assert run(tmp_path, "git", "tag", "--points-at", "HEAD") == f"v{version()}\n"
    assert run(tmp_path, "git", "status", "--porcelain") == f" M {release.RECORDING}\n"
    assert json.loads(recording.read_text()) == recorded()
    run(tmp_path, "git", "commit", "-qam", "recorded")
    assert release.main() == 1, "the tag is there"
