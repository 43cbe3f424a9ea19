"""The result of a measurement: a table, JSON for the report, samples, a plot."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil

from benchmarks.harness.plots import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None

SAMPLES = "samples"
"""The folder of samples beside the results."""
APART = "-presets"
"""Suffix of a measurement that repeats a part of another one with more samples."""


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    data: Path
    """Folder with the data sets; `docs/benchmarks/data.md` says where each comes from."""
    out: Path = Path("docs/benchmarks")
    """Where JSON and plots go."""
    n: int | None = None
    """Sample size (None: the measurement's own, or its short one)."""
    seed: int = 0
    model: str | None = None
    """Hugging Face folder or name (None: the small model)."""
    short: bool = False
    """Run with fewer samples and settings, in a minute or two."""

    def size(self, full: int, short: int) -> int:
        """The sample size that these options ask for."""
        return self.n or (short if self.short else full)


class MissingPartError(RuntimeError):
    """This machine lacks what a measurement needs."""


class Result(msgspec.Struct, kw_only=True):
    """One measurement. `name` is that of its command, its JSON and its plot."""

    name: str
    title: str
    n: dict[str, int]
    """Sample sizes by what was sampled: `{"prompts": 500, "hits": 212}`."""
    seed: int
    model: str
    """The model that computed the numbers; `none` for pure counts."""
    noise_floor: str
    """The result for full compute against itself, or why there is none."""
    columns: list[str]
    rows: list[list[Cell]]
    paper: str = ""
    """What the paper reports for the same thing, in a sentence."""
    notes: list[str] = []
    """Differences from the paper, failures, and other facts for the reader."""
    targets: list[tuple[str, str, bool]] = []
    """`(target, measured value, whether it was reached)`."""
    series: dict[str, Any] = {}
    """Samples that the plot or another measurement needs. They are written apart."""
    command: str = ""
    machine: str = ""
    date: str = ""
    seconds: float = 0.0
    short: bool = False
    policies: dict[str, str] = {}
    """The presets at the time of the measurement; `run` fills in the current ones."""


def presets() -> dict[str, str]:
    """The presets that measurements compare, spelled out."""
    from kvshare_store.lookup.policy import PRESETS

    return {name: str(PRESETS[name]) for name in ("faithful", "balanced", "aggressive")}


def machine() -> str:
    """The machine in words: processor, cores, memory, accelerator."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {psutil.cpu_count()} cores, {memory:.0f} GiB{_accelerator()}"


def _accelerator() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.get_device_name()}"


def run(
    measure: Callable[[Options], Result],
    draw: Callable[[Result], Figure] | None,
    options: Options,
    command: str,
) -> Result:
    """Measure, print the table, write the result (`write`)."""
    start = time.perf_counter()
    result = measure(options)
    result.seconds = time.perf_counter() - start
    result.command = command
    result.machine = machine()
    result.date = datetime.now(UTC).date().isoformat()
    result.short = options.short
    result.policies = result.policies or presets()
    show(result)  # first: what took an hour is not lost where it cannot be written
    kept = options.out / f"{result.name}.json"
    if options.short and kept.exists() and not read(kept).short:
        print(f"{kept} is of the full form and stays; use --out to keep this short one")
    else:
        write(result, draw, options.out)
    return result


def write(result: Result, draw: Callable[[Result], Figure] | None, out: Path) -> None:
    """Write what the report needs to `<name>.json`, a plot to `<name>.png` where there is something
    to draw, and the samples to `samples/<name>.json`, which is not kept in git."""
    samples = out / SAMPLES
    samples.mkdir(parents=True, exist_ok=True)
    (out / f"{result.name}.json").write_text(summary(result), encoding="utf-8")
    (samples / f"{result.name}.json").write_bytes(
        msgspec.json.encode(result.series, enc_hook=_plain)
    )
    if draw is not None:
        save(draw(result), out / f"{result.name}.png")


def summary(result: Result) -> str:
    """JSON of the result without its samples: a line for each field and each row of the table."""
    fields = msgspec.to_builtins(result, enc_hook=_plain)
    del fields["series"]
    lines = ",\n ".join(f"{_json(name)}: {_value(value)}" for name, value in fields.items())
    return "{\n " + lines + "\n}\n"


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"a result holds a {type(value).__name__}")


def _value(value: Any) -> str:
    """A list of texts or of rows has a line for each; everything else is on one line."""
    if not isinstance(value, list) or not value:
        return _json(value)
    return "[\n  " + ",\n  ".join(_json(item) for item in value) + "\n ]"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def read(path: Path) -> Result:
    """A result that was written before, with its samples where they still are."""
    result = msgspec.json.decode(path.read_bytes(), type=Result)
    samples = path.parent / SAMPLES / path.name
    if samples.exists():
        result.series = msgspec.json.decode(samples.read_bytes())
    return result


def text(cell: Cell) -> str:
    """A cell as text: three significant digits, `-` for None."""
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def show(result: Result) -> None:
    """Print the table, with sample size, noise floor, machine, notes and targets."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=result.title)
    for index, column in enumerate(result.columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in result.rows:
        table.add_row(*(text(cell) for cell in row))
    console = Console()
    console.print(table)
    sizes = ", ".join(f"{count} {what}" for what, count in result.n.items())
    console.print(f"n: {sizes} · seed {result.seed} · model {result.model}", markup=False)
    console.print(f"noise floor: {result.noise_floor}", markup=False)
    console.print(f"{result.machine} · {result.seconds:.0f} s", markup=False)
    for note in result.notes:
        console.print(f"- {note}", markup=False)
    for what, measured, reached in result.targets:
        verdict = "reached" if reached else "MISSED"
        console.print(f"{verdict}: {what}: {measured}", markup=False)
