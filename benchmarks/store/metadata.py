"""What the metadata of many nodes cost: seconds to open a store, and memory, a node.

Nodes of 1,000 tokens in 16 blocks that no other node has, the dearest kind. Whether their files are
there is not asked: that is what `startup` measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import blake3
import numpy as np
from rich.progress import track

from benchmarks.harness.result import Cell, Options, Result
from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Span
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tree.catalog import VECTOR_DIMENSIONS, Catalog, Vectors
from kvshare_store.tree.node import Node, node_id

NODES = (10_000, 100_000)
SHORT_NODES = (10_000,)
TOKENS, BLOCK_TOKENS = 1_000, 64
TARGET_NODES, TARGET_S, TARGET_GIB = 1_000_000, 60.0, 8.0
NAMESPACE = Namespace("metadata", KVLayout(1, 1, 16, "float32"))
_AT_ONCE = 20_000


def fill(home: Path, nodes: int) -> None:
    """Commit so many nodes, in few commits."""
    catalog = Catalog(home / "catalog")
    catalog.add_namespaces([NAMESPACE])
    chance = np.random.default_rng(nodes)
    for first in track(range(0, nodes, _AT_ONCE), f"Writing {nodes:,} nodes"):
        count = min(_AT_ONCE, nodes - first)
        vectors = chance.standard_normal((count, VECTOR_DIMENSIONS)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        catalog.add([(_node(chance), Vectors(vector, None)) for vector in vectors])
    catalog.compact()


def _node(chance: np.random.Generator) -> Node:
    tokens = chance.integers(0, 1 << 17, TOKENS).astype(np.int32)
    starts = range(0, TOKENS, BLOCK_TOKENS)
    sizes = [min(BLOCK_TOKENS, TOKENS - start) for start in starts]
    return Node(
        id=node_id(NAMESPACE.digest, tokens, True),
        namespace=NAMESPACE.digest,
        token_bytes=tokens.tobytes(),
        segments=tuple(
            Span(start, rows, start, at, 0, True)
            for at, (start, rows) in enumerate(zip(starts, sizes, strict=True))
        ),
        blocks=tuple(blake3.blake3(chance.bytes(32)).hexdigest() for _ in sizes),
        block_bytes=tuple(rows * NAMESPACE.layout.row_bytes for rows in sizes),
        exact_rows=TOKENS,
    )


def _memory() -> int:
    """Bytes of this process that are its own."""
    status = Path("/proc/self/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
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
        return {"s": seconds, "bytes": nbytes, "nodes": nodes}


def _opened_apart(home: Path) -> dict[str, Any]:
    """In a process of its own, so that memory is only this store's."""
    script = [sys.executable, "-m", "benchmarks.store.metadata", str(home)]
    done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: Options) -> Result:
    """Fill and open stores of growing size; `--n` names another largest one."""
    sizes = SHORT_NODES if options.short else NODES
    sizes = (
        *[size for size in sizes if size < (options.n or size + 1)],
        *filter(None, [options.n]),
    )
    rows: list[list[Cell]] = []
    for nodes in sizes:
        with tempfile.TemporaryDirectory(prefix="kvshare-metadata-", dir=Path.cwd()) as place:
            home = Path(place) / "home"
            with Store(StoreConfig(home=str(home), host_bytes=1 << 20, semantic="never")):
                pass
            fill(home, nodes)
            disk = sum(f.stat().st_size for f in (home / "catalog").rglob("*") if f.is_file())
            found = _opened_apart(home)
        seconds, memory = found["s"], found["bytes"]
        rows.append([nodes, seconds, memory / 2**30, 1e6 * seconds / nodes, memory / nodes / 1024,
                     disk / nodes / 1024])  # fmt: skip
    nodes = rows[-1][0]
    seconds, memory = (float(cell or 0) for cell in rows[-1][1:3])
    reached = f"{seconds:.0f} s and {memory:.1f} GiB at {nodes:,.0f}"
    if nodes < TARGET_NODES:
        more = TARGET_NODES / nodes
        reached += f", so about {seconds * more:.0f} s and {memory * more:.0f} GiB"
        seconds, memory = seconds * more, memory * more
    return Result(
        name="metadata",
        title="Metadata at scale: opening a store of many prompts",
        n={"starts a row": 1},
        seed=0,
        model=f"none (nodes of {TOKENS:,} tokens in 16 blocks of their own)",
        noise_floor="not known: one start a row",
        columns=["nodes", "open s", "memory GiB", "us a node", "KiB a node", "KiB on disk a node"],
        rows=rows,
        notes=["The files of blocks are not there and not looked for; `startup` measures that."],
        targets=[(
            f"{TARGET_NODES:,} nodes open within {TARGET_S:.0f} s and {TARGET_GIB:.0f} GiB",
            reached,
            seconds <= TARGET_S and memory <= TARGET_GIB,
        )],
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(opened(sys.argv[1])))
