"""A real Prometheus reads a daemon and an engine's metrics, and is asked what the Grafana
dashboard asks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from kvshare_connectors.vllm.metrics import Tally, loads
from prometheus_client import CollectorRegistry, Counter, start_http_server

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from tests.connectors.vllm.registered import LABELS, registered
from tests.support.daemons import ClientDriver
from tests.support.documents import ROOT
from tests.support.judged import Judged
from tests.support.needs import need
from tests.support.oracle import prompt
from tests.support.page import CHILD, PARENT, World, world
from tests.support.prometheus import ask, missing, prometheus
from tests.support.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore")

BOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "kvshare.json").read_text())
MODEL, EVERYTHING = "demo", ".*"
WINDOW = "1m"
UNHEARD_OF = ("kvshare_part_failures_total",)
"""What has no series while no part of the daemon fails in a way that nobody expects."""
SEEN = (
    "kvshare_evicted_blocks_total", "kvshare_errors_total", "kvshare_namespace_tokens_total",
    'kvshare_scored_answers_total{policy!="control"}', "vllm:kvshare_tokens_total",
)  # fmt: skip
"""Counters that rise while they are watched."""
SETTINGS = {
    "quality_bound": 0.5, "second_look_control": 1.0, "gc_seconds": 0.2, "remote_write": "through",
}  # fmt: skip


def queries() -> Iterator[str]:
    """Every query, as Grafana would send it."""
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", WINDOW)
            yield re.sub(r"\$(model|instance)", EVERYTHING, query)


class Engine:
    """The metrics of an engine, counted by the connector's own classes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ours = registered(self.registry, MODEL, engines=1)
        self._theirs = [
            Counter(name, name, LABELS, registry=self.registry).labels(MODEL, "0")
            for name in ("vllm:prompt_tokens", "vllm:prefix_cache_hits")
        ]

    def serve(self) -> None:
        """Count a hit and a miss."""
        tally = Tally()
        for reused, reason in ((30, ""), (0, "no_donor")):
            tokens = {"exact": 0, "continued": 0, "edited": reused, "recomputed": 40 - reused}
            said = {f"kvshare.{name}": value for name, value in tokens.items()}
            tally.ended(said | {"kvshare.reason": reason}, computed=True)
            tally.looked_up(0.01)
        taken = tally.take()
        assert taken is not None
        self._ours.observe(taken.aggregate(loads([0.02])).to_dict(), 0)
        for counter in self._theirs:
            counter.inc(40)


def serve(made: World, number: int, question: str) -> None:
    """Two prompts of the daemon's world once more, as an engine asks for them, and a new one; an
    error; more prompts than the host tier has room for; answers that are scored."""
    with Client(made.daemon.config.home_path) as client:
        driver = ClientDriver(client, made.space)
        for text in (PARENT, CHILD):
            driver.finish(client.plan(made.tokens(text), made.space))
        driver.save(made.tokens(question * 8))
        client.call(protocol.Failed("lease"))
        for large in range(4):
            driver.save(prompt(10 * number + large, 5000))
            client.flush()
        judged = Judged(client, made.space.for_tenant("judged"))
        for day in range(8 * number, 8 * number + 8):
            text = made.tokens(PARENT.replace("3 May", f"{10 + day} June"))
            judged.answered(text, made.tokens(f" On day {day} we do."), request=f"chat-{day}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has seen requests come and go."""
    need(not missing(), missing())
    folder, engine = tmp_path_factory.mktemp("dashboard"), Engine()
    with ExitStack() as stack:
        made = stack.enter_context(world(folder, remote=f"file://{folder / 'remote'}", **SETTINGS))
        listening, thread = start_http_server(0, "127.0.0.1", engine.registry)
        stack.callback(thread.join)
        stack.callback(listening.server_close)
        stack.callback(listening.shutdown)
        targets = [made.url.removeprefix("http://"), f"127.0.0.1:{listening.server_port}"]
        engine.serve()  # a series that begins while it is watched has no rate yet
        serve(made, 0, "Do you sell bells? ")
        url = stack.enter_context(prometheus(folder, targets))
        until(lambda: len(ask(url, "up == 1")) == len(targets), 60.0)
        engine.serve()
        serve(made, 1, "Is the red one cheap? ")
        risen = " and ".join(f"sum(increase({name}[{WINDOW}])) > 0" for name in SEEN)
        until(lambda: ask(url, risen), 60.0)
        yield url


@pytest.mark.parametrize("query", list(queries()))
def test_a_query_finds_what_happened(server: str, query: str) -> None:
    found = ask(server, query)
    assert bool(found) != any(name in query for name in UNHEARD_OF)
    # controls are few: none may have been scored between two scrapes, and 0 / 0 is no number
    numbers = [one["value"][1] for one in found if one["metric"].get("policy") != "control"]
    assert all(math.isfinite(float(number)) for number in numbers), found


def test_the_numbers_are_those_of_the_requests(server: str) -> None:
    """An engine that reused 30 of 80 tokens."""
    (panel,) = (each for each in BOARD["panels"] if each["title"].startswith("Share of prompt"))
    query = panel["targets"][0]["expr"].replace("$__rate_interval", WINDOW)
    (share,) = ask(server, query.replace("$model", MODEL))
    assert float(share["value"][1]) == pytest.approx(30 / 40)


def test_variables_offer_what_there_is(server: str) -> None:
    for variable in BOARD["templating"]["list"]:
        if variable["type"] != "query":
            continue
        asked = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["definition"])
        assert asked is not None, variable
        assert {one["metric"][asked[2]] for one in ask(server, asked[1])}
