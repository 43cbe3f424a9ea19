"""The numbers of `agreement` under other weightings and selections of pairs and tokens.

Nothing is computed anew: the share reused and the KL of every pair are samples of `agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from benchmarks.data.chat_prompts import Chat
from benchmarks.data.datasets import DataError
from benchmarks.harness.models import model_folder
from benchmarks.harness.result import SAMPLES, Cell, Options, Result, read
from benchmarks.harness.spread import low_to_high
from benchmarks.quality.agreement import FLOOR_EVERY, LONG
from benchmarks.quality.agreement_pairs import SimilarPair, halves
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.nodes.edits import as_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("prefix", "kvshare faithful", "kvshare balanced", "kvshare aggressive",
           "cacheblend 15%", "epic k=16")  # fmt: skip
CHOSEN_ON = 80
"""Pairs of the other half that the presets were chosen on."""
RESAMPLES = 2_000


class Pairs(NamedTuple):
    """Facts about each pair, in the order of the samples of `agreement`."""

    tokens: NDArray[np.int64]
    template: int
    """Tokens that begin every prompt."""
    tied: NDArray[np.bool_]
    """Whether it shares a text or a conversation with a pair that the presets were chosen on."""


class Way(NamedTuple):
    """One way to count."""

    name: str
    kept: NDArray[np.bool_]
    reuse_by_tokens: bool = True
    """Whether long prompts weigh more in the share reused."""
    kl_by_tokens: bool = False
    template: bool = True
    """Whether the template's tokens count."""


def measure(options: Options) -> Result:
    """Every way to count, for the presets and what they stand beside."""
    path = options.out / "agreement.json"
    samples = path.parent / SAMPLES / path.name
    if not (path.exists() and samples.exists()):
        raise DataError(f"{samples} is missing: run `python -m benchmarks run agreement` first")
    found = read(path)
    every = halves(options.data, Chat(str(model_folder(options))))
    reported, chosen_on = every["report"][: found.n["pairs"]], every["tune"][:CHOSEN_ON]
    pairs = known(reported, chosen_on)
    per_pair = {name: np.array(found.series["per_pair"][name]) for name in METHODS
                if name in found.series["per_pair"]}  # fmt: skip
    floor = float(found.series["floor"]["bf16 twice"])
    draws = np.random.default_rng(options.seed)
    return Result(
        name="agreement-weights",
        title="Agreement counted in other ways (report half)",
        n={"pairs": len(reported), "of them tied to the other half": int(pairs.tied.sum())},
        seed=options.seed,
        model=found.model,
        noise_floor=f"mean KL over 16 tokens: bf16 twice {floor:.4f}, one pair in {FLOOR_EVERY}",
        columns=["method", "counted", "pairs", "reused", "x bf16 twice", "95 % of resamples"],
        rows=[
            row(name, way, pairs, values, floor, draws)
            for name, values in per_pair.items()
            for way in ways(pairs)
        ],
        paper="not measured",
        notes=[
            "`as in agreement`: reuse by the tokens of all prompts, KL as a mean over prompts. "
            f"Resamples of the pairs ({RESAMPLES:,}); the floor is held fixed.",
            f"`without ties`: without the pairs that share a prompt, a donor or a conversation "
            f"with one of the {CHOSEN_ON} that the presets were chosen on. `without the template`: "
            f"its {pairs.template} tokens, which all prompts begin with, are not counted.",
            f"Edits per 100 tokens (runs of LCSseq.opcodes that are not equal): "
            f"{edits_per_100(reported):.1f} here, {edits_per_100(chosen_on):.1f} in those pairs.",
            *(heaviest(name, values[:, 1], floor) for name, values in per_pair.items()
              if name.startswith("kvshare")),
        ],
        series={"kl": {name: sorted(values[:, 1].tolist()) for name, values in per_pair.items()},
                "floor": floor},
        policies=found.policies,
    )  # fmt: skip


