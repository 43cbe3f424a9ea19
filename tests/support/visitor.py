"""What a client asks of a daemon of another release. The release before runs this file as a
program, with its own client and its own `tests`: it uses nothing that only this release has.

    python visitor.py HOME OWN [FOUND ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Reuse
from kvshare_store.tensors.layout import KVLayout
from tests.support.chaos.rows import DescribedRows
from tests.support.daemons import ClientDriver
from tests.support.oracle import pick, prompt

LENGTH, ANSWER = 320, 48
SPACE = Namespace("model", KVLayout(2, 1, 16, "float32"), tenant="t")


def visit(home: Path, own: int, found: Iterable[int] = ()) -> None:
    """Read what others have stored, `found`, row by row; store a prompt, `own`, an edit of it, and
    answers to both; look at them as people do."""
    with Client(home, timeout=60.0) as client:
        assert client.stats()["policy"] == "aggressive"
        engine = ClientDriver(client, SPACE, DescribedRows(SPACE))
        for number in found:
            whole(engine.serve(answered(prompt(number, LENGTH))), exact=True)
            whole(engine.serve(answered(edited(number))), exact=False)
        assert engine.serve(prompt(own, LENGTH)).exact == 0
        assert engine.save(prompt(own, LENGTH))
        plan = engine.serve(edited(own))
        assert plan.reused > LENGTH // 2, plan
        assert engine.save(edited(own), plan)
        client.flush()
        nodes = [answer(engine, prompt(own, LENGTH)), answer(engine, edited(own))]
        client.flush()
        whole(engine.serve(answered(prompt(own, LENGTH))), exact=True)
        look(client, nodes)


def edited(number: int) -> list[int]:
    """A prompt with other words in its middle."""
    tokens = prompt(number, LENGTH)
    return [*tokens[:100], *prompt(1000 + number, 8), *tokens[108:]]


def answered(tokens: list[int]) -> list[int]:
    """A prompt with its answer."""
    return [*tokens, *prompt(sum(tokens), ANSWER)]


def whole(plan: ReusePlan, *, exact: bool) -> None:
    """All of a prompt that is stored is served, and as what it is."""
    assert plan.reused == plan.tokens - 1, plan
    assert (plan.exact == plan.reused) == (plan.generation == 0) == exact, plan


def answer(engine: ClientDriver, tokens: list[int]) -> str:
    """Store the answer to a prompt that is stored, on its rows as they are; the node's id."""
    plan = engine.serve(tokens)
    assert plan.reused == LENGTH - 1, plan
    reuse = Reuse(generation=plan.generation, policy=plan.policy, contexts=plan.contexts)
    told = np.asarray(answered(tokens), np.int32).tobytes()
    staged = engine.client.stage_bytes(told, SPACE, reuse, extends=LENGTH)
    start = plan.contexts[0].start if plan.contexts else len(answered(tokens))
    rows = engine.book.computed(answered(tokens), start, staged.id)
    bounds = accumulate(staged.sizes, initial=LENGTH)
    blocks = [pick(rows, range(*run)) for run in pairwise(bounds)]
    node = engine.client.commit(staged, blocks)
    assert node is not None
    return node


def look(client: Client, nodes: list[str]) -> None:
    """What commands and the page ask for."""
    listed = {one["id"] for one in client.call(protocol.ListNodes(1000))}
    assert listed >= set(nodes)
    for node in nodes:
        assert client.call(protocol.ShowNode(node))["id"] == node
    assert client.call(protocol.HasNodes((*nodes, "ab" * 32))) == [True, True, False]
    assert client.call(protocol.Pin(nodes[0])) == nodes[0]
    assert client.call(protocol.Explain(node=nodes[1]))
    assert client.call(protocol.ListRequests())
    assert client.call(protocol.Settings())["policy"] == "aggressive"
    assert not client.call(protocol.CheckTree())["problems"]


if __name__ == "__main__":
    visit(Path(sys.argv[1]), int(sys.argv[2]), map(int, sys.argv[3:]))
