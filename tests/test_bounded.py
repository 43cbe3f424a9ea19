"""Dictionaries that forget."""

from __future__ import annotations

from kvshare_store.bounded import Latest, pieces


def filled(*keys: str, most: int = 3) -> Latest[str, str]:
    latest: Latest[str, str] = Latest(most)
    for key in keys:
        latest[key] = key.upper()
    return latest


def test_what_was_set_longest_ago_goes() -> None:
    assert filled("a", "b", "c", "d") == {"b": "B", "c": "C", "d": "D"}


def test_what_is_set_again_or_moved_is_new() -> None:
    latest = filled("a", "b", "c")
    latest["a"] = "again"
    latest.move_to_end("b")
    latest["d"] = "D"
    assert list(latest.items()) == [("a", "again"), ("b", "B"), ("d", "D")]


def test_reading_keeps_nothing() -> None:
    latest = filled("a", "b", "c")
    assert latest.get("a") == latest["a"] == "A"
    latest["d"] = "D"
    assert "a" not in latest


def test_every_way_to_fill_it_is_bounded() -> None:
    latest = filled("a", "b")
    latest.update({"c": "C", "d": "D"})
    latest |= {"e": "E"}
    assert latest.setdefault("f", "F") == "F"
    assert list(latest) == ["d", "e", "f"]


def test_one_that_may_keep_nothing_stays_empty() -> None:
    assert not filled("a", "b", most=0)


def test_pieces_of_a_list() -> None:
    assert list(pieces("abcde", 2)) == ["ab", "cd", "e"]
    assert list(pieces("abcd", 2)) == ["ab", "cd"]
    assert not list(pieces([], 2))
