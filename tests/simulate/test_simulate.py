"""`kvshare simulate`: traces made by hand, tiers that can be checked on paper, the command
itself."""

from __future__ import annotations

import gzip
import io
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from kvshare_store.blocks.eviction import POLICIES, make_policy
from kvshare_store.errors import ConfigError
from kvshare_store.simulate.replay import UNLIMITED, Machine, Shelf
from kvshare_store.simulate.traces import Chunk, Request, chunks, four_bytes, requests
from tests.support.commands import run


def lines(*rows: dict[str, object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(raw: bytes, block_tokens: int = 4) -> list[Request]:
    return list(requests(io.BytesIO(raw), block_tokens, None))


# --- traces -------------------------------------------------------------------------------------


def test_hashed_blocks_and_what_is_left_of_the_last() -> None:
    row = {"timestamp": 1, "input_length": 1100, "output_length": 3, "hash_ids": [7, 8, 9]}
    assert read(lines(row)) == [(Chunk("7", 512), Chunk("8", 512), Chunk("9", 76))]
    assert read(lines({"hash_ids": ["a"]})) == [(Chunk("a", 512),)]
    assert read(lines({"hash_ids": [], "input_length": 0})) == [()]


def test_runs_of_tokens_are_named_by_all_that_precedes_them() -> None:
    first, second = read(lines({"tokens": list(range(10))}, {"tokens": [9, *range(1, 10)]}))
    assert [chunk.tokens for chunk in first] == [4, 4, 2]
    assert not {chunk.name for chunk in first} & {chunk.name for chunk in second}
    assert chunks(range(8), 4) == first[:2]


def test_turns_build_on_the_turns_before() -> None:
    texts = ["a first turn of some length", "a second", "and a third"]
    found = read(lines({"id": "x", "human": texts}, {"id": "y", "human": ["another"]}))
    assert len(found) == 4
    ours = [request for request in found if request[0] == found[0][0]]
    assert len(ours) == 3
    for earlier, later in pairwise(ours):
        whole = [chunk for chunk in earlier if chunk.tokens == 4]
        assert list(later[: len(whole)]) == whole
    total = sum(len(four_bytes(text)) for text in texts)
    assert sum(chunk.tokens for chunk in ours[-1]) == total


def test_conversations_take_turns_the_same_way_each_time() -> None:
    raw = lines(*({"human": [f"{n} turn {t}" for t in range(3)]} for n in range(300)))
    found = read(raw)
    assert found == read(raw)
    assert len(found) == 900
    in_order = [request for n in range(300) for request in read(lines({"human": [f"{n} turn 0"]}))]
    firsts = [request for request in found if len(request) == 1]
    assert [r for r in firsts if r in in_order] == in_order, "first turns in the order of the file"
    assert found[:3] != read(lines({"human": [f"0 turn {t}" for t in range(3)]})), "interleaved"


def test_gzip_is_noticed() -> None:
    raw = lines({"tokens": [1, 2, 3]})
    assert read(gzip.compress(raw)) == read(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"no json\n",
        b"[1]\n",
        lines({"text": "x"}),
        gzip.compress(b"{}", mtime=0)[:-4],
        b'{"tokens": 1}',
    ],
)
def test_what_is_no_trace_is_an_error(raw: bytes) -> None:
    with pytest.raises(ConfigError, match="trace"):
        read(raw)


def test_a_file_of_prompts_is_no_trace() -> None:
    with pytest.raises(ConfigError, match="name a file of prompts with --prompts FILE"):
        read(lines({"prompt": "Dear all", "answer": "Hello"}))


# --- tiers --------------------------------------------------------------------------------------


def prompt(*names: str) -> Request:
    return tuple(Chunk(name, 10) for name in names)


def machine(host: float, disk: float = 0, policy: str = "lru") -> Machine:
    """Budgets in chunks of 10 tokens, at one byte a row."""
    return Machine(policy, 10 * host, 10 * disk, 1)


def test_hits_end_at_the_first_gap() -> None:
    ours = machine(math.inf)
    ours.serve(prompt("a", "b", "c"))
    ours.serve(prompt("a", "x", "c"))
    assert (ours.served.host, ours.served.disk, ours.served.tokens) == (10, 0, 60)
    assert ours.served.hit_rate == pytest.approx(10 / 60)


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    ours = machine(4)
    ours.serve(prompt("a", "b", "c"))
    ours.serve(prompt("x", "y"))
    ours.serve(prompt("a", "b", "c"))
    assert ours.served.host == 20


def test_what_leaves_the_host_is_found_on_disk_and_comes_back() -> None:
    ours = machine(2, 6)
    ours.serve(prompt("a", "b"))
    ours.serve(prompt("x", "y"))
    ours.serve(prompt("a", "b"))
    assert (ours.served.host, ours.served.disk) == (0, 20)
    ours.serve(prompt("a", "b"))
    assert (ours.served.host, ours.served.disk) == (20, 20)


def test_what_leaves_the_host_is_written_to_a_disk_that_had_lost_it() -> None:
    ours = machine(3, 2)
    for name in ("a", "b", "c", "d"):  # the disk has lost "a" when "d" takes its place in the host
        ours.serve(prompt(name))
    ours.serve(prompt("a"))
    assert (ours.served.host, ours.served.disk) == (0, 10)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_holds_and_what_had_to_go_is_said(policy: str) -> None:
    shelf, held = Shelf(make_policy(policy), 40), dict[str, int]()
    for number in range(300):
        name, nbytes = f"{number % 23}", 1 + number % 13
        if name in shelf:
            shelf.touch(name)
            continue
        for gone, size in shelf.add(name, nbytes, 1.0):
            assert held.pop(gone) == size
        held[name] = nbytes
        assert sum(held.values()) <= 40
        assert all(kept in shelf for kept in held)
    assert shelf.add("too large", 41, 1.0) == []
    assert "too large" not in shelf


@pytest.mark.parametrize("policy", POLICIES)
def test_unlimited_is_the_upper_bound(policy: str) -> None:
    trace = read(lines(*({"tokens": [n % 7, n % 3, n, n % 5]} for n in range(300))), 1)
    ours, best = Machine(policy, 40, 60, 1), Machine(UNLIMITED, math.inf, 0, 1)
    for request in trace:
        ours.serve(request)
        best.serve(request)
    assert 0 < ours.served.hit_rate <= best.served.hit_rate
    assert ours.served.requests == 300


def test_a_chunk_larger_than_the_budget_stays_out() -> None:
    ours = machine(1)
    ours.serve(prompt("a"))
    ours.serve((Chunk("large", 11),))
    ours.serve(prompt("a"))
    assert ours.served.host == 10


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(lines(*({"tokens": [n % 4] * 64} for n in range(40))))
    return path


def test_the_command_prints_a_line_for_each_policy(trace: Path) -> None:
    code, out, _ = run("simulate", str(trace), "--row-bytes", "1", "--host-bytes", "128")
    assert code == 0
    assert "40 requests, 2,560 tokens" in out
    assert "Host tier: 128 B; a token: 1 bytes\n" in out
    found = {line.split()[0]: line.split()[1] for line in out.splitlines() if "%" in line}
    assert list(found) == [*POLICIES, UNLIMITED]
    assert found["lru"] == "0.0", "four prompts in turns do not fit where two do"
    assert found[UNLIMITED] == "90.0"


def test_a_trace_without_requests_leaves_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    code, out, err = run("simulate", str(tmp_path / "empty.jsonl"))
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line)
    assert line == f"kvshare: trace {tmp_path / 'empty.jsonl'} has no requests"


