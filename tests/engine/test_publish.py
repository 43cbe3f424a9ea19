"""`kvshare publish`, and a real engine whose tenants build on what it has computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kvshare_connectors.vllm.templates import Filling, Template

from kvshare_store.daemon import protocol
from kvshare_store.errors import ConfigError, StorageError
from kvshare_store.nodes.edits import as_tokens
from tests.engine.harness import BLOCK, Engine, Fresh, kept_engine
from tests.support.short_model import short_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

POOLS = {
    "kvshare": {"policy": "aggressive", "pools": "annex, house"},
    "enable_prefix_caching": True,
}


class Pool(NamedTuple):
    """The engine, and what was published into the home that it uses."""

    engine: Engine
    file: Path
    template: list[int]
    longer: list[int]

    def publish(self, *lines: dict[str, Any]) -> Any:
        """Run the command; returns what it has printed, and nothing but that."""
        self.file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        command = [
            sys.executable, "-m", "kvshare_store.cli.main", "publish", str(self.file), "--json",
            "--pool", "house", "--model", str(short_model()), "--home", str(self.engine.home),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
            "--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(64 << 20),
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    def nodes(self, **wanted: str) -> list[dict[str, Any]]:
        """Summaries of the nodes whose fields are these."""
        found = self.engine.client.call(protocol.ListNodes(1000))
        return [one for one in found if wanted.items() <= one.items()]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, fresh: Fresh) -> Iterator[Pool]:
    """A pool with two templates, of which one begins the other, and a conversation."""
    template = fresh(300)
    made = Pool(
        kept_engine(tmp_path_factory, **POOLS),
        tmp_path_factory.mktemp("templates") / "templates.jsonl",
        template,
        [*template, *fresh(100)],
    )
    said = made.publish(
        {"tokens": made.template},
        {"tokens": made.longer},
        {"messages": [{"role": "system", "content": "You answer for a bike shop. " * 20}]},
    )
    assert (said["pool"], said["removed"]) == ("house", 0)
    kept = {node["id"]: node["tokens"] for node in made.nodes(pool="house")}
    assert [kept[one["node"]] for one in said["templates"]][:2] == [300, 400]
    assert {one["node"]: one["tokens"] for one in said["templates"]} == kept
    assert all(one["stored"] for one in said["templates"])
    yield made
    made.engine.check_idle()


def test_templates_are_exact_pinned_and_of_nobody(pool: Pool) -> None:
    nodes = pool.nodes(pool="house")
    assert len(nodes) == 3
    assert sorted(node["tokens"] for node in nodes)[1:] == [300, 400]
    for node in nodes:
        assert (node["tenant"], node["generation"], node["pinned"]) == ("", 0, True)
        assert node["exact_rows"] == node["tokens"]
    blocks = [pool.engine.client.call(protocol.ShowNode(node["id"]))["blocks"] for node in nodes]
    users = [block["users"] for each in blocks for block in each]
    assert max(users) == 2, "the longer template is built on the shorter one"


@pytest.mark.parametrize("salt", ["ann", "bob", None])
def test_each_tenant_begins_with_the_rows_of_the_template(
    pool: Pool, fresh: Fresh, salt: str | None
) -> None:
    engine = pool.engine
    prompt = [*pool.longer, *fresh(40)]
    answer = engine.store(prompt, salt=salt)
    assert (answer.said["exact"], answer.said["recomputed"]) == (400, 40)
    assert answer.said["donor"] in {node["id"] for node in pool.nodes(pool="house")}
    assert answer.agrees(engine.ask(prompt, policy="off", salt=f"{salt} in full"))
    (own,) = pool.nodes(tenant=salt or "", pool="")
    assert own["exact_rows"] == own["tokens"] >= 440
    shown = engine.client.call(protocol.ShowNode(own["id"]))
    assert {block["users"] for block in shown["blocks"]} == {1}, "its blocks are its own"
    assert not own["parent"]


def test_the_next_request_of_a_tenant_uses_its_own_rows(pool: Pool, fresh: Fresh) -> None:
    engine, prompt = pool.engine, [*pool.template, *fresh(40)]
    engine.store(prompt, salt="eve")
    engine.forget()
    again = engine.store([*prompt, *fresh(20)], salt="eve")
    assert again.said["exact"] >= 340
    assert again.said["donor"] in {node["id"] for node in pool.nodes(tenant="eve")}


def test_a_template_elsewhere_in_a_prompt_is_edited(pool: Pool, fresh: Fresh) -> None:
    engine, prompt = pool.engine, [*fresh(40), *pool.template, *fresh(20)]
    answer = engine.store(prompt, salt="fay")
    assert answer.said["edited"] > 200
    nodes = pool.nodes(tenant="fay")
    assert [node["generation"] for node in nodes] == [1]
    following = [*prompt, *answer.tokens[:-1], *fresh(20)]
    cached = engine.ask(following, salt="fay")
    assert cached.said["prefix_cached"] > 200
    engine.forget()
    again = engine.ask(following, salt="fay")
    assert again.said["continued"] >= len(prompt) - 40
    assert again.agrees(cached), "the rows that were stored are those that were used"


def test_a_request_may_decline_and_no_more(pool: Pool, fresh: Fresh) -> None:
    engine, prompt = pool.engine, [*pool.template, *fresh(40)]
    declined = engine.store(prompt, salt="gil", params={"kvshare.pools": False})
    assert (declined.said["reused"], declined.said["reason"]) == (0, "empty_store")
    allowed = engine.ask(prompt, salt="hal", params={"kvshare.pools": True})
    assert allowed.said["exact"] == 300
    for mistake in ("house", ["house"], 1, None):
        answer = engine.ask(prompt, salt="ian", params={"kvshare.pools": mistake})
        assert answer.said["reason"] == "unknown_parameter"
        assert answer.said["unknown"] == ["kvshare.pools"]


@pytest.mark.parametrize("salt", ["house", "annex"])
def test_a_salt_that_spells_a_pool_is_a_tenant(pool: Pool, fresh: Fresh, salt: str) -> None:
    before = {node["id"] for node in pool.nodes(pool="house")}
    prompt = fresh(80)
    pool.engine.store(prompt, salt=salt)
    assert {node["id"] for node in pool.nodes(pool="house")} == before
    assert pool.engine.ask(prompt, salt="jon").said["reused"] < 8, "what begins alike by chance"
    assert len(pool.nodes(tenant=salt, pool="")) == 1


@pytest.fixture
def filling(pool: Pool) -> Iterator[Filling]:
    """What the command does, on an engine that serves: it can look and remove, and adds nothing."""
    with Filling(pool.engine.llm, "house") as made:
        yield made


@pytest.mark.parametrize("count", [31, 2048])
def test_templates_that_the_engine_cannot_take(filling: Filling, count: int) -> None:
    assert len(filling.tokens(1, Template(tokens=[7] * 32))) == 32
    assert len(filling.tokens(1, Template(prompt="a word and another " * 20))) > 32
    with pytest.raises(ConfigError, match="line 3 has"):
        filling.tokens(3, Template(tokens=[7] * count))
    with pytest.raises(ConfigError, match="line 4 has no tokens"):
        filling.tokens(4, Template(messages=[{"role": 7}]))


def test_what_the_file_no_longer_has_is_replaced(
    pool: Pool, filling: Filling, fresh: Fresh
) -> None:
    """Last, because it changes the pool. What is there is not computed again, and what should be
    there and is not is told."""
    templates = [as_tokens(pool.template), as_tokens(pool.longer)]
    assert [filling.store(template) for template in templates] == [False, False]
    assert filling.keep_only(templates) == 1
    assert sorted(node["tokens"] for node in pool.nodes(pool="house")) == [300, 400]
    assert len(set(filling.named(templates))) == 2
    assert filling.keep_only(templates[1:]) == 1
    assert filling.named(templates) == [node["id"] for node in pool.nodes(pool="house")] * 2
    assert [node["tokens"] for node in pool.nodes(pool="house")] == [400]
    assert pool.engine.ask([*pool.template, *fresh(40)], salt="kim").said["exact"] == 300
    with pytest.raises(StorageError, match="1 of 2 templates"):
        filling.check([templates[0], as_tokens(fresh(60))])
