"""What a kill test has done, and what it has found."""

from __future__ import annotations

import logging
from collections import Counter

from rich.console import Console
from rich.table import Table

log = logging.getLogger("kvshare.chaos")

_SHOWN = 10


class Report:
    """Counters, and every finding as text."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kills: Counter[str] = Counter()
        self.requests = 0
        self.hits = 0
        self.rows = 0
        self.refused: Counter[str] = Counter()
        """Errors that clients treated as a miss, counted by kind."""
        self.durable = 0
        """Number of nodes that clients were told are durable."""
        self.seconds = 0.0
        self.where = ""
        """The current step, which findings mention."""
        self.wrong_rows: list[str] = []
        self.lost_nodes: list[str] = []
        self.leaks: list[str] = []
        self.problems: list[str] = []

    def wrong(self, what: str) -> None:
        """Note a wrong row that was served."""
        self._note(self.wrong_rows, what)

    def lose(self, what: str) -> None:
        """Note a durable node that is missing."""
        self._note(self.lost_nodes, what)

    def leak(self, what: str) -> None:
        """Note something that is held although nothing uses it."""
        self._note(self.leaks, what)

    def problem(self, what: str) -> None:
        """Note any other error."""
        self._note(self.problems, what)

    def _note(self, findings: list[str], what: str) -> None:
        findings.append(f"{self.where}: {what}")
        log.warning("found: %s", findings[-1])  # the run may take another hour

    @property
    def findings(self) -> list[str]:
        """All findings."""
        return [*self.wrong_rows, *self.lost_nodes, *self.leaks, *self.problems]

    def print(self, console: Console) -> None:
        """A table of the counters, and the first findings below it."""
        table = Table(show_header=False, title=f"kill test, seed {self.seed}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        refused = ", ".join(f"{count} {kind}" for kind, count in sorted(self.refused.items()))
        for name, value in (
            ("kills", f"{self.kills.total():,} ({kinds})"),
            ("requests served", f"{self.requests:,}"),
            ("hits", f"{self.hits:,}"),
            ("rows compared", f"{self.rows:,}"),
            ("wrong rows", f"{len(self.wrong_rows):,}"),
            ("nodes told durable", f"{self.durable:,}"),
            ("nodes lost", f"{len(self.lost_nodes):,}"),
            ("leases, saves, files left", f"{len(self.leaks):,}"),
            ("other problems", f"{len(self.problems):,}"),
            ("misses by error", refused or "none"),
            ("seconds", f"{self.seconds:.0f}"),
        ):
            table.add_row(name, value)
        console.print(table)
        for finding in self.findings[:_SHOWN]:
            console.print(finding, markup=False)
        if len(self.findings) > _SHOWN:
            console.print(f"… and {len(self.findings) - _SHOWN} more", markup=False)
