"""The commands: `python -m benchmarks run NAME --data DIR`, `report`, `fetch SET --to DIR`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.result import APART, Options, run

MEASUREMENTS: dict[str, str] = {
    "figure2": "paper.figure2",
    "figure4": "paper.figure4",
    "ttft": "latency.ttft",
    "shapes": "latency.model_shapes",
    "load": "latency.load",
    "answers": "latency.answers",
    "second-look": "latency.second_look",
    "score-cost": "latency.score_cost",
    "settled-turns": "latency.settled_turns",
    "conversations": "peers.conversations",
    "unchanged": "latency.unchanged",
    "misses": "latency.misses",
    "metrics": "latency.metrics_cost",
    "misses_store": "store.lookup_misses",
    "plans": "store.lookups",
    "lookups": "store.rewritten_lookups",
    "hostile": "store.hostile",
    "clients": "store.clients",
    "page": "store.page",
    "steady": "store.steady_state",
    "eviction": "store.eviction",
    "agents": "store.agents",
    "tiers": "store.tiers",
    "async-files": "store.async_files",
    "codecs": "store.codecs",
    "startup": "store.startup",
    "metadata": "store.metadata",
    "pipelining": "store.pipelining",
    "machines": "store.across_machines",
    "scale": "store.cluster_scale",
    "lmcache": "peers.lmcache",
    "semblend": "peers.semblend",
    "table1": "paper.table1",
    "table1-presets": "paper.table1_presets",
    "probes": "quality.probes",
    "injected": "quality.injected",
    "injected-served": "quality.injected_served",
    "bound": "quality.bound",
    "rag": "quality.rag",
    "agreement": "quality.agreement",
    "agreement-presets": "quality.agreement_presets",
    "agreement-weights": "quality.agreement_weights",
    "agreement-tune": "quality.agreement_tune",
    "agreement-turns": "quality.agreement_turns",
    "learned": "quality.learned",
    "learned-pairs": "quality.learned_pairs",
    "learned-tune": "quality.learned_tune",
}
"""Name to module, in the order of the report. Each module has `measure` and may have `draw`."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Data = Annotated[Path, typer.Option(help="Folder with the data sets.", envvar="KVSHARE_DATA")]
Out = Annotated[Path, typer.Option(help="Where JSON and plots go.")]


@app.callback()
def main() -> None:
    """Measure what KVShare reports."""


def all_names(short: bool) -> list[str]:
    """All names; the short form skips measurements that repeat a part of another one."""
    return [name for name in MEASUREMENTS if not (short and name.endswith(APART))]


@app.command("run")
def run_one(
    names: Annotated[list[str], typer.Argument(help="Measurements, or `all`.")],
    data: Data,
    out: Out = Path("docs/benchmarks"),
    n: Annotated[int | None, typer.Option(help="Sample size.")] = None,
    seed: int = 0,
    model: Annotated[str | None, typer.Option(help="Hugging Face folder or name.")] = None,
    short: Annotated[bool, typer.Option(help="Fewer samples and settings.")] = False,
) -> None:
    """Run measurements; each prints a table and writes JSON and a plot."""
    wanted = all_names(short) if names == ["all"] else names
    unknown = [name for name in wanted if name not in MEASUREMENTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: choose from {', '.join(MEASUREMENTS)}")
    options = Options(data=data, out=out, n=n, seed=seed, model=model, short=short)
    if len(wanted) > 1:
        raise typer.Exit(_run_apart(wanted, options))
    (name,) = wanted
    module = import_module(f"benchmarks.{MEASUREMENTS[name]}")
    run(module.measure, getattr(module, "draw", None), options, _command(name, options))


def _run_apart(names: list[str], options: Options) -> int:
    """Run each measurement in its own process, so that a failure stops no other."""
    failed = []
    for name in names:
        words = shlex.split(_command(name, options))[1:]
        words[words.index("DATA")] = str(options.data)
        if subprocess.run([sys.executable, *words, "--out", str(options.out)]).returncode:
            failed.append(name)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
    return int(bool(failed))


@app.command("report")
def write_report(out: Out = Path("docs/benchmarks")) -> None:
    """Make `index.md` from the JSON files in a folder."""
    from benchmarks.harness.report import ReportError, report

    try:
        typer.echo(report(out, list(MEASUREMENTS)))
    except ReportError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(help="A data set.")],
    to: Annotated[Path, typer.Option(help="The folder that `--data` will name.")],
) -> None:
    """Download or unpack a data set into a folder."""
    from benchmarks.data.datasets import DataError
    from benchmarks.data.fetch import fetch

    try:
        typer.echo(f"{fetch(name, to):,} rows")
    except DataError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("prompts")
def write_prompts(
    data: Data,
    to: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    model: Annotated[str | None, typer.Option(help="Hugging Face folder or name.")] = None,
) -> None:
    """Recorded requests of agents, as a file for `kvshare simulate --prompts`."""
    from benchmarks.data import agents
    from benchmarks.data.datasets import DataError
    from benchmarks.harness.models import model_folder

    folder = model_folder(Options(data=data, model=model))
    try:
        recorded = agents.recorded(data)
    except DataError as error:
        raise typer.BadParameter(str(error)) from error
    agents.write(agents.prompts_of(recorded, agents.as_recorded(recorded), folder), to)


def _command(name: str, options: Options) -> str:
    """The command that repeats a measurement; the reader puts the data folder for `DATA`."""
    words = ["python", "-m", "benchmarks", "run", name, "--data", "DATA"]
    if options.n is not None:
        words += ["--n", str(options.n)]
    if options.seed:
        words += ["--seed", str(options.seed)]
    if options.model is not None:
        words += ["--model", options.model]
    if options.short:
        words += ["--short"]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(app())
