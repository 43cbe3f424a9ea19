"""Runs a given number of kills from one seed, over as many homes as needed."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.chaos.namespaces import possible
from tests.support.chaos.processes import ChaosError
from tests.support.chaos.remotes import RemoteServer, remote_server
from tests.support.chaos.report import Report
from tests.support.chaos.uncommon import UncommonTrial
from tests.support.chaos.variants import variant

_KILLS_A_HOME = 10
_KINDS = {
    "kill_daemon": 6,
    "kill_at_start": 2,
    "kill_both": 2,
    "kill_client": 3,
    "kill_lease_holder": 2,
    "kill_saver": 2,
    "freeze_client": 2,
}
"""Relative weight of each kind of kill."""
_WITH_REMOTE = {"kill_remote": 4}
_WITHOUT_REMOTE = {"upgrade": 1}
_WITH_NAMESPACES = {"kill_foreign_pid": 1, "share_path": 1}
_WITH_STRACE = {"cut_power": 1}


def kinds_of(remote: str) -> dict[str, int]:
    """The kinds that this machine can run, with their weights."""
    if remote != "none":
        return _KINDS | _WITH_REMOTE
    with_namespaces = _WITH_NAMESPACES if possible() else {}
    with_strace = _WITH_STRACE if shutil.which("strace") else {}
    return _KINDS | _WITHOUT_REMOTE | with_namespaces | with_strace


class Deck:
    """Kinds in random order: first each of them once, then the others, until each has occurred as
    often as its weight and the round begins again."""

    def __init__(self, chance: random.Random, weights: dict[str, int]) -> None:
        self._chance = chance
        self._weights = weights
        self._left: list[str] = []

    def draw(self) -> str:
        """The next kind."""
        if not self._left:
            again = [kind for kind, weight in self._weights.items() for _ in range(weight - 1)]
            once = list(self._weights)
            self._chance.shuffle(again)
            self._chance.shuffle(once)
            self._left = again + once
        return self._left.pop()


def run(
    kills: int,
    seed: int,
    remote: str = "none",
    on_kill: Callable[[Report], None] = lambda report: None,
    first: Path | None = None,
) -> Report:
    """Kill at least `kills` processes; findings are in the report.

    `seed` decides which stores are tried, what they are asked, and the order of the kills. The
    exact instruction at which a process dies is up to the machine. `first`: an unencrypted home;
    the first store begins as a copy of it.
    """
    report, chance, start = Report(seed), random.Random(seed), time.monotonic()
    deck = Deck(chance, kinds_of(remote))
    with tempfile.TemporaryDirectory(prefix="kvshare-chaos-") as folder:
        trials = 0
        while report.kills.total() < kills:
            trials += 1
            place = Path(folder) / str(trials)
            place.mkdir()
            if first is not None and trials == 1:
                shutil.copytree(first, place / "home")
            server = remote_server(remote, place, chance)
            try:
                if server is not None:
                    os.environ.update(server.environment)  # the audit opens stores too
                    server.start()
                _try_one(report, chance, place, server, deck, kills, on_kill)
            except ChaosError as error:
                report.problem(str(error))
                break
            finally:
                if server is not None:
                    server.close()
    report.seconds = time.monotonic() - start
    return report


def _try_one(
    report: Report,
    chance: random.Random,
    folder: Path,
    server: RemoteServer | None,
    deck: Deck,
    kills: int,
    on_kill: Callable[[Report], None],
) -> None:
    settings = server.settings(chance) if server is not None else {}
    if (folder / "home").exists():
        settings["encryption_key"] = ""
    tried = variant(chance, folder / "home", **settings)
    report.where = f"store {folder.name} ({tried})"
    last = min(kills, report.kills.total() + _KILLS_A_HOME)
    trial = UncommonTrial(report, chance, tried, server)
    try:
        trial.begin()
        while report.kills.total() < last:
            trial.load()
            kind = deck.draw()
            report.where = f"store {folder.name} ({tried}), {kind} {report.kills.total() + 1}"
            getattr(trial, kind)()
            on_kill(report)
        trial.end()
    finally:
        trial.close()
