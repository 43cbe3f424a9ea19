"""How far a command is, where there is no terminal."""

import pytest

from kvshare_store.cli import progress as module
from kvshare_store.cli.progress import progress, track


@pytest.fixture
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at each step, not only every ten seconds."""
    monkeypatch.setattr(module, "_EVERY_S", 0.0)


@pytest.mark.usefixtures("every_time")
def test_lines_say_what_is_done_of_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "Reading")) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "Reading: 1 of 3" in err
    assert "Reading: 2 of 3" in err
    assert "\x1b" not in err


@pytest.mark.usefixtures("every_time")
def test_lines_of_what_has_no_known_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track((letter for letter in "ab"), "Reading")) == ["a", "b"]
    assert "Reading: 1\n" in capsys.readouterr().err


@pytest.mark.usefixtures("every_time")
def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as shown:
        shown.advance(shown.add_task("reading", total=2))
    assert capsys.readouterr() == ("", "")


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("abc", "Reading")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
