"""What the measurements of the store are made of: every way does the same work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.model import KVShareModel

from benchmarks import async_files, codecs, pipelining, startup, tiers
from benchmarks.machines import reused_after
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.blocks.tiers.host.arena import Arena
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.config import StoreConfig
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
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


def test_a_lossless_codec_changes_no_row_and_a_lossy_one_little() -> None:
    layout = KVLayout(2, 2, 8, "bfloat16")
    rows = torch.randn(layout.shape(100), dtype=torch.bfloat16)
    for codec in ("none", "zstd", "planes"):
        assert torch.equal(codecs.rounded(rows, layout, codec), rows)  # type: ignore[arg-type]
    for codec, most in (("int8", 0.03), ("fp8", 0.2)):
        changed = codecs.rounded(rows, layout, codec)  # type: ignore[arg-type]
        difference = (changed - rows).abs().max()
        assert 0 < difference < most


def test_a_lossy_codec_costs_more_than_no_codec() -> None:
    engine, tokens = RowEngine(tiny_model("LlamaConfig")), prompt_of(60)
    assert codecs.kl_of_next(engine, tokens, None) == pytest.approx(0, abs=1e-5)
    assert codecs.kl_of_next(engine, tokens, "fp8") > 1e-6


def test_arms_put_and_get_everything(tmp_path: Path) -> None:
    named = tiers.make_blocks(2)
    kept: list[Tier] = []

    async def make() -> Tier:
        kept.append(HostTier(Arena.create(1 << 23)))
        return kept[-1]

    (tmp_path / "files").mkdir()
    for arm in (
        tiers.memcpy(named),
        tiers.through(make, named, lambda: None),
        tiers.raw_files(tmp_path / "files", named),
    ):
        put, got = arm()
        assert put > 0
        assert got > 0
    assert list((tmp_path / "files").iterdir()) == []
    assert kept[0].use().blocks == 0


def test_both_ways_with_files_leave_the_same_files(tmp_path: Path) -> None:
    """Byte for byte, in the same places; each way reads what the other wrote."""
    named = tiers.make_blocks(2)

    async def written(kind: type[DiskTier], folder: Path) -> dict[str, bytes]:
        tier = await kind.open(folder, 1 << 24)
        for name, block in named:
            await tier.put(name, block)
        for name, block in named:
            assert (await tier.get(name)).data == block.data
        await tier.close()
        found = (folder / "blocks").glob("*/*")
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    async def read(kind: type[DiskTier], folder: Path) -> None:
        tier = await kind.open(folder, 1 << 24)
        for name, block in named:
            assert (await tier.get(name)).data == block.data
        await tier.close()

    ours = asyncio.run(written(DiskTier, tmp_path / "ours"))
    theirs = asyncio.run(written(async_files.AsyncDiskTier, tmp_path / "theirs"))
    assert ours == theirs
    assert len(ours) == 2
    asyncio.run(read(DiskTier, tmp_path / "theirs"))
    asyncio.run(read(async_files.AsyncDiskTier, tmp_path / "ours"))


def test_a_filled_home_answers_with_its_last_prompt(home: Path) -> None:
    with Store(StoreConfig(home=str(home), host_bytes=1 << 20, semantic="never")):
        pass
    (home / "blocks").rmdir()
    prompt = startup.fill(home, 64)
    ((opened, answered, counted),) = startup.starts(home, prompt, 1)
    assert 0 < opened < answered < counted


def test_waiting_for_another_machine_ends() -> None:
    class Late:
        asked = 0

        def serve(self, seed: int) -> int:
            self.asked += 1
            return 63 if self.asked == 3 else 0

    late = Late()
    assert reused_after(late, 1) > 0  # type: ignore[arg-type]
    assert late.asked == 3