def known(reported: Sequence[SimilarPair], chosen_on: Sequence[SimilarPair]) -> Pairs:
    """Lengths, the template and ties of the pairs."""
    prompts = [as_tokens(pair.prompt) for pair in reported]
    template = min(common_prefix(prompts[0], prompt) for prompt in prompts)
    texts = {text for pair in chosen_on for text in (pair.prompt, pair.donor)}
    conversations = {_conversation(pair.id) for pair in chosen_on}
    tied = [
        pair.prompt in texts or pair.donor in texts or _conversation(pair.id) in conversations
        for pair in reported
    ]
    return Pairs(np.array([len(prompt) for prompt in prompts]), template, np.array(tied))


def _conversation(turn: str) -> str:
    """The conversation of a human turn: its id without the numbers of the part and the turn."""
    part = turn.rpartition("#")[0]
    return part.rpartition("_")[0] or part


def ways(pairs: Pairs) -> list[Way]:
    """All ways to count these pairs."""
    every = np.ones(len(pairs.tokens), bool)
    third = np.arange(len(every)) % FLOOR_EVERY == 0
    return [
        Way("as in agreement", every),
        Way("both by prompts", every, reuse_by_tokens=False),
        Way("both by tokens", every, kl_by_tokens=True),
        Way("without the template", every, template=False),
        Way("without ties", ~pairs.tied),
        Way(f"{LONG} tokens and more", pairs.tokens >= LONG),
        Way("the pairs of the floor", third),
    ]


def row(
    name: str,
    way: Way,
    pairs: Pairs,
    values: NDArray[np.float64],
    floor: float,
    draws: np.random.Generator,
) -> list[Cell]:
    """One method counted in one way. `values`: share reused and KL of each pair, [pairs, 2]."""
    lengths, share, kl = pairs.tokens[way.kept], *values[way.kept].T
    if not len(lengths):
        return [name, way.name, 0, None, None, None]
    reused, ordinary = share * lengths, np.ones(len(lengths))
    if not way.template:
        reused, lengths = np.maximum(0, reused - pairs.template), lengths - pairs.template
    share_weights = lengths if way.reuse_by_tokens else ordinary
    kl_weights = lengths if way.kl_by_tokens else ordinary
    drawn = draws.integers(len(kl), size=(RESAMPLES, len(kl)))
    means = (kl * kl_weights)[drawn].sum(1) / kl_weights[drawn].sum(1) / floor
    low, high = np.quantile(means, (0.025, 0.975))
    return [
        name, way.name, len(kl), float(np.average(reused / lengths, weights=share_weights)),
        float(np.average(kl, weights=kl_weights) / floor), low_to_high(low, high, 1),
    ]  # fmt: skip


def edits_per_100(pairs: Sequence[SimilarPair]) -> float:
    """Runs that are not equal, by tokens of the prompts."""
    edits = sum(
        op.tag != "equal" for pair in pairs for op in LCSseq.opcodes(pair.donor, pair.prompt)
    )
    return 100 * edits / sum(len(pair.prompt) for pair in pairs)


def heaviest(name: str, kl: NDArray[np.float64], floor: float) -> str:
    """How few pairs make half of the mean, and what the median pair has."""
    ranked = np.sort(kl)[::-1]
    few = int(np.searchsorted(np.cumsum(ranked), ranked.sum() / 2)) + 1
    return (
        f"{name}: half of the mean KL comes from {few} of {len(kl)} pairs; the median pair has "
        f"{np.median(kl) / floor:.1f} times the floor."
    )


def draw(result: Result) -> Figure:
    """KL of every pair, sorted, by method, with the noise floor as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    drawn = {name: kl for name, kl in result.series["kl"].items() if name != "prefix"}
    for at, (name, kl) in enumerate(drawn.items()):
        share = 100 * (np.arange(len(kl)) + 1) / len(kl)
        axes.plot(
            share, np.maximum(kl, 1e-7), color="black" if name.startswith("kvshare") else "0.55",
            linestyle=("-", "--", "-.")[at % 3], label=name,
        )  # fmt: skip
    axes.axhline(result.series["floor"], color="black", linewidth=0.6, label="noise: bf16 twice")
    axes.set_yscale("log")
    axes.set_xlabel("% of the pairs, each method sorted by itself")
    axes.set_ylabel("KL to full compute, mean over 16 tokens (nats)")
    axes.legend(fontsize=8)
    return figure
