"""The page `docs/benchmarks/index.md`, made from the JSON of the measurements."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.result import APART, Result, presets, read, text

_HEAD = """# Measurements

Made by `python -m benchmarks report` from the JSON files beside it; every number on it was measured
by the command printed under it, with the `.venv` of `make setup` and, for `lmcache`, `semblend` and
GPTCache, after `make bench-setup`: `OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m benchmarks run …`.
`make bench` runs short forms, which never take the place of a full result on this page. Where the
data comes from: [data.md](data.md).

"""


class ReportError(RuntimeError):
    """There is nothing to report."""


def report(folder: Path, order: Sequence[str]) -> Path:
    """Write the page for the results in `folder`; `order`: names of the measurements.

    `ReportError` if there are none. Measurements without a result are named as missing.
    """
    results = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    if not results:
        raise ReportError(f"no results in {folder}: run `python -m benchmarks run NAME` first")
    known = [results[name] for name in order if name in results]
    known += [results[name] for name in results if name not in order]
    missing = [name for name in order if name.removesuffix(APART) not in results]
    path = folder / "index.md"
    sections = (section(result, folder) for result in known)
    page = _HEAD + targets(known) + _missing(missing) + "".join(sections)
    path.write_text(page.rstrip() + "\n", encoding="utf-8")
    return path


def targets(results: Iterable[Result]) -> str:
    """The table of targets, reached and missed."""
    rows = [
        (what, measured, "reached" if reached else "**missed**", _linked(result))
        for result in results
        for what, measured, reached in result.targets
    ]
    if not rows:
        return ""
    missed = sum(row[2] != "reached" for row in rows)
    head = f"## Targets\n\n{len(rows) - missed} reached, {missed} missed.\n\n"
    return head + table(("target", "measured", "", "measurement"), rows) + "\n"


def _linked(result: Result) -> str:
    return f"[{result.name}](#{result.name})" + (" (*other settings*)" if _outdated(result) else "")


def section(result: Result, folder: Path) -> str:
    """One measurement: the paper's numbers, ours, the plot, sample size, noise and machine."""
    parts = [f"## {result.name}", f"**{result.title}**"]
    if result.short:
        parts.append("*Short form: fewer samples and settings than the full measurement.*")
    elif " --n " in result.command:
        parts.append("*The sample size was given in the command.*")
    if old := _outdated(result):
        parts.append(old)
    if result.paper:
        parts.append(f"The paper: {result.paper}")
    rows = [[text(cell) for cell in row] for row in result.rows]
    parts.append(table(result.columns, rows).rstrip())
    if (folder / f"{result.name}.png").exists():
        parts.append(f"![{result.title}]({result.name}.png)")
    parts += _verdicts(result)
    if result.notes:
        parts.append("\n".join(f"- {note}" for note in result.notes))
    parts += [_small_print(result), f"```sh\n{result.command}\n```"]
    return "\n\n".join(parts) + "\n\n"


_USES_PRESETS = (
    "agents", "figure4", "ttft", "misses", "load", "conversations", "lmcache", "semblend", "steady",
    "table1", "table1-presets", "probes", "rag", "agreement", "agreement-presets",
    "agreement-turns",
)  # fmt: skip
"""Measurements whose numbers depend on what a policy recomputes."""
_OF_ONE_EDIT = (
    "table1", "table1-presets", "probes", "rag", "agreement", "agreement-presets",
)  # fmt: skip
"""Those whose donors are all computed in full: how many edits may build on one another is no matter
there."""
_GENERATIONS = re.compile(r"max_generation=\d+")


def _outdated(result: Result) -> str:
    """A warning if the presets have changed since the measurement."""
    if result.name not in _USES_PRESETS:
        return ""
    then, now = (_that_matter(result, of) for of in (result.policies, presets()))
    changed = [name for name, settings in now.items() if then.get(name) != settings]
    if not changed:
        return ""
    named = ", ".join(f"`{name}`" for name in changed)
    if not result.policies:
        return (
            "*Measured before the presets were written down with results: rows named after "
            f"{named} are of the settings of that day, not of today's.*"
        )
    return f"*Measured with other settings of {named} than today's.*"


def _that_matter(result: Result, policies: dict[str, str]) -> dict[str, str]:
    """The settings that a measurement depends on."""
    if result.name not in _OF_ONE_EDIT:
        return policies
    return {name: _GENERATIONS.sub("", settings) for name, settings in policies.items()}


def _verdicts(result: Result) -> list[str]:
    lines = [
        f"- {'Reached' if reached else '**Missed**'}: {what}: {measured}."
        for what, measured, reached in result.targets
    ]
    return ["\n".join(lines)] if lines else []


def _small_print(result: Result) -> str:
    sizes = ", ".join(f"{count:,} {what}" for what, count in result.n.items())
    return (
        f"n: {sizes}. Seed {result.seed}. Model: {result.model}. Noise floor: "
        f"{result.noise_floor}. Machine: {result.machine}. {result.date}, {result.seconds:.0f} s."
    )


def _missing(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"Not measured yet: {', '.join(f'`{name}`' for name in names)}.\n\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
