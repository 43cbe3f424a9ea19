"""Whether loading rows layer by layer, while earlier layers compute, shortens the wait."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from kvshare_connectors.transformers import KVShareModel
from kvshare_connectors.transformers.rows import RowCache
from torch import Tensor

from benchmarks.data.edited_prompts import follower, long_texts
from benchmarks.data.kv_blocks import bf16_engine
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import low_to_high, median_and_range
from kvshare_store.cli.progress import progress
from kvshare_store.config import StoreConfig
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.plan.editor import Editor
from kvshare_store.plan.spans import gaps
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS, SHORT_LENGTHS = (1024, 2048, 4096), (1024,)
SHARES = (0.9, 0.99)
REPEATS, SHORT_REPEATS = 9, 3
WAYS = ("whole", "by layer", "by layer, meanwhile")


class LayerLoader:
    """Gathers and rotates the rows of one layer at a time into a cache."""

    def __init__(self, model: KVShareModel, plan: ReusePlan, cache: RowCache) -> None:
        layout = model.engine.layout
        one = KVLayout(1, layout.kv_heads, layout.head_dim, layout.dtype)
        self._editor = Editor(one, model.engine.rope)
        self._plan, self._cache, self._layout = plan, cache, layout
        self._blocks = [layout.words(model.store.rows_of(plan, at), ref.rows)
                        for at, ref in enumerate(plan.blocks)]  # fmt: skip

    def load(self, layer: int) -> None:
        """The spans' rows of one layer."""
        edited = self._editor.edit(
            self._plan.spans,
            self._plan.blocks,
            lambda ref: self._blocks[self._plan.blocks.index(ref)][layer].reshape(-1).data,
        )
        self._cache.rows[layer, :, 0, edited.positions] = edited.rows[0]


@contextmanager
def waiting(model: Any, ready: list[threading.Event]) -> Iterator[None]:
    """No layer begins before its rows are there."""
    hooks = [
        layer.register_forward_pre_hook(lambda *_, at=at: ready[at].wait() and None)
        for at, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def serve(
    model: KVShareModel, plan: ReusePlan, tokens: list[int], way: str
) -> tuple[float, Tensor]:
    """Seconds from the plan to the logits of the last position, and these."""
    engine = model.engine
    cache = engine.cache(len(tokens))
    runs = gaps(plan.spans, 0, plan.tokens)
    fresh = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    compute: Callable[[], Tensor] = lambda: engine.partial(cache, tokens, fresh)  # noqa: E731
    layers = range(engine.layout.layers)
    start = perf_counter()
    if way == "whole":
        editor = Editor(engine.layout, engine.rope)
        edited = editor.edit(
            plan.spans, plan.blocks, lambda ref: model.store.rows_of(plan, plan.blocks.index(ref))
        )
        cache.rows[:, :, 0, edited.positions] = edited.rows
        logits = compute()
        return perf_counter() - start, logits
    loader = LayerLoader(model, plan, cache)
    if way == "by layer":
        for layer in layers:
            loader.load(layer)
        logits = compute()
        return perf_counter() - start, logits
    ready = [threading.Event() for _ in layers]

    def load_all() -> None:
        for layer in layers:
            loader.load(layer)
            ready[layer].set()

    thread = threading.Thread(target=load_all)
    thread.start()
    with waiting(engine.model, ready):
        logits = compute()
    thread.join()
    return perf_counter() - start, logits


def measure(options: Options) -> Result:
    """All three ways in turn, on the same plans."""
    engine = bf16_engine(options)
    texts = long_texts(options)
    lengths = SHORT_LENGTHS if options.short else LENGTHS
    repeats = options.size(REPEATS, SHORT_REPEATS)
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory(prefix="kvshare-pipelining-") as home, progress() as shown:
        task = shown.add_task("Serving", total=len(lengths) * len(SHARES) * (repeats + 1))
        config = StoreConfig(home=home, policy="aggressive", semantic="never", disk=False,
                             min_saving_ms=-1e9, host_bytes=1 << 30)  # fmt: skip
        with KVShareModel(engine.model, Store(config)) as model:
            for length in lengths:
                for share in SHARES:
                    donor = texts.take(length)
                    tokens = follower(donor, share, 1, texts)
                    model.store.clear()
                    model.save(model.prefill(donor, policy="off"))
                    plan = model.store.plan(tokens, model.namespace)
                    rounds = []
                    for turn in range(repeats + 1):
                        order = WAYS if turn % 2 else WAYS[::-1]
                        rounds.append({way: serve(model, plan, tokens, way)[0] for way in order})
                        shown.advance(task)
                    model.store.finish(plan, Outcome())
                    rows.append(_row(length, plan, rounds[1:]))  # the first warms up
    return Result(
        name="pipelining",
        title="Loading layer by layer while earlier layers compute",
        n={"rounds a row": repeats},
        seed=options.seed,
        model=f"{model_name(options)}, bf16, transformers",
        noise_floor="the spread of `whole`, in the table",
        columns=["tokens", "computed", "whole ms", "spread", "by layer / whole",
                 "meanwhile / whole", "spread of that"],
        rows=rows,
        notes=[
            "From the plan to the logits: gather, rotate, write to the cache, compute what is "
            "missing. `meanwhile`: a thread loads layer n + 1 … while layer n computes.",
            "Not built into the vLLM connector, for what this shows: on a CPU the thread takes the "
            "cores that compute, and the rows of a layer are too few to gather at full speed. On a "
            "GPU the copies to the device could overlap; none was at hand to measure it.",
        ],
    )  # fmt: skip


def _row(length: int, plan: ReusePlan, rounds: list[dict[str, float]]) -> list[Cell]:
    whole = [found["whole"] for found in rounds]
    ratios = {way: sorted(found[way] / found["whole"] for found in rounds) for way in WAYS[1:]}
    meanwhile = ratios[WAYS[2]]
    return [
        length, f"{1 - plan.reused / plan.tokens:.1%}", median(whole) * 1e3,
        low_to_high(min(whole) * 1e3, max(whole) * 1e3, 0), median(ratios[WAYS[1]]),
        *median_and_range(meanwhile),
    ]  # fmt: skip


def draw(result: Result) -> Figure:
    """Both other ways as multiples of loading everything first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    labels = [f"{row[0]} tokens\n{row[1]} computed" for row in result.rows]
    places = range(len(labels))
    axes.bar([at - 0.2 for at in places], [float(row[4] or 0) for row in result.rows], 0.4,
             color="0.7", edgecolor="black", label=WAYS[1])  # fmt: skip
    axes.bar([at + 0.2 for at in places], [float(row[5] or 0) for row in result.rows], 0.4,
             color="white", edgecolor="black", hatch="//", label=WAYS[2])  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.set_ylabel("time, times loading everything first")
    axes.legend()
    return figure
