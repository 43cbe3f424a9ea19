"""Steady state: a working set larger than the host budget, and how reuse holds up over time."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.data.datasets import all_turns, sharegpt
from benchmarks.harness.models import model_folder, model_name, tokenized
from benchmarks.harness.plots import LINES
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.metadata_replay import ENGINE_BLOCK, MEASURED_TOKENS, block_names
from kvshare_store.blocks.tiers.host.arena import slot_bytes
from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig
from kvshare_store.errors import NoSpaceError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import Outcome
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REQUESTS, SHORT_REQUESTS = 2_000, 400
WINDOW = 100
SHARE = 4
"""The host budget is the working set divided by this."""
LONGEST = 1_024
"""Longest prompt in tokens, so that no prompt takes much of the budget."""
_PAUSE = 10
NAMESPACE = Namespace(model="steady", layout=KVLayout(1, 1, 16, "float32"))
"""Rows of 128 bytes: budgets work as with a real model, and memory stays small."""


class Stream(NamedTuple):
    """Requests in order, and the bytes that all their rows would take."""

    name: str
    prompts: list[Tokens]

    @property
    def working_set(self) -> int:
        """Bytes of every distinct prompt's rows: what an unbounded store would hold at most."""
        distinct = {prompt.tobytes(): len(prompt) for prompt in self.prompts}
        block = StoreConfig().block_tokens
        return sum(-(-n // block) for n in distinct.values()) * slot_bytes(
            block * NAMESPACE.layout.row_bytes
        )


def edited_repeats(texts: Sequence[Tokens], count: int, seed: int) -> Stream:
    """Requests whose reuse does not change by itself: a known text, one passage of it replaced.

    Every text has come by after `len(texts)` requests; then they are drawn evenly.
    """
    chance = np.random.default_rng(seed)
    prompts = []
    for at in range(count):
        base = texts[at] if at < len(texts) else texts[int(chance.integers(len(texts)))]
        other = texts[int(chance.integers(len(texts)))]
        cut = int(chance.integers(len(base) // 4, len(base) // 2))
        prompts.append(np.concatenate((base[:cut], other[-16:], base[cut + 8 :])))
    return Stream("edited repeats", prompts)


def in_order(texts: Sequence[Tokens], count: int) -> Stream:
    """ShareGPT as it comes."""
    return Stream("ShareGPT in order", list(texts[:count]))


class Served(NamedTuple):
    """Share of each request's tokens that was served, and what the store held in the end."""

    shares: list[float]
    nodes: int | None = None


def serve(stream: Stream, home: Path, host_bytes: int, *, disk: bool, name: str) -> Served:
    """Share of each request's tokens that a real store served; every prompt is saved after it.

    The store may write what is queued every `_PAUSE` requests: an engine takes longer for those.
    """
    config = StoreConfig(home=str(home), host_bytes=host_bytes, disk=disk, semantic="never")
    chance = np.random.default_rng(0)
    shares = []
    with Store(config) as store:
        for at, prompt in enumerate(track(stream.prompts, f"{stream.name}, {name}")):
            if at % _PAUSE == 0:
                store.flush()
            plan = store.plan(prompt, NAMESPACE)
            shares.append(plan.reused / len(prompt))
            if not plan.declined:
                edited = plan.reused - plan.exact
                store.finish(plan, Outcome(plan.exact, edited, len(prompt) - plan.reused))
            rows = chance.bytes((len(prompt) - plan.reused) * NAMESPACE.layout.row_bytes)
            try:
                store.save(prompt, NAMESPACE, rows, None if plan.declined else plan)
            except NoSpaceError:
                continue  # too large for what is free; the store counts it
        return Served(shares, len(store.tree))


def prefix_lru(stream: Stream, budget_bytes: int) -> list[float]:
    """An engine's prefix cache with as many bytes: blocks of 16, the least recently used go."""
    room = budget_bytes // (ENGINE_BLOCK * NAMESPACE.layout.row_bytes)
    blocks: OrderedDict[bytes, None] = OrderedDict()
    shares = []
    for prompt in stream.prompts:
        names = block_names(prompt, ENGINE_BLOCK, chained=True)
        hits = 0
        for name in names[: (len(prompt) - 1) // ENGINE_BLOCK]:
            if name not in blocks:
                break
            hits += 1
        shares.append(hits * ENGINE_BLOCK / len(prompt))
        for name in reversed(names):  # the end of a prompt goes before its beginning
            blocks[name] = None
            blocks.move_to_end(name)
        while len(blocks) > room:
            blocks.popitem(last=False)
    return shares


def measure(options: Options) -> Result:
    """Both streams through a store with room for all, one with a quarter, and with disk."""
    count = options.size(REQUESTS, SHORT_REQUESTS)
    texts = [
        tokens[:LONGEST]
        for tokens in tokenized(
            [turn.text for turn in all_turns(sharegpt(options.data, 2 * count))],
            model_folder(options),
        )
        if len(tokens) >= MEASURED_TOKENS
    ]
    bases = [text for text in texts if len(text) >= 2 * MEASURED_TOKENS][: count // SHARE]
    streams = (edited_repeats(bases, count, options.seed), in_order(texts, count))
    rows: list[list[Cell]] = []
    series = {}
    sizes = {}
    for stream in streams:
        sizes[f"requests ({stream.name})"] = len(stream.prompts)
        budget = stream.working_set // SHARE
        for name, (shares, nodes) in _arms(stream, budget):
            windows = [
                float(np.mean(shares[at : at + WINDOW])) for at in range(0, len(shares), WINDOW)
            ]
            series[f"{stream.name}: {name}"] = windows
            rows.append([stream.name, name, *_cells(windows), nodes])
    return Result(
        name="steady",
        title=f"Steady state: reuse per window of {WINDOW} requests, host budget a quarter",
        n=sizes,
        seed=options.seed,
        model=f"none (random rows of 128 bytes; tokens: {model_name(options)})",
        noise_floor="none: `edited repeats` draws texts evenly, so what moves is chance or decay",
        columns=[
            "requests",
            "store",
            "first window",
            "2nd quarter",
            "last quarter",
            "lowest",
            "prompts held",
        ],
        rows=rows,
        notes=_NOTES,
        series=series,
    )


_NOTES = [
    "Shares of tokens served from the store: mean over the requests of a window, then over "
    "windows. `lowest`: the worst window after the first quarter.",
    "`edited repeats`: a text from a fixed set, 8 tokens of it replaced by 16 others at a random "
    "place; every text has come by once in the first quarter. `ShareGPT in order`: all human "
    "turns of ≥ 64 tokens as they come, so its reuse changes with what people wrote.",
    "A real store, policy `balanced`, lexical nomination only. Prompts are cut at 1,024 tokens. "
    "Working set: the rows of all distinct prompts, as if nothing were shared.",
    "`prefix cache`: blocks of 16 tokens, least recently used out, the same bytes as the host "
    "budget of a quarter.",
]


def _arms(stream: Stream, budget: int) -> list[tuple[str, Served]]:
    arms = []
    for name, host, disk in (
        ("room for all", stream.working_set * 2, False),
        ("a quarter, and disk", budget, True),
        ("a quarter, no disk", budget, False),
    ):
        with tempfile.TemporaryDirectory(prefix="kvshare-steady-") as home:
            arms.append((name, serve(stream, Path(home), host, disk=disk, name=name)))
    arms.append(("prefix cache, a quarter", Served(prefix_lru(stream, budget))))
    return arms


def _cells(windows: list[float]) -> list[Cell]:
    quarter = max(1, len(windows) // 4)
    second, last = windows[quarter : 2 * quarter], windows[-quarter:]
    lowest = min(windows[quarter:], default=windows[0])
    return [windows[0], float(np.mean(second or last)), float(np.mean(last)), lowest]


def draw(result: Result) -> Figure:
    """Reuse by window, a panel for each stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(str(row[0]) for row in result.rows))
    for axes, stream in zip(panels, names, strict=True):
        lines = [(k, v) for k, v in result.series.items() if k.startswith(f"{stream}: ")]
        for (label, windows), (line, marker) in zip(lines, LINES, strict=False):
            at = [WINDOW * (index + 1) for index in range(len(windows))]
            heights = [100 * share for share in windows]
            axes.plot(
                at,
                heights,
                line,
                marker=marker,
                markersize=4,
                color="black",
                linewidth=1,
                label=label.removeprefix(f"{stream}: "),
            )
        axes.set_title(stream)
        axes.set_xlabel("requests served")
        axes.set_ylim(0, 100)
    panels[0].set_ylabel(f"% of tokens reused, windows of {WINDOW}")
    panels[0].legend(fontsize=7)
    return figure
