"""The loaders, on tiny sets in the layout that `--data` names."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import datasets, fetch

LOADERS: dict[str, Callable[[Path], Any]] = {
    "sharegpt": datasets.sharegpt,
    "wmt19": lambda folder: datasets.wmt19(folder, "de-en"),
    "samsum": datasets.samsum,
    "musique": datasets.musique,
    "minilongbench": lambda folder: datasets.minilongbench(folder, "trec"),
    "mooncake": datasets.mooncake,
    "arena-hard": datasets.arena_hard,
    "qqp": datasets.qqp,
}


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_set_says_which_file_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(datasets.MissingDataError) as raised:
        LOADERS[name](tmp_path)
    message = str(raised.value)
    assert str(tmp_path / name) in message
    assert "To get it: " in message
    assert "docs/benchmarks/data.md" in message


def test_sharegpt_keeps_its_order(tmp_path: Path) -> None:
    rows = lines({"id": "b_0", "human": ["one", "two"]}, {"id": "a_0", "human": ["three"]})
    put(tmp_path / "sharegpt" / "human_turns.jsonl.gz", gzip.compress(rows.encode()))
    found = datasets.sharegpt(tmp_path)
    assert [c.id for c in found] == ["b_0", "a_0"]
    assert [p.text for p in datasets.first_turns(found)] == ["one", "three"]
    turns = datasets.all_turns(found)
    assert [p.text for p in turns] == ["one", "two", "three"]
    assert len({p.id for p in turns}) == 3
    assert len(datasets.sharegpt(tmp_path, 1)) == 1


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    put(tmp_path / "mooncake" / "conversation_trace.jsonl", '{"timestamp": 0\n')
    with pytest.raises(datasets.DataFormatError, match="line 1"):
        datasets.mooncake(tmp_path)


def test_wmt19_wants_tabs(tmp_path: Path) -> None:
    path = tmp_path / "wmt19" / "newstest2019.de-en.tsv"
    put(path, "Ja.\tYes.\nNein.\tNo.\n")
    assert datasets.wmt19(tmp_path, "de-en") == [("Ja.", "Yes."), ("Nein.", "No.")]
    put(path, "Ja. Yes.\n")
    with pytest.raises(datasets.DataFormatError, match="TAB"):
        datasets.wmt19(tmp_path, "de-en")


def test_the_json_sets(tmp_path: Path) -> None:
    put(tmp_path / "samsum" / "test.json", json.dumps([["short", "A : long"]]))
    assert datasets.samsum(tmp_path) == [datasets.Dialogue("A : long", "short")]
    passages = [{"title": "", "text": "p"}, {"title": "T", "text": "q"}]
    rows: Any = [{"ctxs": passages, "question": "?", "answers": ["a"]}]
    put(tmp_path / "musique" / "musique_s.json", json.dumps(rows))
    assert datasets.musique(tmp_path) == [datasets.Question("?", ("p", "T\n\nq"), ("a",))]
    gold = {"all_classes": ["Food", "Date"], "answers": ["Date"]}
    rows = {"0": {"origin_prompt": "o", "gold": gold}, "1": {"origin_prompt": "r", "gold": "g"}}
    put(tmp_path / "minilongbench" / "MiniLongBench_trec.json", json.dumps(rows))
    assert datasets.minilongbench(tmp_path, "trec") == [("o", ("Date",)), ("r", ("g",))]


def test_traces_prompts_and_pairs(tmp_path: Path) -> None:
    arrival = {"timestamp": 1500, "input_length": 7, "output_length": 2, "hash_ids": [0, 4]}
    put(tmp_path / "mooncake" / "conversation_trace.jsonl", lines(arrival))
    assert datasets.mooncake(tmp_path) == [datasets.Arrival(1.5, 7, 2, (0, 4))]
    for at, name in enumerate(datasets.ARENA_HARD):
        put(tmp_path / "arena-hard" / name, lines({"uid": str(at), "prompt": f"p{at}"}))
    assert datasets.arena_hard(tmp_path) == [("0", "p0"), ("1", "p1")]
    content = json.dumps([{"text_a": "a", "text_b": "b", "is_duplicate": 1}]).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("x.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    put(tmp_path / "qqp" / "similiar_qqp.json.gz", packed.getvalue())
    assert datasets.qqp(tmp_path) == [datasets.Labelled("a", "b", True)]


def test_sharegpt_is_recovered_from_a_list_that_breaks_off(tmp_path: Path) -> None:
    def row(name: str, *who: str) -> dict[str, Any]:
        return {"id": name, "conversations": [{"from": w, "value": f"{name} {w}"} for w in who]}

    rows = [
        row("a", "human", "gpt", "human"),
        row("b", "gpt"),
        row("a", "human"),
        row("c", "human"),
    ]
    whole = json.dumps(rows, indent=2)
    source = tmp_path / "list.json"
    source.write_text(whole[: whole.rindex("c human") + 3])  # in the middle of the last row
    assert fetch.fetch_sharegpt(tmp_path, source) == 1
    assert datasets.sharegpt(tmp_path) == [datasets.Conversation("a", ("a human", "a human"))]
    source.write_text(whole)
    assert fetch.fetch_sharegpt(tmp_path, source) == 2
    assert [c.id for c in datasets.sharegpt(tmp_path)] == ["a", "c"]


def test_an_unknown_set_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="sharegpt, wmt19, samsum"):
        fetch.fetch("nothing", tmp_path)
