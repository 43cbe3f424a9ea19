"""Time to first token at the shapes of larger models, in the transformers engine.

The weights are random: honest for time, meaningless for answers. Where there is no GPU only a few
of the layers are there, since full prefill and reuse both cost the same per layer.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from kvshare_connectors.transformers import KVShareModel

from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import low_to_high
from kvshare_store.cli.progress import progress
from kvshare_store.config import StoreConfig
from kvshare_store.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-7B": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "Llama-3.1-8B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
}
"""Model type and configuration, as the models' authors publish them."""
CPU_LAYERS = 1
HOST_BYTES = {"cuda": 12 * 2**30, "cpu": 2**30}
LENGTHS = {"cuda": (2048, 8192, 32000), "cpu": (512,)}
SHARES = (0.5, 0.9)
REPEATS = 5


class Timing(NamedTuple):
    """One prompt, served from scratch and from its donor. Seconds."""

    full: float
    reused: float
    plan: float
    load: float
    forward: float
    head: float
    """The output layer at one position, a part of `full` and of `forward`."""
    computed: float
    """Share of the tokens that were computed when the donor was used."""


def build(shape: str, layers: int | None, device: str) -> Any:
    """A model of this shape with random bf16 weights; `layers` of its layers, or all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = SHAPES[shape]
    config = AutoConfig.for_model(kind, **fields, tie_word_embeddings=False)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.name_or_path = shape
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@contextmanager
def served(shape: str, layers: int | None, device: str) -> Iterator[KVShareModel]:
    """The model with a store of its own."""
    with tempfile.TemporaryDirectory(prefix="kvshare-shapes-") as home:
        config = StoreConfig(
            home=home, policy="aggressive", semantic="never", disk=False, min_saving_ms=-1e9,
            host_bytes=HOST_BYTES[device],
        )  # fmt: skip
        with KVShareModel(build(shape, layers, device), Store(config)) as model:
            yield model


def follower(donor: list[int], share: float, choose: random.Random, vocabulary: int) -> list[int]:
    """The donor with a run of new tokens a quarter into it; as long as the donor."""
    new = [choose.randrange(vocabulary) for _ in range(round((1 - share) * len(donor)))]
    at = len(donor) // 4
    return [*donor[:at], *new, *donor[at + len(new) // 2 :]][: len(donor)]


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What `work` returns, and the seconds until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return made, time.perf_counter() - start


def time_pair(model: KVShareModel, donor: list[int], prompt: list[int], device: str) -> Timing:
    """Serve `prompt` from scratch and from `donor`, which is stored first."""
    model.store.clear()
    model.save(model.prefill(donor, policy="off"))
    engine, store = model.engine, model.store
    _, full = timed(lambda: engine.prefill(prompt), device)
    plan, planning = timed(lambda: store.plan(prompt, model.namespace), device)
    cache = engine.cache(len(prompt))

    def load() -> None:
        edited = store.load(plan, engine.rope)
        cache.rows[:, :, 0, edited.positions] = edited.rows.to(cache.rows.device)

    _, loading = timed(load, device)
    kept = torch.zeros(len(prompt), dtype=torch.bool)
    for span in plan.spans:
        kept[span.start : span.stop] = True
    fresh = torch.nonzero(~kept).flatten()
    _, forward = timed(lambda: engine.partial(cache, prompt, fresh), device)
    last = torch.zeros(1, engine.model.config.hidden_size, dtype=engine.dtype, device=device)
    with torch.inference_mode():
        _, head = timed(lambda: engine.model.lm_head(last), device)
    reused = planning + loading + forward
    return Timing(full, reused, planning, loading, forward, head, len(fresh) / len(prompt))


def measure(options: Options) -> Result:
    """Every shape, length and share; medians of repeats, each with full prefill first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = None if device == "cuda" else CPU_LAYERS
    lengths = LENGTHS[device][:1] if options.short else LENGTHS[device]
    shapes = [options.model] if options.model in SHAPES else list(SHAPES)
    repeats = options.size(REPEATS, 2)
    rows: list[list[Cell]] = []
    choose = random.Random(options.seed)
    with progress() as shown:
        total = len(shapes) * len(lengths) * len(SHARES) * repeats
        task = shown.add_task("Serving", total=total)
        for shape in shapes:
            with served(shape, layers, device) as model:
                for length in lengths:
                    for share in SHARES:
                        timings = []
                        for _ in range(repeats + 1):
                            size = model.engine.model.config.vocab_size
                            donor = [choose.randrange(size) for _ in range(length)]
                            prompt = follower(donor, share, choose, size)
                            timings.append(time_pair(model, donor, prompt, device))
                            shown.advance(task, 1 if len(timings) > 1 else 0)
                        rows.append(_row(shape, length, share, timings[1:]))  # the first warms up
    return Result(
        name="shapes",
        title="Time to first token at the shapes of larger models (random weights)",
        n={"prompts a row": repeats},
        seed=options.seed,
        model=", ".join(shapes) + (f", {layers} layers of each" if layers else ""),
        noise_floor="the spread of full prefill, in the table",
        columns=["shape", "tokens", "in common", "computed", "full ms", "spread", "reused ms",
                 "times full", "of ideal", "plan ms", "load ms", "forward ms", "head ms"],
        rows=rows,
        paper="Qwen2.5-7B and Llama3-8B on two L40S; no time is given",
        notes=_notes(device, layers),
    )  # fmt: skip


def _notes(device: str, layers: int | None) -> list[str]:
    notes = [
        f"Computed on {device}; policy `aggressive`, host tier, one prompt at a time.",
        "load: gathering the rows, turning K, copying to the device and into the cache.",
    ]
    if layers is not None:
        notes.append(
            f"With {layers} of a model's layers its head, which full prefill and reuse both need"
            " once, weighs as much more as layers are missing: the whole model is closer to the"
            " ideal than this."
        )
    return notes


def _row(shape: str, length: int, share: float, timings: list[Timing]) -> list[Cell]:
    middle = Timing(*(median(values) for values in zip(*timings, strict=True)))
    times = [timing.full for timing in timings]
    ratio = median(timing.reused / timing.full for timing in timings)
    return [
        shape, length, f"{share:.0%}", f"{middle.computed:.1%}", middle.full * 1e3,
        low_to_high(min(times) * 1e3, max(times) * 1e3, 0), middle.reused * 1e3, ratio,
        middle.computed / ratio, middle.plan * 1e3, middle.load * 1e3, middle.forward * 1e3,
        middle.head * 1e3,
    ]  # fmt: skip


def draw(result: Result) -> Figure:
    """Time with reuse as a multiple of full prefill, beside the ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    labels = [f"{row[0]}\n{row[1]} tokens\n{row[2]}" for row in result.rows]
    places = range(len(labels))
    axes.bar([at - 0.2 for at in places], [row[7] for row in result.rows], 0.4,
             color="0.7", edgecolor="black", label="measured")  # fmt: skip
    axes.bar([at + 0.2 for at in places], [row[7] * row[8] for row in result.rows], 0.4,
             color="white", edgecolor="black", hatch="//", label="share computed")  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.set_ylabel("time to first token, times full prefill")
    axes.legend()
    return figure
