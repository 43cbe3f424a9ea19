"""`explain`, `log`, `diff`, `evict` and `ls`, with a daemon and on an offline home."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.cli import evict, explained, purge, upkeep
from kvshare_store.cli.log import request_lines, requests_table
from kvshare_store.cli.main import main
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.daemon.protocol import Decline, ListNodes, Observe, Prefilled
from kvshare_store.errors import ConfigError, NodeError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.cli.test_cli import rendered
from tests.support.commands import as_json, ok, one_line, run
from tests.support.daemons import ClientDriver, serving
from tests.support.oracle import Driver
from tests.support.stores import SMALL, Open

pytestmark = pytest.mark.usefixtures("plain_environment")

SPACE = Namespace("org/model", KVLayout(2, 1, 4, "float32"))
FIRST = list(range(1000, 1200))
SECOND = [*FIRST[:80], 7, 8, 9, *FIRST[83:]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """Home of a daemon with three prompts, and their ids; four requests were made."""
    home = tmp_path_factory.mktemp("explain") / "home"
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        asked = client.send(plan_request(np.asarray(SECOND, np.int32), SPACE, None, "chat-7"))
        plan = msgspec.convert(client.receive(asked, 20.0), ReusePlan)
        client.finish(plan.lease, Outcome(plan.exact, plan.reused - plan.exact, 4, seconds=0.002))
        client.call(Prefilled("chat-7", 0.0305))
        second = engine.save(SECOND, plan)
        other = ClientDriver(client, SPACE.for_tenant("alice"), engine.book)
        assert other.plan(FIRST).declined == "empty_store"
        third = other.save(FIRST)
        client.flush()
        assert first and second and third  # noqa: PT018
        yield home, [first, second, third]


Served = tuple[Path, list[str]]


# --- explain --------------------------------------------------------------------------------------


def test_a_stored_prompt_against_another(served: Served) -> None:
    home, (first, second, _) = served
    found = as_json("explain", "--node", second[:10], "--node", first[:10], "--home", home)
    explained = found["explanation"]
    assert (found["request"], explained["declined"]) == (None, "")
    assert explained["by_kind"] == {"exact": 80, "edited": 116, "recomputed": 4}
    assert explained["by_reason"] == {"edit": 3, "tail": 1}
    (candidate,) = explained["candidates"]
    assert (candidate["node"], candidate["kept"], candidate["why"]) == (first, 196, "taken")
    out = ok("explain", "--node", second[:10], "--node", first[:10], "--home", home)
    for words in (
        "200 tokens, policy aggressive",
        "plan: 196 tokens reused, 4 recomputed",
        "at token 80, from",
        "recomputed: edit",
        "[edit: 7 8 9]",
        "80…82",
    ):
        assert words in out


CANDIDATE: dict[str, Any] = {
    "node": "a" * 32, "found_by": ["prefix", "passages", "words"], "score": 0.998, "prefix": 1_234,
    "shared": 2_345, "kept": 0, "taken": False, "source": "unconfirmed", "unconfirmed": 1_234,
    "why": "its passages are too short to be worth reusing",
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_candidates_fit_the_terminal(width: int) -> None:
    for candidate in (CANDIDATE, CANDIDATE | {"source": "", "unconfirmed": 0}):
        out = rendered(explained.candidates_table([candidate], width), width=width)
        table, missing, _ = out.partition("no room for: ")
        assert max(map(len, table.splitlines())) <= width
        assert bool(missing) == ("found by" not in table and "words" not in table)
        words = " ".join(line[table.splitlines()[0].index("why") :] for line in table.splitlines())
        assert CANDIDATE["why"] in " ".join(words.split()), "in one piece, however many lines"


def test_the_first_difference_may_be_from_who_was_not_taken(served: Served) -> None:
    home, (first, second, _) = served
    found = as_json("explain", "--node", second, "--node", first, "--home", home)["explanation"]
    assert "not taken" not in explained.divergence_text(found).plain
    passed = found | {"candidates": [found["candidates"][0] | {"taken": False}]}
    said = explained.divergence_text(passed).plain.splitlines()[0]
    assert said == f"at token 80, from {first[:12]} (not taken; its beginning fits best)"


def test_a_prompt_of_token_ids(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps([*FIRST, 1, 2, 3]))
    arguments = ("explain", file, "--tokens", "--home", served[0])
    line = one_line(run(*arguments), 5)
    assert "2 namespaces are here, name one with --namespace or --tenant" in line
    found = as_json(*arguments, "--namespace", SPACE.digest[:8])["explanation"]
    assert found["by_kind"] == {"exact": 200, "recomputed": 3}
    of_alice = as_json(*arguments, "--tenant", "alice")["explanation"]
    assert (of_alice["tenant"], of_alice["candidates"][0]["node"]) == ("alice", served[1][2])
    assert "no namespace is of that tenant" in one_line(run(*arguments, "--tenant", "bob"), 5)
    assert found["parts"][-1]["tokens"] == [3]
    file.write_text(json.dumps(FIRST))
    whole = ok(*arguments, "--namespace", SPACE.digest[:8])
    first = served[1][0][:12]
    assert f"{first} begins with the whole prompt (`kvshare explain --node {first}`" in whole
    strict = as_json(*arguments, "--namespace", SPACE.digest[:8], "--policy", "off")
    assert strict["explanation"]["declined"] == "policy_off"


def test_text_is_split_by_a_tokenizer(served: Served, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(token): token for token in range(1000, 1200)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | {"?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(map(str, FIRST)) + " what")
    arguments = ("explain", file, "--home", served[0], "--namespace", SPACE.digest)
    assert "names no tokenizer that can be read here" in one_line(run(*arguments), 1)
    found = as_json(*arguments, "--tokenizer", tmp_path)["explanation"]
    assert found["by_kind"] == {"exact": 200, "recomputed": 1}
    assert found["parts"][0]["text"].startswith("1000 1001")


def test_an_offline_home_explains_the_same(driver: Any, home: Path, namespace: Namespace) -> None:
    engine = driver()
    first, second = engine.save(FIRST), engine.save(SECOND)
    engine.store.close()
    found = as_json("explain", "--node", second, "--node", first, "--home", home)["explanation"]
    assert found["by_kind"]["exact"] == 80
    assert as_json("log", "--home", home) == []
    asked = one_line(run("explain", "--request", "1", "--home", home), 1)
    assert "no logged request is '1'" in asked, "as docs/commands.md says"
    assert "1 removed" not in run("diff", first, second, "--home", home)[1]


def test_a_bound_and_a_cap_are_explained(
    driver: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = driver()
    first, second = engine.save(FIRST), engine.save(SECOND)
    engine.store.close()
    monkeypatch.setenv("KVSHARE_POLICY", "aggressive")
    monkeypatch.setenv("KVSHARE_APPROXIMATION_PRICE", "0")
    arguments = ("explain", "--node", second, "--node", first, "--home", home)
    plain = as_json(*arguments)["explanation"]
    monkeypatch.setenv("KVSHARE_UNCONFIRMED_SHARE", "0.1")
    capped = as_json(*arguments)["explanation"]
    assert capped.keys() == plain.keys()
    assert capped["candidates"][0].keys() - plain["candidates"][0].keys() == {
        "source", "unconfirmed"}  # fmt: skip
    assert capped["by_kind"]["edited"] == 20
    assert "recomputed: source" in ok(*arguments)
    assert "unconfirmed (20 tokens)" in ok(*arguments)
    monkeypatch.setenv("KVSHARE_QUALITY_BOUND", "0.02")
    steered = as_json(*arguments)["explanation"]
    assert steered["steering"]["rung"] == steered["policy"] == "exact"
    assert steered["by_kind"] == {"exact": 80, "recomputed": 120}
    out = ok(*arguments)
    assert "/replace is at exact under a quality_bound of 2.0 %; 2.0 % of its requests get" in out


def test_a_logged_request_says_the_bound_also_without_its_text(tmp_path: Path) -> None:
    home = tmp_path / "home"
    bound = StoreConfig(home=str(home), quality_bound=1e-9, **SMALL)
    with serving(bound), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        engine.save(FIRST)
        for name, tokens in (("kept", SECOND), ("lost", [7, 8, *FIRST[2:]]), ("new", [1] * 99)):
            asked = client.send(plan_request(np.asarray(tokens, np.int32), SPACE, None, name))
            plan = msgspec.convert(client.receive(asked, 20.0), ReusePlan)
            if plan.lease:
                client.finish(plan.lease, Outcome(plan.exact, 0, 120))
        table = ok("log", "--home", home)
        for words in ("exact (quality_bound)", "miss: quality_bound", "miss: no_donor"):
            assert words in table
        for name in ("kept", "lost"):
            out = ok("explain", "--request", name, "--home", home)
            assert "policy exact" in out
            assert "/replace is at exact under a quality_bound of 0.0 %" in out
        assert "quality_bound" not in ok("explain", "--request", "new", "--home", home)


def test_a_request_that_its_engine_declined_is_found_by_its_id(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        client.call(Decline("policy_off", 30, "cmpl-1-0-abc", SPACE.for_tenant("alice")))
        client.call(Decline("late", 9))  # of an engine of the release before
        table = ok("log", "--declined", "--home", home)
        for words in ("cmpl-1-0-abc", "alice", "miss: policy_off"):
            assert words in table
        out = ok("explain", "--request", "cmpl-1", "--home", home)
        nameless = ok("explain", "--request", "2", "--home", home)
    assert "org/model, tenant alice" in out
    assert "declined before any plan was made" in out
    assert "no namespace" in nameless


def test_a_log_of_the_release_before_says_no_bound(served: Served) -> None:
    found = as_json("log", "--home", served[0])
    for request in found:
        del request["steering"]
    assert "quality_bound" not in "".join(request_lines(found[0]))
    assert requests_table(found, 200).row_count == len(found)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name what to explain"),
        (["--node", "a", "--node", "b", "--node", "c"], 2, "name what to explain"),
        (["/no/such/file"], 2, "/no/such/file cannot be read"),
        (["--request", "nobody"], 1, "no logged request is 'nobody'"),
        (["--node", "zz"], 1, "0 nodes begin with 'zz'"),
    ],
)
def test_what_cannot_be_explained(
    served: Served, arguments: list[str], code: int, words: str
) -> None:
    assert words in one_line(run("explain", *arguments, "--home", served[0]), code)


@pytest.mark.parametrize("content", ["", "{}", "[]", "[1.5]", '["a"]', "[99999999999]", "nonsense"])
def test_what_are_no_token_ids(served: Served, tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompt.json"
    file.write_text(content)
    line = one_line(run("explain", file, "--tokens", "--home", served[0]), 2)
    assert "is not a JSON list of token ids" in line


# --- log ------------------------------------------------------------------------------------------


def test_the_log_of_a_daemon(served: Served) -> None:
    found = as_json("log", "--home", served[0])
    last = {request["request"] or request["number"]: request for request in found}
    used = last["chat-7"]
    assert (used["outcome"], used["exact"], used["edited"]) == ("edited", 80, 116)
    assert (used["load"], used["policy"]) == (0.002, "aggressive")
    assert used["spans"] == [[0, 80, "exact"], [83, 199, "edited"]]
    assert "prompt" not in used
    (missed,) = as_json("log", "--declined", "--home", served[0])
    assert (missed["reason"], missed["tenant"]) == ("empty_store", "alice")
    assert as_json("log", "--slow", "-n", "1", "--home", served[0])[0]["request"] == "chat-7"
    out = ok("log", "--home", served[0])
    assert "chat-7" in out
    assert "miss" in out


def test_the_columns_of_the_log_add_up_in_any_width(served: Served) -> None:
    (found,) = as_json("log", "-n", "1", "--slow", "--home", served[0])
    found |= {"exact": 0, "edited": 11, "continued": 0, "cached": 185, "recomputed": 4}
    for width in (60, 200):
        table = requests_table([found], width)
        heads = [str(column.header) for column in table.columns]
        assert "cached" in heads
        assert next(iter(table.columns[heads.index("cached")].cells)).plain == "185"


def test_a_logged_request_in_full(served: Served) -> None:
    out = ok("explain", "--request", "chat", "--home", served[0])
    assert "request chat-7" in out
    assert "80 exact, 0 continued, 116 edited, 4 recomputed" in out
    assert "load 2.00 ms" in out
    assert "30.50 ms from plan to first token" in out
    assert "log_prompts" in out
    assert "kvshare explain --node NODE" in out


def test_what_is_expected_says_what_it_rests_on(home: Path) -> None:
    assumed = "(assumed 5,000 tokens/s: nothing measured yet)"
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        asked = ("explain", "--node", engine.save(SECOND), "--node", first, "--home", home)
        for speed in (5_000.0, 0.0):
            plan = engine.plan(SECOND)
            client.finish(plan.lease, Outcome(plan.exact, plan.reused - plan.exact, 1))
            entry = as_json("log", "--home", home)[0]
            expected = as_json(*asked)["explanation"]["expected"]
            assert entry["assumed_speed"] == expected["assumed_speed"] == speed
            for shown in (ok(*asked), "\n".join(request_lines(entry))):
                assert "save" in shown
                assert (assumed in " ".join(shown.split())) == bool(speed)
            client.call(Observe(1_000, 1.0))
    without = {name: entry[name] for name in entry.keys() - {"assumed_speed"}}
    assert list(request_lines(without)) == list(request_lines(entry)), "of the release before"


def test_a_miss_says_nothing_of_what_was_not(served: Served) -> None:
    (missed,) = as_json("log", "--declined", "--home", served[0])
    said = "\n".join(request_lines(missed))
    assert "lookup " in said
    assert not re.search("load|first token|save|-,", said)
    assert list(request_lines(missed | {"lookup": 0.0, "held": 0.0}))[-1].startswith("empty_store")


def test_a_logged_request_is_planned_again(home: Path) -> None:
    with serving(StoreConfig(home=str(home), log_prompts=True, **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        assert engine.plan(SECOND).declined == "empty_store"
        engine.save(FIRST)
        found = as_json("explain", "--request", "1", "--home", home)
        assert found["request"]["reason"] == "empty_store"
        assert found["explanation"]["by_kind"]["edited"] == 116
        assert "Now another plan" in ok("explain", "--request", "1", "--home", home)


def test_an_id_that_the_log_cut_names_its_request(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        for name in (f"chatcmpl-{'a' * 40}", f"chatcmpl-{'b' * 40}"):
            ask = plan_request(np.asarray(FIRST, np.int32), SPACE, None, name)
            client.receive(client.send(ask), 20.0)
        code, out, _ = run("log", "--home", home, columns="70")
        shown = [line.split()[0] for line in out.splitlines() if line.startswith("chatcmpl")]
        assert code == 0
        assert [name[-1] for name in shown] == ["…", "…"]
        for letter, name in zip("ba", shown, strict=True):
            found = as_json("explain", "--request", name, "--home", home)
            assert found["request"]["request"] == f"chatcmpl-{letter * 40}"
        line = one_line(run("explain", "--request", "chatcmpl-…", "--home", home), 1)
        assert "2 logged requests begin with 'chatcmpl-'; name more of it" in line
        assert "no logged request" in one_line(run("explain", "--request", "…", "--home", home), 1)


def test_a_request_is_no_candidate_for_itself(home: Path) -> None:
    """Neither the prompt that it stored, nor that prompt with its answer, nor what a second look
    has made of it."""
    with serving(StoreConfig(home=str(home), log_prompts=True, **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        plan = engine.serve(SECOND)
        own = [engine.save(SECOND, plan), engine.save(SECOND), engine.save([*SECOND, 5, 6])]
        assert len({first, *own}) == 4
        found = as_json("explain", "--request", "1", "--home", home)["explanation"]
        assert [one["node"] for one in found["candidates"]] == [first]
        assert found["by_kind"] == {"exact": 80, "edited": 116, "recomputed": 4}
        assert (found["divergence"]["node"], found["divergence"]["position"]) == (first, 80)


def asked_again(home: Path, number: str, *more: str) -> tuple[str, str]:
    """What differs from what a request was served, and the line that says so."""
    arguments = ("explain", "--request", number, *more, "--home", home)
    line = next(line for line in ok(*arguments).splitlines() if line.startswith("Then: "))
    return as_json(*arguments)["differs"], line


def test_a_plan_that_is_not_what_was_served_says_so_first(home: Path) -> None:
    with serving(StoreConfig(home=str(home), log_prompts=True, **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        assert engine.plan(FIRST).declined == "empty_store"
        first = engine.save(FIRST)
        engine.serve(SECOND)
        given_up = engine.plan(SECOND)
        client.finish(given_up.lease, Outcome(failed="aborted", cached=64, recomputed=136))
        then = f"Then: 196 tokens from {str(first)[:12]}, 4 recomputed. Now "
        assert asked_again(home, "2") == ("", then + "the same:")
        assert asked_again(home, "2", "--policy", "exact") == (
            "policy", then + "another plan, under another policy:")  # fmt: skip
        assert asked_again(home, "3") == ("outcome", (
            "Then: nothing reused (aborted), 64 from the engine's prefix cache, 136 recomputed. "
            "The plan, whose rows were not used then:"))  # fmt: skip
        engine.save([*SECOND[:150], *range(40)])
        others = "another plan, since the store holds other prompts:"
        assert asked_again(home, "2") == ("donors", then + others)
        engine.save([*FIRST, 5])
        nothing = "Then: nothing reused (empty_store), 200 recomputed. Now "
        assert asked_again(home, "1") == ("donors", nothing + others)


def test_a_request_is_planned_again_under_the_policy_that_it_got(tmp_path: Path) -> None:
    """Not under the one that its class has now."""
    home = tmp_path / "home"
    asked = {"home": str(home), "log_prompts": True, **SMALL}
    with serving(StoreConfig(**asked)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        engine.save(FIRST)
        ask = plan_request(np.asarray(SECOND, np.int32), SPACE, "faithful", "chat-1")
        plan = msgspec.convert(client.receive(client.send(ask), 20.0), ReusePlan)
        client.finish(plan.lease, Outcome(plan.exact, plan.reused - plan.exact, 200 - plan.reused))
        found = as_json("explain", "--request", "chat-1", "--home", home)
        assert (found["explanation"]["policy"], found["differs"]) == ("faithful", "")


def test_what_a_bound_took_away_is_called_so_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    bound = StoreConfig(home=str(home), quality_bound=1e-9, log_prompts=True, **SMALL)
    with serving(bound), Client(home) as client:
        ClientDriver(client, SPACE).save(FIRST)
        assert client.plan([7, 8, *FIRST[2:]], SPACE).declined == "quality_bound"
        found = as_json("explain", "--request", "1", "--home", home)
        assert (found["explanation"]["declined"], found["differs"]) == ("quality_bound", "")


def test_a_repeated_prompt_shows_the_prompt_that_served_it(home: Path) -> None:
    with serving(StoreConfig(home=str(home), log_prompts=True, **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        engine.serve(FIRST)
        found = as_json("explain", "--request", "1", "--home", home)["explanation"]
        assert [one["node"] for one in found["candidates"]] == [first]


# --- diff, ls, evict ------------------------------------------------------------------------------


def test_the_edits_between_two_prompts(served: Served) -> None:
    home, (first, second, _) = served
    code, out, err = run("diff", first, second, "--home", home)
    assert (code, err) == (1, "")
    assert "197 tokens in common (98.5 % of the second), 3 removed, 3 added" in out
    assert "[-1080 1081 1082-]{+7 8 9+}" in out
    assert run("diff", first, first, "--home", home)[0] == 0
    code, out, _ = run("diff", first, second, "--json", "--home", home)
    assert [edit["kind"] for edit in json.loads(out)["edits"]] == ["keep", "replace", "keep"]


def test_what_is_evicted_and_what_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        plan = engine.serve(SECOND)
        second = engine.save(SECOND, plan)
        other = ClientDriver(client, SPACE.for_tenant("alice"), engine.book).save(FIRST)
        assert first and second and other  # noqa: PT018
        ok("pin", other, "--home", home)
        out = ok("ls", "--home", home)
        assert "⚑" in out
        assert "alice" in out
        assert "name what to evict" in one_line(run("evict", "--home", home), 2)
        assert "unknown policy 'lax'" in one_line(
            run("evict", "--policy", "lax", "--home", home), 2
        )
        assert "no namespace is of that tenant" in one_line(
            run("evict", "--tenant", "allice", "--yes", "--home", home), 5
        )
        out = ok("evict", "--tenant", "alice", "--yes", "--home", home)
        assert out == "Forgot 0 nodes (0 tokens; 1 pinned stays).\n"
        assert ok("evict", "--older-than", "1h", "--yes", "--home", home).startswith("Forgot 0")
        out = ok("evict", "--policy", "aggressive", "--dry-run", "--home", home)
        assert out.splitlines() == [second[:12], "Would forget 1 node (200 tokens)."]
        assert run("evict", first, "--home", home)[0] == 1  # no outcome is reported
        assert len(client.call(ListNodes())) == 3
        assert as_json("evict", first, "--yes", "--home", home)["nodes"] == [first]
        assert {node["id"] for node in client.call(ListNodes())} == {second, other}
    with Store(StoreConfig(home=str(home), **SMALL)) as store:
        assert {node.id for node in store.tree} == {second, other}
    ok("unpin", other, "--home", home)
    assert ok("evict", "--older-than", "0s", "--yes", "--home", home).startswith("Forgot 2")


def test_the_prompts_of_one_tenant_are_listed(served: Served) -> None:
    home, (first, second, third) = served
    listed = as_json("ls", "--tenant", "alice", "--home", home)
    assert [(node["id"], node["tenant"]) for node in listed] == [(third, "alice")]
    nobodys = as_json("ls", "--tenant", "", "--limit", "2", "--home", home)
    assert {node["id"] for node in nobodys} == {first, second}
    assert as_json("ls", "--tenant", "alice", "--pool", "house", "--home", home) == []
    assert "shows all" not in ok("ls", "--tenant", "alice", "--home", home)
    for command in (["ls"], ["export", home / "archive"]):
        ran = run(*command, "--tenant", "allice", "--home", home)
        assert "no namespace is of that tenant" in one_line(ran, 5)


def test_a_daemon_of_the_release_before_lists_no_other_tenants(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = as_json("ls", "--home", served[0])

    def older(message: Any) -> Any:
        return every if isinstance(message, ListNodes) else {"nodes": len(every)}

    monkeypatch.setattr("kvshare_store.cli.ls.answering", lambda _: nullcontext(older))
    listed = as_json("ls", "--tenant", "alice", "--home", served[0])
    assert [node["id"] for node in listed] == [served[1][2]]
    assert ok("ls", "--tenant", "allice", "--home", served[0]).startswith("No nodes of that tenant")


def test_what_a_purge_would_remove(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        kept = ClientDriver(client, SPACE.for_tenant("alice")).save(FIRST)
        out = ok("purge", "--tenant", "alice", "--dry-run", "--home", home)
        assert out.startswith("Would remove 1 node and ")
        assert out.endswith(" blocks of 1 namespace (org/model).\n")
        assert [node["id"] for node in client.call(ListNodes())] == [kept]


def test_a_pool_is_listed_explained_and_purged(home: Path) -> None:
    """Offline. Requests without a tenant are not meant with it."""
    with Store(StoreConfig(home=str(home), **SMALL)) as store:
        template = Driver(store, SPACE.in_pool("house")).save(FIRST)
        other = Driver(store, SPACE).save(SECOND)
    assert [node["id"] for node in as_json("ls", "--pool", "house", "--home", home)] == [template]
    assert {node["pool"] for node in as_json("ls", "--home", home)} == {"", "house"}
    assert "house" in ok("ls", "--home", home)
    assert "pool house" in ok("show", str(template), "--home", home)
    assert ok("ls", "--pool", "none", "--home", home).startswith("No nodes of pool none in ")
    (home / "tokens").write_text(json.dumps([*FIRST, 1]))
    asked = ("explain", home / "tokens", "--tokens", "--home", home, "--namespace")
    digest = SPACE.digest
    assert as_json(*asked, digest)["explanation"]["by_kind"]["exact"] == 80
    assert as_json(*asked, digest, "--pool", "house")["explanation"]["by_kind"]["exact"] == 200
    assert "no pool 'hoose'" in one_line(run(*asked, digest, "--pool", "hoose"), 1)
    assert "begin with" in one_line(run("purge", "--namespace", "ff", "--home", home), 5)
    assert "--pool" in one_line(run("purge", "--pool", "a", "--tenant", "b", "--home", home), 2)
    assert ok("purge", "--pool", "house", "--yes", "--home", home).startswith("Removed 1 node and")
    assert [node["id"] for node in as_json("ls", "--home", home)] == [other]
    assert "pool" in one_line(run("purge", "--pool", "house", "--home", home), 5)


def test_a_purge_of_a_lineage(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        second = engine.save(SECOND, engine.serve(SECOND))
        other = engine.save(list(range(5000, 5100)))
        assert first and second and other  # noqa: PT018
        assert "takes both" in one_line(run("purge", first, "--home", home), 2)
        both = run("purge", first, "--lineage", "--tenant", "alice", "--home", home)
        assert "name what to purge" in one_line(both, 2)
        out = ok("purge", first[:12], "--lineage", "--dry-run", "--home", home)
        assert out.splitlines()[:2] == [first[:12], second[:12]]
        assert out.splitlines()[2].startswith("Would remove 2 nodes and ")
        (done,) = as_json("purge", first, "--lineage", "--yes", "--home", home)
        assert (done["nodes"], done["ids"], done["unsure"]) == (2, [first, second], 0)
        assert [node["id"] for node in client.call(ListNodes())] == [other]
    out = ok("purge", other, "--lineage", "--yes", "--home", home)  # the daemon is gone
    assert out.startswith("Removed 1 node and ")
    assert "nodes begin with" in one_line(run("purge", other, "--lineage", "--home", home), 1)


def test_the_list_of_nodes_knows_whose_parent_is_gone(home: Path) -> None:
    with serving(StoreConfig(home=str(home), **SMALL)), Client(home) as client:
        engine = ClientDriver(client, SPACE)
        first = engine.save(FIRST)
        engine.save(SECOND, engine.serve(SECOND))
        assert first is not None
        assert {node["parent_stored"] for node in as_json("ls", "--home", home)} == {True}
        ok("evict", first, "--yes", "--home", home)
        assert [node["parent_stored"] for node in as_json("ls", "--home", home)] == [False]
        assert f"{first[:12]} gone" in ok("ls", "--home", home)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), ("7d", 604_800)]
)
def test_ages(text: str, seconds: float) -> None:
    assert evict.parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1y"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(ConfigError, match="older-than"):
        evict.parse_age(text)


# --- export and import ----------------------------------------------------------------------------


def test_prompts_move_from_a_daemon_to_an_offline_home(
    served: Served, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    there, ids = served
    out = ok("export", "a.kv", "--home", there)
    assert out.startswith("3 nodes and ")
    assert f"are in {tmp_path / 'a.kv'} (" in out
    assert run("export", "a.kv", "--home", there)[0] == 1  # no outcome is reported
    typo = run("export", "c.kv", "--tenant", "allice", "--home", there)
    assert "no namespace is of that tenant" in one_line(typo, 5)
    assert not (tmp_path / "c.kv").exists(), "a backup of nothing looks like one"
    assert as_json("export", "b.kv", "--tenant", "alice", "--home", there)["nodes"] == 1
    shutil.copy(tmp_path / "b.kv", tmp_path / "cut.kv")
    os.truncate(tmp_path / "cut.kv", 900)
    assert "is cut off" in one_line(run("import", "cut.kv", "--home", home), 1)
    assert not home.exists(), "a damaged archive leaves no store"
    made = run("import", "b.kv", "--home", home)
    assert made == (0, "1 new node, 0 were here.\n", f"{home} had no store: one was made.\n")
    assert [node["id"] for node in as_json("ls", "--home", home)] == [ids[2]]
    assert ok("import", "a.kv", "--home", home) == "2 new nodes, 1 were here.\n"
    assert {node["id"] for node in as_json("ls", "--home", home)} == set(ids)
    (tmp_path / "a.kv").write_bytes((tmp_path / "a.kv").read_bytes()[:-1])
    assert "is cut off" in one_line(run("import", "a.kv", "--home", home), 1)


# --- what is asked and what is printed ------------------------------------------------------------


def test_a_new_store_is_encrypted_where_a_key_is_given(
    served: Served, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    ok("export", tmp_path / "a.kv", "--home", served[0])
    monkeypatch.setenv("KEY", "ab" * 32)
    monkeypatch.setenv("KVSHARE_ENCRYPTION_KEY", "env:KEY")
    assert run("import", tmp_path / "a.kv", "--home", home)[0] == 0
    assert len(as_json("ls", "--home", home)) == 3
    monkeypatch.delenv("KVSHARE_ENCRYPTION_KEY")
    assert "encryption_key" in one_line(run("ls", "--home", home), 2)


def test_what_went_meanwhile_keeps_nothing_else_from_being_evicted(tmp_path: Path) -> None:
    answers = iter(({"nodes": ["a", "b", "c"], "tokens": 9, "pinned": []},))
    sent: list[tuple[str, ...]] = []

    def ask(message: Any) -> Any:
        sent.append(message.nodes)
        if "b" in message.nodes:
            raise NodeError("0 nodes begin with 'b'")
        return {"nodes": list(message.nodes), "tokens": 3 * len(message.nodes), "pinned": []}

    found = evict.forgotten(ask, next(answers)["nodes"])
    assert found == {"nodes": ["a", "c"], "tokens": 6, "pinned": []}
    many = [f"{at:04x}" for at in range(20_000)]
    sent.clear()
    assert evict.forgotten(ask, [n for n in many if "b" not in n])["pinned"] == []
    assert max(map(len, sent)) <= 1 << 14


def test_questions_are_no_part_of_the_answer(served: Served) -> None:
    home, (first, _, _) = served
    for command in (("evict", first), ("purge", first, "--lineage")):
        code, out, err = run(*command, "--json", "--home", home, answer="n\n")
        assert (code, out.strip()) == (1, "")  # the blank belongs to the cursor of a terminal
        assert "Remove" in err


def test_a_model_cannot_steer_the_terminal(served: Served) -> None:
    purged = {"nodes": 1, "blocks": 1, "unsure": 0, "model": "m\x1b[2J\u202e"}
    assert "\x1b" not in purge.counted([purged])
    assert "\u202e" not in purge.counted([purged])


def test_a_name_cannot_add_lines(driver: Open, home: Path, namespace: Namespace) -> None:
    """A tenant's name is what a client of the API has written."""
    forged = "ann)\nstored      7 years ago"
    for space in (namespace.for_tenant(forged), namespace.in_pool(forged)):
        engine = driver()
        node = Driver(engine.store, space, engine.book).save(FIRST)
        engine.store.close()
        assert "\nstored" not in ok("explain", "--node", str(node), "--home", home)
        assert "7 years ago" not in {
            line.removeprefix("stored").strip()
            for line in ok("show", str(node), "--home", home).splitlines()
        }


@pytest.mark.parametrize(
    "command", [("show", "\udcff"), ("ls", "--tenant", "\udcff"), ("ls", "--limit", "9" * 30)]
)
def test_what_no_message_can_hold(served: Served, command: tuple[str, ...]) -> None:
    one_line(run(*command, "--home", served[0]), 2)


@pytest.mark.parametrize(
    "command",
    [("purge", "--tenant", "a", "--wait", "601"), ("evict", "--older-than", "99999d"),
     ("top", "--interval", "1e12")],
)  # fmt: skip
def test_seconds_that_no_message_can_hold(served: Served, command: tuple[str, ...]) -> None:
    one_line(run(*command, "--home", served[0]), 2)


def test_a_terminal_that_cannot_show_a_sign_is_shown_another(served: Served) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main(["explain", "--node", served[1][1], "--home", str(served[0])])
    assert end.value.code == 0
    shown.seek(0)
    assert "?" in shown.read(), "an ellipsis, in this one"


def test_a_daemon_that_hangs_does_not_hang_a_command(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "Client", partial(Client, timeout=0.3))
    home.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(home / "kvshare.sock"))
        hanging.listen()
        for command in ("ls", "gc"):
            assert "did not answer" in one_line(run(command, "--home", home), 8)
