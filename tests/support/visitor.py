"""What a client asks of a daemon of another release. The release before runs this file as a
program, with its own client and its own `tests`: it uses nothing that only this release has.

    python visitor.py HOME OWN [FOUND ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.tensors.layout import KVLayout
from tests.support.chaos.rows import DescribedRows
from tests.support.daemons import ClientDriver
from tests.support.oracle import prompt

LENGTH = 320
SPACE = Namespace("model", KVLayout(2, 1, 16, "float32"), tenant="t")


def visit(home: Path, own: int, found: Iterable[int] = ()) -> None:
    """Read what others have stored, `found`, row by row; store a prompt, `own`, and an edit of it;
    look at them as people do."""
    with Client(home, timeout=60.0) as client:
        assert client.stats()["policy"] == "aggressive"
        engine = ClientDriver(client, SPACE, DescribedRows(SPACE))
        for number in found:
            exact(engine.serve(prompt(number, LENGTH)))
            exact(engine.serve(edited(number)))
        assert engine.serve(prompt(own, LENGTH)).exact == 0
        nodes = [engine.save(prompt(own, LENGTH))]
        plan = engine.serve(edited(own))
        assert plan.reused > LENGTH // 2, plan
        nodes.append(engine.save(edited(own), plan))
        client.flush()
        exact(engine.serve(prompt(own, LENGTH)))
        look(client, [str(node) for node in nodes])


def edited(number: int) -> list[int]:
    """A prompt with other words in its middle."""
    tokens = prompt(number, LENGTH)
    return [*tokens[:100], *prompt(1000 + number, 8), *tokens[108:]]


def exact(plan: ReusePlan) -> None:
    """All of a prompt that is stored is served, whether with edited rows or not."""
    assert plan.reused == LENGTH - 1, plan


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
