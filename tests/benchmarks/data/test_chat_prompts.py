"""Prompts and their near-duplicate donors."""

from __future__ import annotations

import pytest

from benchmarks.data.chat_prompts import EDITS, Item, Task, near_duplicate, sampled

GERMAN = "Die Sitzung beginnt am Montag um 9 Uhr im Rathaus."
OTHER = "Ein anderer Satz steht hier.\nUnd noch einer."
CHINESE = "广东省十三届人大常委会第五次会议在广州举行第二次全体会议。"
APPLY = {edit.name: edit.apply for edit in EDITS}


@pytest.mark.parametrize("name", sorted(APPLY))
@pytest.mark.parametrize("text", [GERMAN, CHINESE, "Ja!", "2018"])
def test_every_edit_changes_the_text_and_is_deterministic(name, text):
    edited = APPLY[name](text, OTHER)
    assert edited != text
    assert edited == APPLY[name](text, OTHER)


def test_one_word_changes_and_it_is_the_middle_one():
    assert APPLY["word"](GERMAN, OTHER) == GERMAN.replace("Montag", "steht")


def test_a_chinese_unit_is_two_letters():
    edited = APPLY["word"](CHINESE, CHINESE[::-1])
    assert len(edited) == len(CHINESE)
    assert sum(a != b for a, b in zip(edited, CHINESE, strict=True)) <= 2


def test_digits_go_up_by_one_and_a_text_without_gets_a_number():
    assert APPLY["number"]("9 of 10", OTHER) == "0 of 21"
    assert APPLY["number"]("one two three", OTHER) == "one two (17) three"


def test_an_added_sentence_is_one_line_in_front():
    assert APPLY["sentence"](GERMAN, OTHER) == f"Ein anderer Satz steht hier. {GERMAN}"


def test_kinds_take_turns_and_material_is_the_next_text():
    texts = ["one two three"] * 3 + ["first", "last"]
    assert near_duplicate(texts, 3) == "last first"
    assert near_duplicate(texts, 0) == "one two three"  # the next text is the same one


def test_braces_in_a_text_are_text():
    task = Task("t", "Say: {}", (Item("{x}", ("y",)),))
    assert task.ask(task.items[0].text) == "Say: {x}"


def test_a_sample_is_the_same_for_the_same_seed_and_never_too_large():
    rows = list(range(50))
    assert sampled(rows, 10, 1) == sampled(rows, 10, 1) != sampled(rows, 10, 2)
    assert sorted(sampled(rows, 99, 1)) == rows
