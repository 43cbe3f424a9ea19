"""What every test may rely on: Hypothesis profiles, small stores, skips that can be forbidden."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")

from tests.support.in_memory import keep_in_memory  # noqa: E402 - asserts are rewritten as well
from tests.support.needs import need  # noqa: E402

pytest_plugins = ["tests.support.stores"]

keep_in_memory()

_UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large]

# The default run is the same for everybody; chance is for those who look for new cases.
settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=200, deadline=None, print_blob=True)
settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=_UNHURRIED
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_LONGEST = ["project/test_lint.py", "fault/", "engine/", "transformers/"]
"""Where the long files are. Each process takes the next file when it has done one, so what is long
begins first, or one process works on it alone at the end."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let files that share an engine be worked on by one process."""
    from tests.support.spread import Spread

    return Spread(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage once, when all is imported: libraries are none, and there are a million
    objects in them. It need not be looked for there again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; a file's tests keep their order."""
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(here).as_posix()
        found = (n for n, start in enumerate(_LONGEST) if path.startswith(start))
        return next(found, len(_LONGEST))

    items.sort(key=rank)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how long the tests of each folder took, set-ups included."""
    spent: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                _, *folders, _ = report.nodeid.partition("::")[0].split("/")
                spent[folders[0] if folders else "tests"] += report.duration
    terminalreporter.section("seconds by folder")
    for folder, seconds in spent.most_common():
        terminalreporter.line(f"{seconds:7.1f} {folder}")


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """`require(present, what)`: skip without `what`; with REQUIRE_ALL_TESTS=1 fail instead."""
    return need


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home for one store."""
    return tmp_path / "home"


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting and no colour from whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("KVSHARE_")]:
        monkeypatch.delenv(name)
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
