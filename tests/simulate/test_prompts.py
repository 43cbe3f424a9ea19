"""`kvshare simulate --prompts`: lines made by hand, results that can be checked on paper, the
command."""

from __future__ import annotations

import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_store.cli.simulated_prompts import FIRST_TOKENS, NOTES
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.simulate.planned_reuse import PlannedReuse
from kvshare_store.simulate.prefix_cache import PrefixCache
from kvshare_store.simulate.prompt_replay import Room, arms_of, replay, report
from kvshare_store.simulate.prompts import Prompt, Reader, in_order, read_prompts
from tests.support.chat_model import chat_model
from tests.support.commands import run
from tests.support.documents import DOCS

ROW_BYTES = 64


def text(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 30_000, length)]


def prompt(
    tokens: list[int],
    answer: list[int] | None = None,
    *,
    at: float | None = None,
    tenant: str = "",
) -> Prompt:
    return Prompt(as_tokens(tokens), as_tokens(answer or range(0)), at, tenant, "")


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(raw: bytes, **reader: Any) -> list[Prompt]:
    return list(read_prompts(io.BytesIO(raw), Reader(**reader)))


def store(policy: str = "balanced", **options: Any) -> PlannedReuse:
    settings = {"policy": policy, "min_saving_ms": 0.0}
    return PlannedReuse(StoreConfig(**settings), ROW_BYTES, **options)


# --- lines --------------------------------------------------------------------------------------


def letters(words: str) -> list[int]:
    return [ord(letter) for letter in words]


