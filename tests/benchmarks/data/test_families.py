"""Families of prompts: what their members share, and that halves share no text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.data.datasets import DataError
from benchmarks.data.families import ASKED, EARLIER, KINDS, Family, families

TEXTS = 300


class Letters:
    """A chat template that adds nothing, with one token per character."""

    def prompt(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))


def dialogue(number: int, turns: int) -> str:
    said = f"Person{number} does a thing of some kind"
    return "\n".join(f"{'Anna' if at % 2 else 'Boris'} : {said}" for at in range(turns))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [f"Quelle{at} {'wort ' * 15}\tReference{at} of it" for at in range(TEXTS)]
    dialogues = [[f"Summary{at}", dialogue(at, 6 if at % 2 else 16)] for at in range(TEXTS)]
    questions = [
        {"question": f"Question{at}?", "answers": ["a"],
         "ctxs": [{"title": f"T{at}", "text": f"passage {at} {part}"} for part in range(10)]}
        for at in range(100)
    ]  # fmt: skip
    for name, content in (
        ("wmt19/newstest2019.de-en.tsv", "\n".join(rows)),
        ("samsum/test.json", json.dumps(dialogues)),
        ("musique/musique_s.json", json.dumps(questions)),
    ):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(content, encoding="utf-8")
    return tmp_path


def texts_of(family: Family) -> list[str]:
    return ["".join(map(chr, one)) for one in (family.donor, *family.earlier, *family.asked)]


def drawn(data: Path, split: str, each: int) -> list[Family]:
    return families(data, Letters(), split, each, 0)  # type: ignore[arg-type]


def test_a_family_is_one_template_filled_anew(data: Path) -> None:
    found = drawn(data, "report", 2)
    assert [one.kind for one in found] == [kind for kind in KINDS for _ in range(2)]
    for family in found:
        texts = texts_of(family)
        assert (len(family.earlier), len(family.asked)) == (EARLIER, ASKED)
        assert len(set(texts)) == len(texts)
        assert len({text.split()[0] for text in texts}) == 1


def test_more_families_than_there_are_texts_are_refused(data: Path) -> None:
    with pytest.raises(DataError, match="too few texts for 50 families of header"):
        drawn(data, "report", 50)


def test_names_change_everywhere_and_orders_keep_their_passages(data: Path) -> None:
    by_kind = {one.kind: texts_of(one) for one in drawn(data, "report", 1)}
    assert "Boris" in by_kind["renamed"][0]
    assert not any("Boris" in text for text in by_kind["renamed"][1:])
    for kind in ("reordered", "passages"):
        parts = [text.split("\n\n") for text in by_kind[kind]]
        assert len({tuple(sorted(part[1:-1])) for part in parts}) == 1
        assert len({tuple(part[1:-1]) for part in parts}) > 1


def test_halves_have_no_text_in_common_and_samples_nest(data: Path) -> None:
    def words(split: str) -> set[str]:
        found = {word for one in drawn(data, split, 2) for text in texts_of(one)
                 for word in text.split()}  # fmt: skip
        return {word for word in found if re.fullmatch(r"[A-Z][a-z]*[0-9]+\W*", word)}

    assert len(words("tune")) > 50
    assert words("tune").isdisjoint(words("report"))
    few = drawn(data, "tune", 1)
    assert few == drawn(data, "tune", 2)[::2]
