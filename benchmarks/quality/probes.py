"""Edit probes: one fact changed. Does the answer follow the new value, also where text that was not
edited depends on it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from kvshare_connectors.transformers.engine import RowEngine
from torch import Tensor

from benchmarks.data import datasets
from benchmarks.harness.result import Options, Result
from benchmarks.methods.base import Donor, Method, Prefilled, full_compute, in_two_chunks
from benchmarks.methods.compared import (
    BF16,
    FULL,
    NOISE,
    delimiters_of,
    engine_for,
    lineup,
    steps,
)
from benchmarks.methods.kvshare import kvshare
from benchmarks.quality.probe_prompts import Filler, Probe, probes
from benchmarks.quality.probe_table import Probed, Seen, draw, table
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.nodes.edits import as_tokens

if TYPE_CHECKING:
    from benchmarks.data.chat_prompts import Chat

__all__ = ["draw", "measure"]


def measure(options: Options) -> Result:
    """The methods on the report half; wider windows on the tune half."""
    engine, chat, model = engine_for(options)
    pairs = options.size(32, 1)
    tuned = _probed(engine, chat, options, pairs // 2 or 1, tune=True)
    found = _probed(engine, chat, options, pairs, tune=False)
    del engine
    half, _, _ = engine_for(options, torch.bfloat16)
    with steps("Full compute in bf16", len(found)) as step:
        for one in found:
            one.arms[BF16] = _seen(full_compute(half, one.probe.request), one.probe)
            step(1)
    return table(found, tuned, options, model)


def _probed(
    engine: RowEngine, chat: Chat, options: Options, pairs: int, *, tune: bool
) -> list[Probed]:
    """Every probe under every method. The halves share no text and no draw."""
    texts = datasets.minilongbench(options.data, "gov_report" if tune else "multi_news")
    filler = Filler(chat, [text.text for text in texts])
    made = probes(chat, filler, pairs, 2 * options.seed + tune)
    made = [probe for probe in made if not tune or probe.question != "direct"]
    methods = _candidates(engine) if tune else lineup(engine, short=options.short)
    found = []
    last: tuple[Donor, Donor] | None = None
    with steps("Tuning" if tune else "Probing", len(made)) as step:
        for probe in made:
            request, donor = (
                _extended(engine, tokens, before)
                for tokens, before in zip(
                    (probe.request, probe.donor), last or (None, None), strict=True
                )
            )
            last = _donor(probe.request, request), _donor(probe.donor, donor)
            found.append(_ask(engine, probe, request, donor, methods, chunked=not tune))
            step(1)
    return found


def _candidates(engine: RowEngine) -> list[Method]:
    """`faithful` as it is, and with windows up to all that follows an edit."""
    delimiters = delimiters_of(engine)
    windows = ({}, {"edit_window": 128}, {"edit_window": 320}, {"edit_window": 100_000})
    return [kvshare("faithful", delimiters, **changes) for changes in windows]


def _extended(engine: RowEngine, tokens: Sequence[int], before: Donor | None) -> Prefilled:
    """Full compute, from where a prompt computed before is the same: two questions, one text."""
    shared = 0
    if before is not None:
        shared = common_prefix(as_tokens(tokens), as_tokens(before.tokens))
        shared = min(shared, len(tokens) - 1)
    if before is None or not shared:
        return full_compute(engine, tokens)
    cache = engine.cache(len(tokens))
    cache.rows[:, :, 0, :shared] = before.keys_values[:, :, :shared]
    logits = engine.partial(cache, tokens, torch.arange(shared, len(tokens)))
    return Prefilled(cache, logits, 0, len(tokens))


def _donor(tokens: tuple[int, ...], ready: Prefilled) -> Donor:
    return Donor(tokens, ready.cache.rows[:, :, 0])


def _ask(
    engine: RowEngine,
    probe: Probe,
    request: Prefilled,
    donor: Prefilled,
    methods: Sequence[Method],
    *,
    chunked: bool,
) -> Probed:
    said_old = int(donor.logits.argmax()) == probe.old
    one = Probed(probe, _seen(request, probe), _seen(donor, probe), said_old)
    one.arms[FULL] = one.oracle
    if chunked and one.leans:
        one.arms[NOISE] = _seen(in_two_chunks(engine, probe.request), probe)
    # nothing is learnt from what full compute cannot do
    for method in methods if one.leans else ():
        ready = method.prefill(engine, probe.request, [_donor(probe.donor, donor)])
        one.arms[method.name] = _seen(ready, probe)
    return one


def _seen(ready: Prefilled, probe: Probe) -> Seen:
    said: Tensor = ready.logits.log_softmax(-1)
    margin = float(said[probe.new] - said[probe.old])
    return Seen(margin, int(said.argmax()) == probe.new, ready.reused / len(probe.request))
