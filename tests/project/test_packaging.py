"""What pip installs works where the source tree is not."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from deploy import release

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


def empty_environment(folder: Path) -> Path:
    """The Python of an environment that sees the packages of this one, but not this project."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # a path alone: the .pth files there, which lead to this tree, are not read
    (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_works(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "env")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    pip += ["--no-index", "--no-build-isolation", "--no-compile", "--ignore-installed"]
    run(tmp_path, *pip, "--disable-pip-version-check", "--root-user-action=ignore", built[kind])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(tmp_path, python.with_name("kvshare"), "--version") == f"kvshare {version}\n"
    assert run(tmp_path, python, "-c", _SAVE_AND_PLAN) == "exact: 599 \n"


def run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
