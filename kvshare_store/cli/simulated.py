"""What both replays share: JSON output and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvshare_store.cli.common import print_json
from kvshare_store.errors import ConfigError, UnsupportedError

Points = dict[str, list[tuple[int, float]]]
"""Points of each line of a plot: number of requests, share of their tokens found so far."""

STDOUT = Path("-")


def write_json(path: Path, result: Any) -> None:
    """Write a result as JSON; `-` prints it. `ConfigError` if the file cannot be written."""
    if path == STDOUT:
        print_json(result)
        return
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def figure_class() -> Any:
    """Matplotlib's figure class; `UnsupportedError` if it is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional: `kvshare-store[plot]`
    except ImportError as error:
        raise UnsupportedError(
            "--plot needs a library: pip install 'kvshare-store[plot]'"
        ) from error
    return Figure


def draw(points: Points, title: str, path: Path) -> None:
    """The share of tokens found so far, a line for each policy; lines differ also without
    colour."""
    figure = figure_class()(figsize=(7, 4))
    axes = figure.subplots()
    styles = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "x"), ("-", "D"))
    for index, (name, line) in enumerate(points.items()):
        dashes, marker = styles[index % len(styles)]
        requests, rates = [number for number, _ in line], [100 * rate for _, rate in line]
        axes.plot(
            requests, rates, dashes, marker=marker, markevery=max(1, len(line) // 10),
            color="black", linewidth=1, markersize=4, label=name,
        )  # fmt: skip
    axes.set(xlabel="requests", ylabel="% of tokens found so far", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
