"""`python -m tests.support.chaos`: kill, restart, compare; exits 1 if anything is wrong.

Every forked process inherits what is imported here, so this module imports little.
"""

from __future__ import annotations

import random
from typing import Annotated

import typer
from rich.console import Console


def main(
    n: Annotated[int, typer.Option("--n", min=1, help="Processes to kill.")] = 50,
    seed: Annotated[int | None, typer.Option(help="Repeat a run; else one is drawn.")] = None,
    remote: Annotated[str, typer.Option(help="none, file, redis, s3 or mooncake.")] = "none",
) -> None:
    """Kill daemons, clients and remotes at random moments and compare every row that is served."""
    from tests.support.chaos.counting import counting
    from tests.support.chaos.run import run

    drawn = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    console = Console()
    console.print(f"seed {drawn} (repeat with --seed {drawn})")
    with counting("kills", n) as count:
        report = run(
            n, drawn, remote, lambda so_far: count(so_far.kills.total(), len(so_far.findings))
        )
    report.print(console)
    raise typer.Exit(1 if report.findings else 0)


if __name__ == "__main__":
    typer.run(main)
