"""Three machines on one remote and one catalogue: what one has committed must not get lost.

    python -m tests.support.chaos.machines --steps 500 --seed 1

Each step is drawn from `STEPS`. After every few steps a fourth machine opens with empty tiers of
its own. It must be served every prompt that was committed and not removed on request.
docs/design/chaos.md says which fault each kind of step finds.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tests.support.chaos.counting import counting
from tests.support.chaos.machine_steps import STEPS
from tests.support.chaos.site import Site

_AUDIT_EVERY = 8


def run(
    folder: Path,
    steps: int,
    seed: int,
    *,
    to_the_end: bool = True,
    count: Callable[[int, int], None] | None = None,
) -> Site:
    """Take `steps` steps, or stop at the first finding unless `to_the_end`. Findings are in the
    `findings` of the site, which is closed. `count` is told the steps taken and the findings."""
    with Site(folder, seed) as site:
        for number in range(1, steps + 1):
            (step,) = site.chance.choices(list(STEPS), list(STEPS.values()))
            with site.noting(f"step {number}, {step.__name__}"):
                step(site)
            site.done[step.__name__] += 1
            if number % _AUDIT_EVERY == 0 or number == steps:
                site.audit(f"step {number}, {step.__name__}")
            if count is not None:
                count(number, len(site.findings))
            if site.findings and not to_the_end:
                break
        return site


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps to take.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Repeat a run; else one is drawn.")] = None,
) -> None:
    """Let three machines work on one remote and one catalogue, and check that nothing is lost."""
    drawn = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    typer.echo(f"seed {drawn} (repeat with --seed {drawn})")
    folder = Path(tempfile.mkdtemp(prefix="kvshare-machines-"))
    try:
        with counting("steps", steps) as count:
            site = run(folder, steps, drawn, count=count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    typer.echo(", ".join(f"{count} {name}" for name, count in sorted(site.done.items())))
    typer.echo(f"{len(site.kept)} prompts kept at the end, {len(site.findings)} findings")
    for finding in site.findings[:10]:
        typer.echo(finding)
    raise typer.Exit(1 if site.findings else 0)


if __name__ == "__main__":
    typer.run(main)
