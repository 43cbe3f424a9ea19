"""Three machines on Mooncake and S3: cut off, killed, and without a master.

Each machine is a daemon in a network namespace of its own; blocks go to one Mooncake Store, nodes
to one LanceDB catalogue on S3. Every row that is served is compared with the oracle.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvshare_store.daemon import protocol
from tests.support import waiting
from tests.support.cluster import Cluster, Machine
from tests.support.needs import need

pytestmark = [pytest.mark.fault, pytest.mark.slow]

PATIENCE_S = 60.0


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    need(not Cluster.missing(), Cluster.missing())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # restored when the test has ended
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def until(happens: Callable[[], object], what: str) -> float:
    return waiting.until(happens, PATIENCE_S, what)


def kinds_of(machine: Machine) -> set[str]:
    """The kinds of errors that its store has counted."""
    return set(machine.client.stats()["errors"])


def test_three_machines(cluster: Cluster) -> None:
    a, b, c = cluster.machines

    # what one computes, the others reuse
    a.save(1)
    for machine in (b, c):
        until(lambda m=machine: m.serve(1) == 63, "what one computed the other must reuse")  # type: ignore[misc]

    # one is cut off: it works with what it has, the others work without it
    c.host.cut()
    assert c.serve(1) == 63, "its own memory needs no network"
    b.save(2)
    until(lambda: a.serve(2) == 63, "the others are not cut off")
    assert c.serve(2) == 0, "it answers while it is cut off"
    c.host.join()
    until(lambda: c.serve(2) == 63, "it catches up")

    # one is killed: all can use what it had committed
    a.save(3)
    a.daemon.send(signal.SIGKILL)
    until(lambda: b.serve(3) == 63, "what a dead machine committed is there")
    a.daemon.kill()
    a.start()
    until(lambda: a.serve(3) == 63, "it finds everything again")
    assert a.nodes() >= 3

    # the master is lost, and with it every block of the remote tier
    cluster.master.kill()
    for machine in (a, b, c):
        assert machine.serve(1) in (0, 63)  # from its own tiers, or a miss; never wrong rows
    b.forget_memory()
    assert b.serve(3) in (0, 63), "it answers while the master is gone"
    cluster.lender.kill()
    cluster.master.start()
    cluster.lender.start()

    # it comes back empty: prompts are saved and shared again
    def shared_again() -> bool:
        a.save(4)
        return b.serve(4) == 63

    until(shared_again, "reuse recovers")
    for machine in (a, b, c):
        until(lambda m=machine: m.leases() == 0, "a lease is left")  # type: ignore[misc]


def test_a_remote_that_hangs_costs_no_more_than_the_deadline(cluster: Cluster) -> None:
    a, b, _ = cluster.machines
    a.save(1)
    until(lambda: b.nodes() == 1, "the node is known")
    cluster.lender.pause()
    cluster.master.pause()
    try:
        for _ in range(4):
            assert b.plan(1).declined == "not_resident", "answered while the remote says nothing"
            assert b.client.call(protocol.Stats())["lookups"], "the daemon answers"
        until(lambda: kinds_of(b) & {"timeout"}, "the read ended by the deadline")
        assert kinds_of(b) <= {"timeout", "unavailable"}, "no answer of the remote ended it"
    finally:
        cluster.master.resume()
        cluster.lender.resume()

    def comes_back() -> bool:
        a.save(1)  # a node whose rows could not be read is forgotten, and saved again
        return b.serve(1) == 63

    until(comes_back, "it is read once the remote answers again")
