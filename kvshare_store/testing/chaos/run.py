"""So many kills from one seed, over as many homes as that takes."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvshare_store.testing.chaos.driver import Trial
from kvshare_store.testing.chaos.processes import ChaosError
from kvshare_store.testing.chaos.remotes import RemoteServer, remote_server
from kvshare_store.testing.chaos.report import Report
from kvshare_store.testing.chaos.variants import variant

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
"""How often each is chosen, in relation to the others."""


class Deck:
    """Kinds in random order, each as often as its weight says before any comes again."""

    def __init__(self, chance: random.Random, weights: dict[str, int]) -> None:
        self._chance = chance
        self._weights = weights
        self._left: list[str] = []

    def draw(self) -> str:
        """The next kind."""
        if not self._left:
            self._left = [kind for kind, weight in self._weights.items() for _ in range(weight)]
            self._chance.shuffle(self._left)
        return self._left.pop()


def run(
    kills: int,
    seed: int,
    remote: str = "none",
    on_kill: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Kill at least `kills` processes; what was found is in the report.

    `seed` decides which stores are tried, what is asked of them and who dies in which order. At
    which instruction a process dies is the machine's choice.
    """
    report, chance, start = Report(seed), random.Random(seed), time.monotonic()
    deck = Deck(chance, _KINDS if remote == "none" else _KINDS | {"kill_remote": 4})
    with tempfile.TemporaryDirectory(prefix="kvshare-chaos-") as folder:
        trials = 0
        while report.kills.total() < kills:
            trials += 1
            place = Path(folder) / str(trials)
            place.mkdir()
            server = remote_server(remote, place, chance)
            try:
                if server is not None:
                    os.environ.update(server.environment)  # the auditor opens stores as well
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
    tried = variant(chance, folder / "home", **settings)
    report.where = f"store {folder.name} ({tried})"
    last = min(kills, report.kills.total() + _KILLS_A_HOME)
    trial = Trial(report, chance, tried, server)
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
