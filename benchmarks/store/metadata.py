"""What the metadata of many nodes cost: seconds to open a store, and memory, a node.

Nodes of 1,000 tokens: `own` ones in 16 blocks that no other node has, the dearest kind; and
families of ten, of which nine are `edited`: they share the blocks of the first, but for one.
Whether their files are there is not asked: that is what `startup` measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from benchmarks.harness.result import Cell, Options, Result
from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.rows import Rows
from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Match, edit_script
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS, Vectors
from kvshare_store.plan.spans import Span, clip_spans
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout

NODES = (10_000, 100_000)
SHORT_NODES = (10_000,)
TOKENS, BLOCK_TOKENS, EDITED, FAMILY = 1_000, 64, 20, 10
TARGET_NODES, TARGET_S, TARGET_GIB = 1_000_000, 60.0, 8.0
NAMESPACE = Namespace("metadata", KVLayout(1, 1, 16, "float32"))
_AT_ONCE = 20_000


def fill(home: Path, nodes: int, kind: str) -> None:
    """Commit so many nodes, in few commits, as the catalogue writes them."""
    catalog = Catalog(home / "catalog")
    catalog.records.add([NAMESPACE])
    chance = np.random.default_rng(nodes)
    made = _own(chance) if kind == "own" else _families(chance)
    table = lancedb.connect(str(home / "catalog")).open_table("nodes")
    rows = Rows(None)
    for first in track(range(0, nodes, _AT_ONCE), f"Writing {nodes:,} {kind} nodes"):
        count = min(_AT_ONCE, nodes - first)
        vectors = chance.standard_normal((count, VECTOR_DIMENSIONS)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        packed = [rows.node_row(next(made), Vectors(vector, None)) for vector in vectors]
        flat = pa.array(vectors.reshape(-1))
        columns = {
            "id": [row["id"] for row in packed],
            "namespace": [row["namespace"] for row in packed],
            "node": pa.array([row["node"] for row in packed], pa.binary()),
            "lexical": pa.FixedSizeListArray.from_arrays(flat, VECTOR_DIMENSIONS),
            "semantic": pa.nulls(count, pa.list_(pa.float32(), VECTOR_DIMENSIONS)),
        }
        table.add(pa.table(columns))  # a merge would look for each of them first


def _own(chance: np.random.Generator) -> Iterator[Node]:
    starts = range(0, TOKENS, BLOCK_TOKENS)
    sizes = [min(BLOCK_TOKENS, TOKENS - start) for start in starts]
    while True:
        tokens = chance.integers(0, 1 << 17, TOKENS).astype(np.int32)
        yield Node(
            id=node_id(NAMESPACE.digest, tokens, True),
            namespace=NAMESPACE.digest,
            token_bytes=tokens.tobytes(),
            segments=tuple(
                Span(start, rows, start, at, 0, True)
                for at, (start, rows) in enumerate(zip(starts, sizes, strict=True))
            ),
            blocks=tuple(chance.bytes(32).hex() for _ in sizes),
            block_bytes=tuple(rows * NAMESPACE.layout.row_bytes for rows in sizes),
            exact_rows=TOKENS,
        )


def _families(chance: np.random.Generator) -> Iterator[Node]:
    for first in _own(chance):
        yield first
        for _ in range(FAMILY - 1):
            yield _edited(first, chance)


def _edited(parent: Node, chance: np.random.Generator) -> Node:
    """Its parent with other tokens somewhere, whose rows are in a block of its own."""
    start = int(chance.integers(0, TOKENS - EDITED))
    stop = start + EDITED
    tokens = parent.tokens.copy()
    tokens[start:stop] = chance.integers(0, 1 << 17, EDITED)
    fresh = Span(start, EDITED, start, len(parent.blocks), 0)
    kept = [Match(0, 0, start), Match(stop, stop, TOKENS - stop)]
    return Node(
        id=node_id(NAMESPACE.digest, tokens, False),
        namespace=NAMESPACE.digest,
        token_bytes=tokens.tobytes(),
        parent=parent.id,
        edits=edit_script(kept, TOKENS, tokens),
        segments=(
            *clip_spans(parent.segments, 0, start),
            fresh,
            *clip_spans(parent.segments, stop, TOKENS),
        ),
        blocks=(*parent.blocks, chance.bytes(32).hex()),
        block_bytes=(*parent.block_bytes, EDITED * NAMESPACE.layout.row_bytes),
        exact_rows=start,
        generation=1,
    )


def _memory(what: str = "RssAnon") -> int:
    """Bytes of this process that are its own, or (`VmHWM`) the most that it ever had."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith(what))
    return int(kib) << 10