def test_the_command_writes_json_and_a_plot(trace: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--policy", "lru", "--host-bytes", "128", "--disk-bytes", "1k", "--row-bytes", "1"]
    code, _, _ = run("simulate", str(trace), *options, "--json", str(out), "--plot", str(picture))
    assert code == 0
    first, second = json.loads(out.read_bytes())
    assert (first["policy"], first["host"], first["disk"]) == ("lru", 0, 36 * 64)
    assert (second["policy"], second["hit_rate"]) == (UNLIMITED, 0.9)
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, printed, _ = run("simulate", str(trace), *options, "--json", "-")
    assert json.loads(printed) == [first, second]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "fifo"], "cost, lru, s3fifo"),
        (["--host-bytes", "much"], "not a size"),
        (["--tokenizer", "/nowhere.json"], "tokenizer.json"),
        (["--plot", "/nowhere/out.png"], "cannot be written"),
        (["--json", "/nowhere/out.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said(trace: Path, options: list[str], says: str) -> None:
    code, _, err = run("simulate", str(trace), *options)
    assert code == 2
    assert says in err


def test_a_trace_that_is_not_there_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for name in ("empty", "nowhere"):
        code, _, err = run("simulate", str(tmp_path / name))
        assert (code, "trace" in err) == (2, True)