def test_a_line_has_tokens_or_text() -> None:
    rows = lines(
        {"tokens": [1, 2], "answer_tokens": [3], "at": 5, "tenant": "t", "session": "s", "x": 1},
        {"prompt": "ab", "answer": "c"},
        {"prompt": "", "tokens": None},
    )
    first, second, third = read(rows, tokenize=letters)
    assert (first.tokens.tolist(), first.answer.tolist()) == ([1, 2], [3])
    assert first[2:] == (5.0, "t", "s")
    assert (second.tokens.tolist(), second.answer.tolist(), second.at) == ([97, 98], [99], None)
    assert len(third.tokens) == 0
    assert [len(each.answer) for each in read(rows, tokenize=letters, answers=False)] == [0, 0, 0]
    assert len(read(gzip.compress(rows), tokenize=letters)) == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"no json\n", "line 3: "),
        (b'{"tokens": "x"}\n', "line 3: .*tokens"),
        (b'{"tokens": [1, -2]}\n', "line 3: token ids"),
        (b'{"tokens": [1, 4294967296]}\n', "line 3: token ids"),
        (b'{"answer": "x"}\n', "line 3: it has no `messages`, `prompt` or `tokens`"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "line 3: .*messages.*--tokenizer"),
        (b'{"messages": "x"}\n', "line 3: .*messages"),
        (b'{"prompt": "x"}\n', "line 3: .*--tokenizer"),
        (b'{"tokens": [1], "answer": "x"}\n', "line 3: .*--tokenizer"),
        (b'{"tokens": [1], "at": "noon"}\n', "line 3: .*at"),
    ],
)
def test_a_bad_line_is_named(line: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(lines({"tokens": [1]}, {"tokens": [2]}) + line)


def test_a_line_has_messages() -> None:
    """Tokens go before text, and text before messages."""
    said = [{"role": "user", "content": "x"}]
    tools = [{"type": "function"}]
    rows = lines(
        {"messages": said, "tools": tools, "answer": "y"},
        {"messages": said, "prompt": "ab"},
        {"messages": said, "tokens": [1]},
    )
    asked: list[Any] = []

    def render(messages: list[Any], tools: list[Any] | None) -> str:
        asked.append((messages, tools))
        return "rendered"

    found = read(rows, tokenize=letters, render=render)
    assert [one.tokens.tolist() for one in found] == [letters("rendered"), letters("ab"), [1]]
    assert found[0].answer.tolist() == letters("y")
    assert asked == [(said, tools)]


def test_a_time_is_asked_for_where_it_counts() -> None:
    with pytest.raises(ConfigError, match=r"line 1: .*--settle"):
        read(lines({"tokens": [1]}), timed=True)


def test_prompts_come_in_the_order_of_time() -> None:
    times = [None, 3.0, None, 1.0, 3.0, 2.0]
    found = in_order(prompt([number], at=at) for number, at in enumerate(times))
    assert [int(each.tokens[0]) for each in found] == [0, 3, 5, 1, 2, 4]


def test_the_last_token_of_an_answer_has_no_row() -> None:
    assert prompt([1, 2], [3, 4]).computed.tolist() == [1, 2, 3]
    assert prompt([1, 2], [3]).computed.tolist() == [1, 2]


# --- prefix caching -----------------------------------------------------------------------------


def test_full_blocks_are_found_and_the_last_token_is_computed() -> None:
    cache = PrefixCache(ROW_BYTES)
    tokens = text(0, 64)
    assert cache.serve(prompt(tokens)).exact == 0
    assert cache.serve(prompt(tokens)).exact == 48
    assert cache.serve(prompt([*tokens, 1])).exact == 64
    assert cache.serve(prompt([*tokens[:40], 1, 2])).exact == 32


def test_answers_fill_blocks_too() -> None:
    cache = PrefixCache(ROW_BYTES)
    tokens, answer = text(0, 40), text(1, 25)
    cache.serve(prompt(tokens, answer))
    assert cache.serve(prompt([*tokens, *answer, 5])).exact == 64
    other = PrefixCache(ROW_BYTES)
    other.serve(prompt(tokens, answer[:24]))
    assert other.serve(prompt([*tokens, *answer, 5])).exact == 48


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = PrefixCache(ROW_BYTES, 16 * ROW_BYTES * 6)
    first, second, third = text(0, 64), text(1, 16), text(2, 32)
    for each in (first, second, third):
        cache.serve(prompt(each))
    assert cache.serve(prompt([*first, 1])).exact == 48, "its last block made room"
    assert cache.serve(prompt([*second, 1])).exact == 0, "and then the next that was older"


def test_a_block_that_is_not_full_takes_room_until_the_next_request() -> None:
    cache = PrefixCache(ROW_BYTES, 16 * ROW_BYTES * 6)
    first, second = text(0, 64), text(1, 40)
    for each in (first, second):
        cache.serve(prompt(each))
    assert cache.serve(prompt([*first, 1])).exact == 48, "its last block made room for 8 tokens"
    for each in (first, second[:32], [*first, 1]):
        found = cache.serve(prompt(each)).exact
    assert found == 64, "nothing had to go for 32"


# --- KVShare ------------------------------------------------------------------------------------


def test_the_planner_finds_exact_and_edited_rows() -> None:
    ours = store("aggressive")
    tokens = text(0, 400)
    assert ours.serve(prompt(tokens)).tokens == 0
    assert ours.serve(prompt(tokens)) == (399, 0, 0)
    changed = [7, *tokens[1:]]
    found = ours.serve(prompt(changed))
    assert (found.exact, found.edited) == (0, 398)


def test_answers_are_reused_in_the_next_turn() -> None:
    tokens, answer = text(0, 200), text(1, 100)
    with_answers, without = store(), store()
    with_answers.serve(prompt(tokens, answer))
    without.serve(prompt(tokens))
    turn = [*tokens, *answer, *text(2, 50)]
    assert with_answers.serve(prompt(turn)) == (299, 0, 0)
    assert without.serve(prompt(turn)).exact == 200


def test_the_end_of_a_prompt_is_not_renewed_by_who_shares_its_beginning() -> None:
    budget = ROW_BYTES * 704
    ours, cache = store("exact", budget=budget), PrefixCache(ROW_BYTES, budget)
    first, second = text(0, 320), text(1, 192)
    for each in (first, second, [*first[:64], *text(2, 128)], text(3, 192)):
        for arm in (ours, cache):
            arm.serve(prompt(each))
    for arm in (ours, cache):
        assert arm.serve(prompt([*second, 1])).exact == 192, "the end of the first made room"


def test_no_block_is_kept_for_a_few_of_its_rows() -> None:
    first = text(0, 256)

    def left(shared: int) -> int:
        """What is found of 192 tokens when there is room for them and for 256 others."""
        ours = store("exact", budget=ROW_BYTES * 448)
        second = [*first[:shared], *text(1, 192)][:192]
        for each in (first, second, text(2, 256)):
            ours.serve(prompt(each))
        return ours.serve(prompt([*second, 1])).exact

    assert left(64 + 16) == 192
    assert left(64 + 48) == 176, "16 rows that nobody uses stay beside 48 that are shared"


def test_prompts_too_short_to_store_are_not_stored() -> None:
    ours = store()
    ours.serve(prompt(text(0, 20), text(1, 100)))
    assert ours.serve(prompt([*text(0, 20), *text(1, 100)])).tokens == 0


def test_another_tenants_prompts_are_not_found() -> None:
    tokens = text(0, 200)
    for arm in (PrefixCache(ROW_BYTES), store("aggressive"), store("exact")):
        arm.serve(prompt(tokens, tenant="a"))
        assert arm.serve(prompt(tokens, tenant="b")).tokens == 0
        assert arm.serve(prompt(tokens, tenant="")).tokens == 0
        assert arm.serve(prompt(tokens, tenant="a")).tokens > 0


def test_an_edited_prompt_settles() -> None:
    tokens = text(0, 400)
    changed = [*text(9, 8), *tokens]

    def served(settle: float | None) -> list[tuple[int, ...]]:
        ours = store("aggressive", settle=settle)
        return [
            tuple(ours.serve(prompt(each, at=at)))
            for at, each in ((0.0, tokens), (1.0, changed), (20.0, changed), (50.0, changed))
        ]

    assert served(10.0)[1][2] > 300, "edited at first"
    assert served(10.0)[2] == (407, 0, 0)
    assert served(19.0)[2] == (407, 0, 0), "from that moment on"
    assert served(20.0)[2][0] < 407
    assert served(20.0)[3] == (407, 0, 0)
    assert served(None)[3][0] < 407


def test_a_budget_is_kept_by_forgetting_prompts() -> None:
    ours = store("exact", budget=1_000 * ROW_BYTES)
    prompts = [prompt(text(seed, 300)) for seed in range(8)]
    for each in prompts:
        ours.serve(each)
    assert ours.serve(prompts[-1]).exact == 299
    assert sum(store("exact", budget=0).serve(each).tokens for each in prompts * 2) == 0
    found = sum(ours.serve(each).exact > 0 for each in reversed(prompts))
    assert 0 < found < 8


def test_the_same_prompts_give_the_same_numbers() -> None:
    prompts = [prompt([*text(0, 200), *text(seed % 5, 200)], text(seed, 20)) for seed in range(20)]

    def once() -> dict[str, Any]:
        arms = arms_of(StoreConfig(), ["exact", "balanced"], Room(ROW_BYTES))
        return report(replay(prompts, arms, 32))

    assert once() == once()


def test_short_prompts_are_served_and_do_not_count() -> None:
    served: list[int] = []
    arms = arms_of(StoreConfig(), ["exact"], Room(ROW_BYTES))
    tokens = text(0, 320)
    counted = replay(
        [prompt(tokens[:100]), prompt(tokens)],
        arms,
        200,
        lambda: served.append(1),
    )
    assert len(served) == 2
    result = report(counted)
    assert (result["requests"], result["tokens"]) == (1, 320)
    assert result["exact"] == {
        "reused": 100,
        "to_compute": 220,
        "by_kind": {"exact": 100, "continued": 0, "edited": 0},
        "median_to_compute": 220.0,
        "p90_to_compute": 220.0,
    }
    assert result["prefix_caching"]["to_compute"] == 320 - 96
    assert counted.to_compute("exact") == [220]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    turns = [text(0, 100 * turn) for turn in range(1, 6)]
    path.write_bytes(lines(*({"tokens": tokens, "at": at} for at, tokens in enumerate(turns))))
    return path


def test_the_command_prints_a_line_for_each_arm(file: Path) -> None:
    code, out, _ = run("simulate", "--prompts", str(file))
    assert code == 0
    assert "5 requests, 1,500 tokens" in out
    assert "assumed 5,000 tokens/s: nothing measured yet" in " ".join(out.split())
    for name in ("prefix caching", "exact", "faithful", "balanced", "aggressive"):
        assert sum(line.startswith(name) for line in out.splitlines()) == 1
    assert " 524 " in out, "96 + 192 + 288 + 400 of 1,500 tokens are in full blocks"


def test_the_command_writes_json_and_a_plot(file: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--prompts", str(file), "--policy", "exact", "--min-tokens", "150"]
    code, _, _ = run("simulate", *options, "--json", str(out), "--plot", str(picture))
    assert code == 0
    result = json.loads(out.read_bytes())
    assert list(result) == ["requests", "tokens", "assumed_speed", "prefix_caching", "exact"]
    assert result["assumed_speed"] == 5_000.0
    assert (result["requests"], result["tokens"]) == (4, 1_400)
    assert result["exact"]["to_compute"] == 400
    assert result["prefix_caching"]["to_compute"] == 424
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, printed, _ = run("simulate", *options, "--json", "-")
    assert json.loads(printed) == result


@pytest.mark.parametrize("columns", ["70", "80", "200"])
def test_the_table_fits_and_says_how_often_the_first_token_stays(file: Path, columns: str) -> None:
    code, out, _ = run("simulate", "--prompts", str(file), columns=columns)
    assert code == 0
    assert max(map(len, out.splitlines())) <= int(columns)
    rates = {line[:14].strip(): line.rstrip()[-5:].strip() for line in out.splitlines() if " % " in
             line}  # fmt: skip
    assert rates | {"prefix caching": "100 %", "balanced": "95 %", "aggressive": "76 %"} == rates
    assert ("no room for: 90 %" in out) == (columns == "70")
    assert "docs/choosing.md" in " ".join(out.split())
    assert "a token: " not in out, "without a budget it does not count"


def test_a_policy_that_a_setting_changes_was_not_measured(file: Path) -> None:
    _, out, _ = run("simulate", "--prompts", str(file), "--set", "edit_window=8")
    (balanced,) = (line for line in out.splitlines() if line.startswith("balanced"))
    assert balanced.rstrip().endswith(" -")


def test_the_first_tokens_are_those_that_were_measured() -> None:
    found = json.loads((DOCS / "benchmarks" / "agreement.json").read_text())
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    same = {row["method"].removeprefix("kvshare "): row["first token same"] for row in rows}
    measured = {"prefix_caching": same["prefix"], "exact": same["prefix"]} | {
        name: round(same[name], 2) for name in ("faithful", "balanced", "aggressive")
    }
    assert measured == FIRST_TOKENS
    assert f"of {found['n']['pairs']} recorded pairs" in " ".join(NOTES)


def test_what_a_token_takes_is_said_where_a_budget_makes_it_count(file: Path) -> None:
    options = ("simulate", "--prompts", str(file), "--policy", "exact", "--host-bytes", "8MiB")
    assert "Host tier: 8.0 MiB; a token: 57,344 bytes, as of Qwen2.5-7B" in run(*options)[1]
    given = run(*options, "--row-bytes", "1KiB")[1]
    assert "a token: 1,024 bytes\n" in given


def test_numbers_for_programs_are_round(file: Path) -> None:
    options = ["--prompts", str(file), "--policy", "faithful", "--min-tokens", "0"]
    _, printed, _ = run("simulate", *options, "--json", "-")
    found = json.loads(printed)["faithful"]
    assert all(one == round(one, 1) for one in found.values() if isinstance(one, float))
    assert "argument: FILE|- (see" in run("simulate", "--prompts", str(file), "--json")[2]


def test_settings_count(file: Path) -> None:
    options = ["--prompts", str(file), "--policy", "exact", "--json", "-"]
    _, printed, _ = run("simulate", *options, "--set", "min_prompt_tokens=450")
    assert json.loads(printed)["requests"] == 1
    assert json.loads(printed)["exact"]["reused"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policy", "lru"], "off, exact, faithful, balanced, aggressive"),
        (["--host-bytes", "much"], "not a size"),
        (["--host-bytes", "-1"], "not a size"),
        (["--tokenizer", "/nowhere"], "tokenizer.json"),
        (["--settle", "soon"], "--settle"),
        (["--settle", "-1"], "--settle"),
        (["--row-bytes", "6"], "multiple of 4"),
        (["--row-bytes", "0"], "at least a byte"),
        (["--row-bytes", "/nowhere"], "not a size"),
        (["--min-tokens", "501"], "501 tokens"),
        (["--plot", "/nowhere/out.png"], "cannot be written"),
        (["--json", "/nowhere/out.json"], "cannot be written"),
        (["another.jsonl"], "either"),
    ],
)
def test_what_cannot_be_done_is_said(file: Path, options: list[str], says: str) -> None:
    code, _, err = run("simulate", "--prompts", str(file), *options)
    assert code == 2
    assert says in err


def test_a_file_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(lines({"tokens": text(0, 50)}) + b'{"tokens": [1,\n')
    for path, says in ((tmp_path / "nowhere", "cannot be read"), (damaged, "line 2")):
        code, out, err = run("simulate", "--prompts", str(path))
        assert (code, out) == (2, "")
        assert says in err
    code, _, err = run("simulate")
    assert (code, "TRACE" in err) == (2, True)


def test_text_is_split_by_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(100)}
    model = tokenizers.models.WordLevel({**words, "?": 100}, unk_token="?")
    split = tokenizers.Tokenizer(model)
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    split.save(str(tmp_path / "tokenizer.json"))
    said = " ".join(words)
    path = tmp_path / "text.jsonl"
    path.write_bytes(lines({"prompt": said, "answer": said}, {"prompt": f"{said} {said} w1"}))
    options = ["--prompts", str(path), "--tokenizer", str(tmp_path), "--policy", "exact"]
    _, printed, _ = run("simulate", *options, "--json", "-")
    assert json.loads(printed)["exact"]["reused"] == 199
    _, printed, _ = run("simulate", *options, "--no-answers", "--json", "-")
    assert json.loads(printed)["exact"]["reused"] == 100


def test_messages_go_through_the_template_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    chat_model(tmp_path)
    said = "x" * 100
    first = [{"role": "user", "content": said}]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(lines({"messages": first, "answer": "no"}, {"prompt": f"<user>{said}<bot>no"}))
    options = ["--prompts", str(path), "--tokenizer", str(tmp_path), "--policy", "exact"]
    code, printed, err = run("simulate", *options, "--json", "-")
    assert code == 0, err
    found = json.loads(printed)
    assert (found["tokens"], found["exact"]["reused"]) == (111 + 113, 112)


def test_unlimited_is_infinite() -> None:
    assert Room(4).budget == math.inf
