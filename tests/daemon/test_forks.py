"""A client's process forks: the connection stays with the parent, and the child opens its own."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator

import msgspec
import pytest

from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.plan import ReusePlan
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon
from tests.support.fuzz import small
from tests.support.oracle import prompt

pytestmark = pytest.mark.fault

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(small(str(tmp_path_factory.mktemp("forks")))) as running:
        yield running


@pytest.fixture
def engine(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[ClientDriver]:
    """A client that has stored the prompts 1 and 2 for a tenant of its own, and is connected."""
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as client:
        driver = ClientDriver(client, NAMESPACE.for_tenant(request.node.name))
        for seed in (1, 2):
            driver.save(prompt(seed, 64))
        yield driver


def forked(child: Callable[[], object]) -> int:
    """Fork a child that runs this and exits with code 0 if all went well; returns its process
    id."""
    with warnings.catch_warnings():  # LanceDB, unused here, warns about its threads
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        child()
        code = 0
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_parent_never_gets_its_childs_plan(daemon: Daemon, engine: ClientDriver) -> None:
    """Both ask while the daemon does not answer, and their requests have the same ids."""
    client = engine.client
    first, second = (as_tokens(prompt(seed, 64)) for seed in (1, 2))
    daemon.send(signal.SIGSTOP)
    assert ended(forked(lambda: client.send(plan_request(second, engine.namespace, None)))) == 0
    request = client.send(plan_request(first, engine.namespace, None))
    daemon.send(signal.SIGCONT)
    plan = msgspec.convert(client.receive(request, PATIENCE_S), ReusePlan)
    assert plan.exact == 63
    engine.book.check(prompt(1, 64), plan, engine.load(plan))


def test_parent_and_child_are_both_served(engine: ClientDriver) -> None:
    def serve(seed: int) -> None:
        for _ in range(50):
            assert engine.serve(prompt(seed, 64)).exact == 63

    child = forked(lambda: serve(2))
    serve(1)
    assert ended(child) == 0


def test_a_child_does_not_keep_what_its_parent_held(daemon: Daemon, engine: ClientDriver) -> None:
    assert engine.client.plan(prompt(1, 64), engine.namespace).lease
    reading, writing = os.pipe()

    def wait() -> None:
        os.close(writing)
        os.read(reading, 1)

    child = forked(wait)
    engine.client.close()
    with Client(daemon.config.home_path, timeout=PATIENCE_S) as other:
        deadline = time.monotonic() + PATIENCE_S
        while other.stats()["leases"]:
            assert time.monotonic() < deadline, "the child keeps the connection open"
            time.sleep(0.02)
        assert other.stats()["daemon"]["connections"] == 1
    os.close(writing)
    assert ended(child) == 0
    os.close(reading)


def test_the_end_of_a_child_ends_nothing_of_its_parents(
    daemon: Daemon, engine: ClientDriver
) -> None:
    plan = engine.client.plan(prompt(1, 64), engine.namespace)
    assert ended(forked(engine.client.close)) == 0
    engine.book.check(prompt(1, 64), plan, engine.load(plan))
    assert engine.client.stats()["leases"] == 1
