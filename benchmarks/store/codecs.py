"""Codecs: size, speed, and how a lossy codec changes the next token."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data.edited_prompts import long_texts
from benchmarks.data.kv_blocks import bf16_engine, real_blocks
from benchmarks.harness.concurrency import spent
from benchmarks.harness.models import model_name
from benchmarks.harness.page_cache import forget
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import low_to_high
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.cli.progress import progress
from kvshare_store.tensors.codecs import CODECS, LOSSY, Codec, decode, encode
from kvshare_store.tensors.frame import Block, Key, block_name, decode_frame, encode_frame
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS, SHORT_BLOCKS = 128, 32
ROUNDS, SHORT_ROUNDS = 5, 2
PROMPTS, SHORT_PROMPTS = 16, 4
PROMPT_TOKENS = 1_024
_SECRET = bytes(range(32))


class Rates(NamedTuple):
    """Of one codec. Rates are GB of rows per second, medians over rounds."""

    ratio: float
    """Bytes of rows ÷ bytes kept."""
    pack: float
    unpack: float
    """Unpacking and verification: the cost of a read without the medium."""
    warm: float
    """Loading from the disk tier with a warm page cache."""
    cold: float
    """The same with a cold page cache."""
    spread: tuple[float, float]
    """Least and greatest of the cold rounds."""


def rates(blocks: Sequence[Block], codec: Codec, key: Key | None, rounds: int) -> Rates:
    """Pack, unpack and load the blocks so often."""
    named = [(block_name(block), block) for block in blocks]
    raw = sum(len(block.data) for block in blocks)
    packed = [
        (name, b"".join(bytes(part) for part in encode_frame(name, block, codec, key)))
        for name, block in named
    ]
    pack = [_gb_s(raw, lambda: [encode_frame(n, b, codec, key) for n, b in named])
            for _ in range(rounds)]  # fmt: skip
    unpack = [_gb_s(raw, lambda: [decode_frame(frame, name, key) for name, frame in packed])
              for _ in range(rounds)]  # fmt: skip
    warm, cold = _from_disk(named, raw, codec, key, rounds)
    return Rates(
        raw / sum(len(frame) for _, frame in packed),
        median(pack), median(unpack), median(warm), median(cold), (min(cold), max(cold)),
    )  # fmt: skip


def _gb_s(nbytes: int, work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return nbytes / (perf_counter() - start) / 1e9


def _from_disk(
    named: Sequence[tuple[str, Block]], raw: int, codec: Codec, key: Key | None, rounds: int
) -> tuple[list[float], list[float]]:
    """Rates of loading all blocks, as many at a time as the tier is worth: warm, then cold."""

    async def load(tier: DiskTier) -> float:
        gets = [partial(tier.get, name) for name, _ in named]
        return raw / (await spent(gets, tier.properties.max_concurrency)).wall / 1e9

    async def measured(folder: Path) -> tuple[list[float], list[float]]:
        tier = await DiskTier.open(folder, 1 << 40, codec, key)
        for name, block in named:
            await tier.put(name, block)
        await load(tier)
        warm = [await load(tier) for _ in range(rounds)]
        cold = []
        for _ in range(rounds):
            forget(folder / "blocks")
            cold.append(await load(tier))
        await tier.close()
        return warm, cold

    with tempfile.TemporaryDirectory(prefix="kvshare-codecs-", dir=Path.cwd()) as folder:
        return asyncio.run(measured(Path(folder)))


# --- what a lossy codec costs in quality ----------------------------------------------------------


def rounded(rows: torch.Tensor, layout: KVLayout, codec: Codec, step: int = 64) -> torch.Tensor:
    """Rows `[layers, 2, T, kv_heads, head_dim]` as they come back from a codec."""
    parts = []
    for part in rows.split(step, dim=2):
        data = part.contiguous().view(torch.uint8).numpy().reshape(-1).data
        chosen, body = encode(codec, data, layout)
        back = np.frombuffer(decode(chosen, body, layout, len(data)), np.uint8)
        parts.append(torch.from_numpy(back.copy()).view(rows.dtype).view(part.shape))
    return torch.cat(parts, dim=2)


def kl_of_next(engine: RowEngine, tokens: list[int], codec: Codec | None) -> float:
    """KL of the next token after the prompt, with all rows but the last through a codec; None: the
    same rows, so what computing the last token alone changes. Nats."""
    cache, logits = engine.prefill(tokens)
    if codec is not None:
        kept = cache.rows[:, :, 0, :-1]
        cache.rows[:, :, 0, :-1] = rounded(kept, engine.layout, codec)
    again = engine.partial(cache, tokens, torch.tensor([len(tokens) - 1]))
    p, q = logits.log_softmax(-1), again.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def measure(options: Options) -> Result:
    """Every codec, with and without a key."""
    engine = bf16_engine(options)
    blocks = real_blocks(options, SHORT_BLOCKS if options.short else BLOCKS, engine)
    rounds = SHORT_ROUNDS if options.short else ROUNDS
    texts = long_texts(options)
    prompts = [texts.take(PROMPT_TOKENS) for _ in range(options.size(PROMPTS, SHORT_PROMPTS))]
    floor = median(kl_of_next(engine, prompt, None) for prompt in prompts)
    rows: list[list[Cell]] = []
    with progress() as shown:
        task = shown.add_task("Codecs", total=2 * len(CODECS))
        for codec in CODECS:
            loss = (
                median(kl_of_next(engine, prompt, codec) for prompt in prompts)  # type: ignore[arg-type]
                if codec in LOSSY
                else 0.0
            )
            for key in (None, lambda namespace: _SECRET):
                found = rates(blocks, codec, key, rounds)  # type: ignore[arg-type]
                spread = low_to_high(*found.spread)
                rows.append([codec, "yes" if key else "no", *found[:-1], spread, loss])
                shown.advance(task)
    clear = [row for row in rows if row[1] == "no"]
    best = max(clear, key=lambda row: float(row[6] or 0))
    default = clear[0]
    return Result(
        name="codecs",
        title="Codecs on real KV: size, speed, and loading from disk",
        n={"blocks": len(blocks), "rounds": rounds, "prompts for KL": len(prompts)},
        seed=options.seed,
        model=f"{model_name(options)}, bf16, blocks of {len(blocks[0].data):,} bytes",
        noise_floor=f"KL when no codec is in between and the last token is computed alone: "
        f"{floor:.2g}",
        columns=["codec", "encrypted", "ratio", "pack GB/s", "unpack GB/s", "disk warm GB/s",
                 "disk cold GB/s", "cold spread", "KL next"],
        rows=rows,
        notes=_NOTES,
        targets=[(
            "the default codec loads no slower than any other, by a tenth, from a cold disk",
            f"none {float(default[6] or 0):.2f} GB/s, best {best[0]} {float(best[6] or 0):.2f}",
            float(default[6] or 0) >= 0.9 * float(best[6] or 0),
        )],
    )  # fmt: skip


_NOTES = [
    "GB of rows, whatever they take when packed. Pack and unpack: one thread; unpack includes the "
    "verification that every read does. Disk: the store's own tier, eight reads at a time.",
    "Cold: after posix_fadvise(DONTNEED) on every file; what lies below (a virtual disk's own "
    "cache) is not told.",
    "KL next: median over prompts of 1,024 tokens, all rows but the last through the codec, the "
    "last token computed on them, against full prefill. Rows of a lossy codec never pose as exact.",
]


def draw(result: Result) -> Figure:
    """Ratio against the speed of loading."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for encrypted, marker in (("no", "o"), ("yes", "s")):
        rows = [row for row in result.rows if row[1] == encrypted]
        axes.scatter(
            [float(row[2] or 0) for row in rows], [float(row[6] or 0) for row in rows],
            marker=marker, facecolors="none" if encrypted == "yes" else "black",
            edgecolors="black", label="encrypted" if encrypted == "yes" else "clear",
        )  # fmt: skip
    for row in (row for row in result.rows if row[1] == "no"):
        axes.annotate(str(row[0]), (float(row[2] or 0), float(row[6] or 0)),
                      xytext=(5, 4), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("bytes of rows per byte kept")
    axes.set_ylabel("loading from a cold disk, GB of rows a second")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure
