"""Seconds from opening a store of many blocks to its first answer, beside an empty store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness.page_cache import forget
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import low_to_high
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan.spans import Span
from kvshare_store.store import Store
from kvshare_store.tensors.frame import Block, block_name, encode_frame
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS = (0, 10_000, 100_000)
SHORT_BLOCKS = (0, 10_000)
BLOCKS_A_NODE = 32
REPEATS, SHORT_REPEATS = 5, 2
BLOCK_TOKENS = 64
TARGET_S = 1.0
NAMESPACE = Namespace("startup", KVLayout(1, 1, 16, "float32"))
"""Rows of 128 bytes: only the number of files matters here."""


def fill(home: Path, blocks: int) -> list[int]:
    """Write nodes and their blocks past the store, without waiting for each; the last prompt."""
    layout, tokens = NAMESPACE.layout, np.zeros(0, np.int32)
    chance = np.random.default_rng(blocks)
    catalog = Catalog(home / "catalog")
    catalog.records.add([NAMESPACE])
    (home / "blocks").mkdir(mode=0o700)
    rows: list[tuple[Node, Vectors]] = []
    for _ in track(range(blocks // BLOCKS_A_NODE), f"Writing {blocks:,} blocks"):
        tokens = chance.integers(0, 1 << 15, BLOCKS_A_NODE * BLOCK_TOKENS).astype(np.int32)
        names = [_write(home, chance.bytes(BLOCK_TOKENS * layout.row_bytes))
                 for _ in range(BLOCKS_A_NODE)]  # fmt: skip
        rows.append((_node(tokens, names), Vectors(lexical_vector(tokens), None)))
        if len(rows) == 1_000:
            catalog.add(rows)
            rows = []
    catalog.add(rows)
    return [int(token) for token in tokens]


def _write(home: Path, data: bytes) -> str:
    block = Block(NAMESPACE.digest, NAMESPACE.layout, data)
    name = block_name(block)
    path = home / "blocks" / name[:2] / f"{name}.kvb"
    path.parent.mkdir(exist_ok=True, mode=0o700)
    path.write_bytes(b"".join(encode_frame(name, block)))
    return name


def _node(tokens: np.ndarray, names: list[str]) -> Node:
    spans = [Span(at * BLOCK_TOKENS, BLOCK_TOKENS, at * BLOCK_TOKENS, at, 0, True)
             for at in range(len(names))]  # fmt: skip
    return Node(
        id=node_id(NAMESPACE.digest, tokens, True),
        namespace=NAMESPACE.digest,
        token_bytes=tokens.tobytes(),
        parent=None,
        edits=(),
        segments=tuple(spans),
        blocks=tuple(names),
        block_bytes=(BLOCK_TOKENS * NAMESPACE.layout.row_bytes,) * len(names),
        exact_rows=len(tokens),
        generation=0,
    )


def starts(home: Path, prompt: list[int], repeats: int) -> Iterator[tuple[float, float, float]]:
    """Seconds until the store is open, until its first answer, until all files are counted."""
    config = StoreConfig(home=str(home), host_bytes=64 << 20, disk_bytes=1 << 40, semantic="never",
                         gc_seconds=0.0, min_saving_ms=-1e9, plan_deadline_ms=60_000.0)  # fmt: skip
    for _ in range(repeats):
        forget(home / "blocks")
        start = perf_counter()
        with Store(config) as store:
            opened = perf_counter() - start
            plan = store.plan(prompt or list(range(2_048)), NAMESPACE)
            answered = perf_counter() - start
            if bool(plan.declined) == bool(prompt):
                raise RuntimeError(f"the first answer is wrong: {plan.declined or plan.exact}")
            store.stats()
            counted = perf_counter() - start
            if not plan.declined:
                store.load(plan)
        yield opened, answered, counted


def measure(options: Options) -> Result:
    """Start stores of growing size, several times each."""
    sizes = SHORT_BLOCKS if options.short else BLOCKS
    repeats = options.size(REPEATS, SHORT_REPEATS)
    rows: list[list[Cell]] = []
    for blocks in sizes:
        with tempfile.TemporaryDirectory(prefix="kvshare-startup-", dir=Path.cwd()) as place:
            home = Path(place) / "home"
            with Store(StoreConfig(home=str(home), host_bytes=1 << 20, semantic="never")):
                pass
            (home / "blocks").rmdir()
            prompt = fill(home, blocks)
            found = list(starts(home, prompt, repeats))
            answered = [times[1] for times in found]
            rows.append([blocks, blocks // BLOCKS_A_NODE,
                         *(median(times) for times in zip(*found, strict=True)),
                         low_to_high(min(answered), max(answered))])  # fmt: skip
    delay = float(rows[-1][3] or 0) - float(rows[0][3] or 0)
    return Result(
        name="startup",
        title="Opening a store: seconds to the first answer",
        n={"starts a row": repeats},
        seed=0,
        model="none (rows of 128 bytes)",
        noise_floor="the spread, and the start of an empty store",
        columns=["blocks", "nodes", "opened s", "first answer s", "all counted s", "spread"],
        rows=rows,
        notes=[
            f"Nodes of {BLOCKS_A_NODE * BLOCK_TOKENS:,} tokens in {BLOCKS_A_NODE} blocks each. The "
            "first answer is a hit whose blocks are read from disk; `all counted`: until the "
            "budget of the disk is known, which only puts wait for.",
            "A running process: what importing libraries takes is not in it.",
        ],
        targets=[(
            f"{rows[-1][0]:,} blocks delay the first answer by no more than {TARGET_S:.0f} s",
            f"by {delay:.2f} s",
            delay <= TARGET_S,
        )],
    )  # fmt: skip


def draw(result: Result) -> Figure:
    """Seconds by number of blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    sizes = [f"{row[0]:,}" for row in result.rows]
    for column, style in ((2, "o-"), (3, "s--"), (4, "^:")):
        axes.plot(sizes, [float(row[column] or 0) for row in result.rows], style, color="black",
                  label=result.columns[column].removesuffix(" s"))  # fmt: skip
    axes.set_xlabel("blocks on disk")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure
