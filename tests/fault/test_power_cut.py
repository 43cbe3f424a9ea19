"""`flush` means durable: data that was not fsynced is dropped, and what a flush covered must
survive."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.needs import need
from tests.support.oracle import Driver, prompt
from tests.support.power_cut import MARK, Call, Disk, calls, command

pytestmark = pytest.mark.fault

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
SEEDS = range(1, 6)


def settings(home: Path) -> StoreConfig:
    """Settings of the recorded store, and of those that open what is left."""
    return StoreConfig(
        home=str(home), block_tokens=8, host_bytes=1 << 20, disk_bytes=1 << 24,
        min_prompt_tokens=8, min_saving_ms=0.0, semantic="never", gc_seconds=0.0,
        plan_deadline_ms=20_000.0,
    )  # fmt: skip


class Moment(NamedTuple):
    """A power cut: after how many calls, where the copy is, and what a flush has covered."""

    call: int
    copy: Path
    kind: str
    covered: tuple[int, ...]


class Recording(NamedTuple):
    """The recording of the store's calls."""

    folder: Path
    calls: list[Call]
    moments: list[Moment]

    def of(self, kind: str) -> list[Moment]:
        """Power cuts right after a `flush`, or before the files of a `commit` are fsynced."""
        return [moment for moment in self.moments if moment.kind == kind]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One run of the store under strace."""
    need(shutil.which("strace") is not None, "strace")
    folder = tmp_path_factory.mktemp("power")
    (folder / "disk").mkdir()
    script = [sys.executable, "-m", "tests.fault.power_cut_store", str(folder)]
    subprocess.run([*command(folder / "calls"), *script], check=True, timeout=300)
    done = list(calls(folder / "calls"))
    moments = []
    for at, call in enumerate(done):
        if call.name == "mark" and call.paths and call.paths[0].startswith(MARK):
            number, kind, seeds = call.paths[0].removeprefix(MARK).split("/")
            covered = tuple(int(seed) for seed in seeds.split(",") if seed)
            moments.append(Moment(at, folder / "copies" / number, kind, covered))
    return Recording(folder, done, moments)


Left = Callable[..., tuple[list[int], dict[str, int]]]


@pytest.fixture
def left(recording: Recording, tmp_path: Path) -> Left:
    """`left(moment)`: the prompts that a store finds after a power cut then, and its errors.

    `without`: fsyncs of matching paths are ignored. `zeros`: lost bytes are zeros.
    """

    def find(
        moment: Moment, *, without: str = "(?!)", zeros: bool = False
    ) -> tuple[list[int], dict[str, int]]:
        root = recording.folder / "disk"
        disk = Disk(root)
        for call in recording.calls[: moment.call]:
            path = call.paths[0].removeprefix(str(root)) if call.paths else ""
            if call.name != "fsync" or not re.search(without, path):
                disk.do(call)
        target = tmp_path / "left"
        shutil.rmtree(target, ignore_errors=True)
        disk.restore(moment.copy, target, zeros=zeros)
        with Store(settings(target / "home")) as store:
            engine = Driver(store, NAMESPACE)
            for seed in SEEDS:
                tokens = prompt(seed, 24)
                engine.book.write(tokens, engine.book.computed(tokens, 24, ""), range(24), 24)
            found = [seed for seed in SEEDS if engine.serve([*prompt(seed, 24), 5]).exact == 24]
            return found, store.stats()["errors"]

    return find


@pytest.mark.parametrize("zeros", [False, True], ids=["empty", "zeros"])
def test_what_a_flush_covered_survives_a_power_cut(
    recording: Recording, left: Left, zeros: bool
) -> None:
    """Every row of it, bit for bit, and nothing is torn."""
    assert len(recording.of("flush")) == 7
    for moment in recording.of("flush"):
        found, errors = left(moment, zeros=zeros)
        assert (found, errors) == (sorted(moment.covered), {}), moment


def test_a_power_cut_between_a_commit_and_its_fsyncs(recording: Recording, left: Left) -> None:
    """The store starts, and has everything that an earlier flush covered."""
    assert len(recording.of("commit")) > 7
    for at, moment in enumerate(recording.of("commit")):
        found, _ = left(moment, zeros=bool(at % 2))
        assert set(found) >= set(moment.covered), moment


NEEDED = {
    "of the folder above the home": r"^$",
    "of the home": r"^/home$",
    "of a block": r"^/home/tmp/",
    "of the folder of a block": r"^/home/blocks/..$",
    "of the folder of blocks": r"^/home/blocks$",
    "of the folder of tables": r"^/home/catalog$",
    "of a table": r"^/home/catalog/nodes.lance$",
    "of a file of rows": r"^/home/catalog/nodes.lance/data/.",
    "of the folder of these": r"^/home/catalog/nodes.lance/data$",
    "of a version": r"^/home/catalog/nodes.lance/_versions/.*manifest",
    "of the folder of versions": r"^/home/catalog/nodes.lance/_versions$",
    "of a mark of deleted rows": r"^/home/catalog/nodes.lance/_deletions/.",
    "of the folder of these marks": r"^/home/catalog/nodes.lance/_deletions$",
    "of namespaces": r"^/home/catalog/namespaces.lance/data/.",
}


@pytest.mark.parametrize("without", NEEDED.values(), ids=NEEDED)
def test_without_any_one_of_the_fsyncs_something_is_lost(
    recording: Recording, left: Left, without: str
) -> None:
    """Otherwise the tests above would prove nothing."""
    for moment in recording.of("flush"):
        found, errors = left(moment, without=without)
        if (found, errors) != (sorted(moment.covered), {}):
            return
    pytest.fail(f"nothing was lost without the fsyncs of {without}")
