"""Rows loaded layer by layer give the same logits."""

from __future__ import annotations

from pathlib import Path

import torch
from kvshare_connectors.transformers.model import KVShareModel

from benchmarks.store import pipelining
from kvshare_store.config import StoreConfig
from kvshare_store.store import Store
from tests.transformers.tiny import prompt_of, tiny_model


def test_every_way_of_loading_gives_the_same_logits(home: Path) -> None:
    config = StoreConfig(home=str(home), policy="aggressive", semantic="never", disk=False,
                         block_tokens=16, host_bytes=1 << 22, min_saving_ms=-1e9)  # fmt: skip
    donor = prompt_of(60)
    tokens = [*donor[:20], 7, 8, 9, *donor[22:]]
    with KVShareModel(tiny_model("LlamaConfig"), Store(config)) as model:
        model.save(model.prefill(donor, policy="off"))
        plan = model.store.plan(tokens, model.namespace)
        assert any(span.source != span.start for span in plan.spans), "K must be turned"
        whole, *others = [pipelining.serve(model, plan, tokens, way)[1] for way in pipelining.WAYS]
    for logits in others:
        assert torch.equal(logits, whole)