def opened(home: str) -> dict[str, float]:
    """Seconds and bytes that opening the store takes."""
    BlockStore.expect = lambda *_: True  # type: ignore[method-assign]
    before, start = _memory(), perf_counter()
    config = StoreConfig(
        home=home, host_bytes=1 << 20, semantic="never", gc_seconds=0.0, max_nodes=1 << 30
    )
    with Store(config) as store:
        seconds, nbytes, nodes = perf_counter() - start, _memory() - before, len(store.tree)
        return {"s": seconds, "bytes": nbytes, "nodes": nodes, "most": _memory("VmHWM")}


def _opened_apart(home: Path) -> dict[str, Any]:
    """In a process of its own, so that memory is only this store's; numpy computes on one core, as
    in a daemon."""
    script = [sys.executable, "-m", "benchmarks.store.metadata", str(home)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True, env=alone)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(nodes: int, kind: str) -> list[Cell]:
    with tempfile.TemporaryDirectory(prefix="kvshare-metadata-", dir=Path.cwd()) as place:
        home = Path(place) / "home"
        with Store(StoreConfig(home=str(home), host_bytes=1 << 20, semantic="never")):
            pass
        fill(home, nodes, kind)
        disk = sum(f.stat().st_size for f in (home / "catalog").rglob("*") if f.is_file())
        found = _opened_apart(home)
    seconds, memory = found["s"], found["bytes"]
    return [nodes, kind, seconds, memory / 2**30, found["most"] / 2**30, 1e6 * seconds / nodes,
            memory / nodes / 1024, disk / nodes / 1024]  # fmt: skip


def measure(options: Options) -> Result:
    """Fill and open stores of growing size; `--n` names another largest one."""
    sizes = SHORT_NODES if options.short else NODES
    sizes = (
        *[size for size in sizes if size < (options.n or size + 1)],
        *filter(None, [options.n]),
    )
    rows = [_row(nodes, "own") for nodes in sizes]
    nodes = sizes[-1]
    seconds, memory = (float(cell or 0) for cell in rows[-1][2:4])
    rows.append(_row(nodes, "edited"))
    reached = f"{seconds:.0f} s and {memory:.1f} GiB at {nodes:,.0f} `own` ones"
    if nodes < TARGET_NODES:
        more = TARGET_NODES / nodes
        reached += f", so about {seconds * more:.0f} s and {memory * more:.0f} GiB"
        seconds, memory = seconds * more, memory * more
    return Result(
        name="metadata",
        title="Metadata at scale: opening a store of many prompts",
        n={"starts a row": 1},
        seed=0,
        model=f"none (nodes of {TOKENS:,} tokens)",
        noise_floor="not known: one start a row",
        columns=["nodes", "kind", "open s", "memory GiB", "peak RSS GiB", "us a node", "KiB a node",
                 "KiB on disk a node"],
        rows=rows,
        notes=[
            "`own`: nodes in 16 blocks that no other has. `edited`: families of ten, of which nine "
            "share all blocks of the first but for the one with their edit.",
            "The files of blocks are not there and not looked for; `startup` measures that.",
        ],
        targets=[(
            f"{TARGET_NODES:,} nodes open within {TARGET_S:.0f} s and {TARGET_GIB:.0f} GiB",
            reached,
            seconds <= TARGET_S and memory <= TARGET_GIB,
        )],
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(opened(sys.argv[1])))
