"""Adapters as peft makes them, on an engine whose worker has room for one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engine.harness import Engine, Fresh, half
from tests.support.short_model import short_model

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 120
LITTLE = 24
"""A step's token budget, which the placeholders here exceed."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two adapters that change every answer, each in another way."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    made = []
    for number in (1, 2):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(str(short_model()), dtype=torch.float32)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(base, config)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.data.mul_(0.3)
        folder = tmp_path_factory.mktemp(f"adapter-{number}")
        model.save_pretrained(str(folder))
        made.append(LoRARequest(f"adapter-{number}", number, str(folder)))
    return made


@pytest.fixture(scope="module")
def plain_rows_stay_plain() -> Iterator[None]:
    """vLLM's CPU operations take -1, which means no adapter, for the last adapter: if a request
    without an adapter shares a step with one that has one, it is answered with that adapter's
    weights."""
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = punica_cpu.sgmv_shrink

    def mended(x: Any, weights: Any, out: Any, starts: Any, lengths: Any, *rest: Any) -> None:
        shrink(x, weights, out, starts, lengths, *rest)
        adapters = rest[0]
        out[(adapters < 0).repeat_interleave(lengths)] = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(punica_cpu, "sgmv_shrink", mended)
        yield


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, adapters: list[Any], plain_rows_stay_plain: None
) -> Iterator[Engine]:
    engine = Engine(  # after the adapters: peft needs no engine in its process
        tmp_path_factory.mktemp("home"),
        kvshare={"policy": "aggressive"},
        enable_prefix_caching=True,
        max_num_batched_tokens=512,
        max_num_seqs=10,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=2,
        max_lora_rank=8,
    )
    yield engine
    engine.close()


def test_parked_requests_of_two_adapters_with_room_for_one(
    engine: Engine, fresh: Fresh, adapters: list[Any]
) -> None:
    """Similar prompts of several adapters, interleaved: each gets the rows and weights of its
    own."""
    prompts = [fresh(LENGTH) for _ in range(2)]
    asked = [(prompt, lora) for prompt in prompts for lora in [*adapters, None]]
    full = [engine.ask(prompt, policy="off", lora=lora) for prompt, lora in asked]
    assert len({tuple(answer.tokens) for answer in full}) > len(prompts)
    for prompt, lora in asked:
        engine.store(prompt, policy="exact", lora=lora)
    for budget in (LITTLE, None):
        engine.forget()
        with engine.counted() as gained, engine.keeping(half), engine.budget(tokens=budget):
            names = [engine.add(prompt, lora=lora) for prompt, lora in asked]
            answers = engine.drain()
        assert gained["hits_edited"] == len(asked)
        for name, plain in zip(names, full, strict=True):
            assert answers[name][0].agrees(plain)


def test_exact_rows_of_an_adapter_are_its_own(
    engine: Engine, fresh: Fresh, adapters: list[Any]
) -> None:
    prompt = fresh(LENGTH)
    first, second = adapters
    full = {lora: engine.ask(prompt, policy="off", lora=lora) for lora in (first, second)}
    engine.clear()
    engine.store(prompt, lora=first)
    engine.forget()
    with engine.counted() as gained:
        other = engine.ask(prompt, policy="exact", lora=second)
        own = engine.ask(prompt, policy="exact", lora=first)
    assert gained["hits_exact"] == 1
    assert own.agrees(full[first])
    assert other.agrees(full[second])
    assert own.difference(other) > 0.01


def test_an_adapter_that_was_replaced_has_none_of_the_old_ones_rows(
    engine: Engine, fresh: Fresh, adapters: list[Any], tmp_path: Path
) -> None:
    """vLLM's own prefix cache knows both by the same name and path."""
    prompt, path = fresh(LENGTH), tmp_path / "adapter"
    old, new = adapters
    full = engine.ask(prompt, policy="off", lora=new)
    shutil.copytree(old.lora_path, path)
    loaded = msgspec.structs.replace(old, lora_name="both", lora_int_id=11, lora_path=str(path))
    engine.store(prompt, lora=loaded)
    engine.core.remove_lora(11)
    shutil.rmtree(path)
    shutil.copytree(new.lora_path, path)
    again = msgspec.structs.replace(loaded, lora_int_id=12)
    assert engine.store(prompt, lora=again).agrees(full)
    engine.forget()
    stored = engine.ask(prompt, lora=again)
    assert stored.said["exact"] == LENGTH - 1
    assert stored.agrees(full)
