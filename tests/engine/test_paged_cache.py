"""Paged layouts against vLLM's own write, bit for bit.

The CPU formats are checked with real attention layers and the real kernel. The accelerator format
is pure indexing, so plain CPU tensors and a reference write stand in for the device.
"""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvshare_store.errors import LeaseError, NamespaceError, PlanError, UnsupportedError
from tests.support.paged import rows_at, write_logical

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing vLLM warns, and here warnings are errors
    pytest.importorskip("vllm.model_executor.layers.attention")

from kvshare_connectors.vllm.paged_cache import PagedCache
from vllm.config import CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:::(vllm|torch)")]

LAYERS = 3
KV_HEADS = 2
BLOCKS = 7

needs_cpu_platform = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="the CPU kernels need a CPU build of vLLM"
)
needs_amx = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX unit"
)
CPU_CASES = [
    pytest.param(torch.float32, "vec", id="fp32-vec"),
    pytest.param(torch.float16, "vec", id="fp16-vec"),
    pytest.param(torch.bfloat16, "vec", id="bf16-vec"),
    pytest.param(torch.bfloat16, "amx", id="bf16-amx", marks=needs_amx),
]


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 64,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(
        model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32"
    )
    return VllmConfig(model_config=model, cache_config=CacheConfig(block_size=32))


def cpu_layers(
    vllm_config: VllmConfig,
    dtype: torch.dtype,
    isa: str | None,
    block_size: int,
    head_dim: int,
    **layer_args: Any,
) -> dict[str, Attention]:
    """Real attention layers, their caches views of one allocation as vLLM makes them."""
    context = vllm_config.compilation_config.static_forward_context
    context.clear()
    shape = (LAYERS, BLOCKS, KV_HEADS, block_size, 2 * head_dim)
    allocation = torch.randn(shape).to(dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for index in range(LAYERS):
            with set_current_vllm_config(vllm_config):
                layer = Attention(
                    4,
                    head_dim,
                    1.0,
                    num_kv_heads=KV_HEADS,
                    cache_config=vllm_config.cache_config,
                    prefix=name_of(index),
                    **layer_args,
                )
            layer.isa = isa or _get_attn_isa(dtype, block_size, head_dim, "auto")
            layer.kv_cache = allocation[index]
    finally:
        torch.set_default_dtype(default)
    return dict(context)


def cache_of(layers: dict[str, Any], **options: Any) -> PagedCache:
    # In another order than the model's: names decide.
    caches = {name: layers[name].kv_cache for name in sorted(layers, reverse=True)}
    return PagedCache.from_context(layers, caches, **options)


def random_rows(cache: PagedCache, tokens: int) -> Tensor:
    return torch.randn(cache.layout.shape(tokens)).to(getattr(torch, cache.layout.dtype))


def shuffled_slots(cache: PagedCache, tokens: int) -> Tensor:
    return torch.randperm(cache.slots)[:tokens]


# --- the CPU formats -----------------------------------------------------------------------------


@needs_cpu_platform
@pytest.mark.parametrize(("dtype", "isa"), CPU_CASES)
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_what_the_kernel_wrote_is_read_back(
    vllm_config: VllmConfig, dtype: torch.dtype, isa: str, block_size: int, head_dim: int
) -> None:
    layers = cpu_layers(vllm_config, dtype, isa, block_size, head_dim)
    cache = cache_of(layers)
    tokens = 3 * block_size + 5
    rows, slots = random_rows(cache, tokens), shuffled_slots(cache, tokens)

    for index in range(LAYERS):
        layer = layers[name_of(index)]
        layer.impl.do_kv_cache_update(layer, rows[index, 0], rows[index, 1], layer.kv_cache, slots)

    assert torch.equal(rows_at(cache, slots), rows)
    every = cache.snapshot(range(BLOCKS)).rows(torch.arange(cache.slots))
    assert torch.equal(every[:, :, slots], rows)
    # Runs that begin and end inside a tile, a block or a group of blocks.
    for start, end in [(0, 1), (3, 29), (17, 64), (20, 150), (block_size, 3 * block_size)]:
        run = cache.snapshot(range(BLOCKS)).rows(torch.arange(start, end))
        assert torch.equal(run, every[:, :, start:end])


@needs_cpu_platform
@pytest.mark.parametrize("head_dim", [80, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_off_the_vector_width_use_vec16(
    vllm_config: VllmConfig, dtype: torch.dtype, head_dim: int
) -> None:
    layers = cpu_layers(vllm_config, dtype, None, 32, head_dim)
    assert layers[name_of(0)].isa == "vec16"
    cache = cache_of(layers)
    rows, slots = random_rows(cache, 45), shuffled_slots(cache, 45)
    cache.write(rows, slots)
    assert torch.equal(rows_at(cache, slots), rows)


@needs_cpu_platform
@pytest.mark.parametrize(("dtype", "isa"), CPU_CASES)
def test_write_touches_its_slots_only_and_skips_minus_one(
    vllm_config: VllmConfig, dtype: torch.dtype, isa: str
) -> None:
    cache = cache_of(cpu_layers(vllm_config, dtype, isa, 32, 64))
    every = torch.arange(cache.slots)
    before = rows_at(cache, every)
    rows, slots = random_rows(cache, 50), shuffled_slots(cache, 50)
    slots[::3] = -1

    cache.write(rows, slots)

    expected = before.clone()
    expected[:, :, slots[slots >= 0]] = rows[:, :, slots >= 0]
    assert torch.equal(rows_at(cache, every), expected)


@needs_cpu_platform
@pytest.mark.parametrize(("dtype", "isa"), CPU_CASES)
def test_rows_may_be_strided(vllm_config: VllmConfig, dtype: torch.dtype, isa: str) -> None:
    cache = cache_of(cpu_layers(vllm_config, dtype, isa, 32, 64))
    rows = random_rows(cache, 80).permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
    slots = shuffled_slots(cache, 40)
    cache.write(rows[:, :, ::2], slots)
    assert torch.equal(rows_at(cache, slots), rows[:, :, ::2])


@needs_cpu_platform
def test_the_head_sizes_tested_are_those_of_the_backend() -> None:
    # A size that the backend adds must be reviewed: 160 and up only repeat what 32 to 128 show.
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    assert sizes == [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]


@needs_cpu_platform
@pytest.mark.parametrize(("dtype", "isa"), CPU_CASES)
def test_layers_of_one_allocation_are_handled_at_once(
    vllm_config: VllmConfig, dtype: torch.dtype, isa: str
) -> None:
    joined = cache_of(cpu_layers(vllm_config, dtype, isa, 32, 64))
    layers = cpu_layers(vllm_config, dtype, isa, 32, 64)
    for layer in layers.values():
        layer.kv_cache = layer.kv_cache.clone()
    apart = cache_of(layers)
    assert joined._joined is not None
    assert apart._joined is None
    every = torch.arange(joined.slots)
    rows, slots = random_rows(joined, joined.slots), shuffled_slots(joined, joined.slots)
    slots[::5] = -1
    for cache in (joined, apart):
        cache.write(torch.zeros_like(rows), every)
        cache.write(rows, slots)
    assert torch.equal(rows_at(joined, every), rows_at(apart, every))


def packed_for_amx(keys: Tensor, values: Tensor) -> Tensor:
    """Reference for csrc/cpu/cpu_attn_amx.hpp, element by element: `[N, D]` each to `[2 * N * D]`.
    On a machine with an AMX unit, the tests above check the kernel itself as well."""
    tokens, dims = keys.shape
    packed = torch.empty(2 * tokens * dims, dtype=keys.dtype)
    for n in range(tokens):
        for d in range(dims):
            key = ((n // 16) * (dims // 2) + d // 2) * 32 + (n % 16) * 2 + d % 2
            value = ((d // 16) * (tokens // 2) + n // 2) * 32 + (d % 16) * 2 + n % 2
            packed[key] = keys[n, d]
            packed[tokens * dims + value] = values[n, d]
    return packed


@needs_cpu_platform
@pytest.mark.parametrize("head_dim", [32, 64])
def test_amx_tiles_are_read_and_written_on_any_cpu(vllm_config: VllmConfig, head_dim: int) -> None:
    layers = cpu_layers(vllm_config, torch.bfloat16, "amx", 32, head_dim)
    cache = cache_of(layers)
    rows = random_rows(cache, cache.slots)
    for index in range(LAYERS):
        blocks = layers[name_of(index)].kv_cache
        for block in range(BLOCKS):
            there = rows[index, :, 32 * block : 32 * (block + 1)]
            for head in range(KV_HEADS):
                packed = packed_for_amx(there[0, :, head], there[1, :, head])
                blocks[block, head] = packed.view(blocks[block, head].shape)
    every = torch.arange(cache.slots)
    assert torch.equal(rows_at(cache, every), rows)
    assert torch.equal(cache.snapshot(range(BLOCKS)).rows(every), rows)
    stored = [layers[name_of(index)].kv_cache.clone() for index in range(LAYERS)]
    cache.write(torch.zeros_like(rows), every)
    cache.write(rows, every)
    for index in range(LAYERS):
        assert torch.equal(layers[name_of(index)].kv_cache, stored[index])


# --- the accelerator format ----------------------------------------------------------------------


def logical_layers(
    dtype: torch.dtype = torch.float32, block_size: int = 16, *, token_major: bool = False
) -> dict[str, Any]:
    """Stand-ins for layers of an accelerator backend; `token_major` as in LBNHC."""

    def write(_: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        write_logical(cache, keys, values, slots)

    layers = {}
    for index in range(LAYERS):
        cache = torch.randn(BLOCKS, KV_HEADS, block_size, 48).to(dtype)
        if token_major:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        layers[name_of(index)] = SimpleNamespace(
            kv_cache=cache,
            head_size=24,
            num_kv_heads=KV_HEADS,
            sliding_window=None,
            kv_sharing_target_layer_name=None,
            attn_type="decoder",
            attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
            impl=SimpleNamespace(do_kv_cache_update=write),
        )
    return layers


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logical_round_trip(dtype: torch.dtype, token_major: bool) -> None:
    layers = logical_layers(dtype, token_major=token_major)
    cache = cache_of(layers)
    rows, slots = random_rows(cache, 33), shuffled_slots(cache, 33)
    cache.write(rows, slots)
    assert torch.equal(rows_at(cache, slots), rows)
    # The layout itself: [block, head, token, K | V].
    block, offset = int(slots[7]) // 16, int(slots[7]) % 16
    stored = layers[name_of(1)].kv_cache[block, :, offset]
    assert torch.equal(stored, torch.cat([rows[1, 0, 7], rows[1, 1, 7]], dim=-1))


def test_scheduler_blocks_made_of_several_kernel_blocks() -> None:
    cache = cache_of(logical_layers(block_size=16), block_size=16)
    # An odd number of kernel blocks cannot be whole scheduler blocks, so the last is never used.
    doubled = cache_of(logical_layers(block_size=16), block_size=32)
    rows, slots = random_rows(doubled, 64), torch.cat([torch.arange(64, 96), torch.arange(32)])
    doubled.write(rows, slots)
    assert (cache.block_size, doubled.block_size) == (16, 32)
    assert torch.equal(doubled.snapshot([2, 0]).rows(torch.arange(64)), rows)
    assert torch.equal(rows_at(doubled, slots), rows)
    with pytest.raises(UnsupportedError, match="whole kernel blocks"):
        cache_of(logical_layers(block_size=16), block_size=24)


def test_kernel_blocks_hold_what_is_scheduled() -> None:
    layers = logical_layers(block_size=16)  # vLLM may put the pages of other layers between them
    assert cache_of(layers, block_size=16, blocks=BLOCKS).slots == BLOCKS * 16
    with pytest.raises(UnsupportedError, match="do not follow one another"):
        cache_of(layers, block_size=32, blocks=BLOCKS)


# --- snapshots -----------------------------------------------------------------------------------


@pytest.fixture
def cache() -> PagedCache:
    return cache_of(logical_layers(torch.bfloat16))


def test_a_snapshot_is_independent_of_the_live_cache(cache: PagedCache) -> None:
    rows = random_rows(cache, 32)
    slots = torch.cat([torch.arange(48, 64), torch.arange(16)])
    cache.write(rows, slots)
    raw = cache.snapshot([3, 0])
    cache.write(random_rows(cache, cache.slots), torch.arange(cache.slots))
    assert torch.equal(raw.rows(torch.arange(32)), rows)


def test_positions_count_through_the_snapshot(cache: PagedCache) -> None:
    raw = cache.snapshot([5, 1, 2])
    positions = torch.tensor([40, 3, 17, 17])
    expected = rows_at(cache, torch.tensor([2 * 16 + 8, 5 * 16 + 3, 1 * 16 + 1, 1 * 16 + 1]))
    assert torch.equal(raw.rows(positions), expected)


def test_rows_go_where_they_are_wanted(cache: PagedCache) -> None:
    raw = cache.snapshot([5, 1, 2])
    positions = torch.arange(4, 44)
    wide = torch.zeros(cache.layout.shape(60), dtype=torch.bfloat16)
    out = wide[:, :, 10:50]
    assert raw.rows(positions, out=out) is out
    assert torch.equal(wide[:, :, 10:50], raw.rows(positions))
    assert not wide[:, :, :10].any()
    assert not wide[:, :, 50:].any()


def test_released_memory_serves_the_next_snapshot(cache: PagedCache) -> None:
    with cache.snapshot([1, 2, 3]) as raw:
        address = raw.buffer.data_ptr()
        kept = cache.snapshot([1])
        assert kept.buffer.data_ptr() != address
    with pytest.raises(LeaseError):
        raw.rows(torch.arange(3))
    raw.release()  # a second time: the buffer must not be lent to two snapshots
    first, second = cache.snapshot([4, 5, 6]), cache.snapshot([4, 5, 6])
    assert first.buffer.data_ptr() == address != second.buffer.data_ptr()
    assert torch.equal(first.rows(torch.arange(48)), rows_at(cache, torch.arange(64, 112)))


def test_spare_memory_is_bounded() -> None:
    whole = cache_of(logical_layers()).snapshot(range(BLOCKS)).buffer
    cache = cache_of(logical_layers(), spare_bytes=2 * len(whole) + 1)
    for raw in [cache.snapshot(range(BLOCKS)) for _ in range(4)]:
        raw.release()
    assert cache.spare.nbytes == 2 * len(whole)


def test_rows_in_another_thread_after_inference_mode(cache: PagedCache) -> None:
    with torch.inference_mode():
        raw = cache.snapshot([3, 1])
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(raw.rows(torch.arange(32))))
    thread.start()
    thread.join()
    assert torch.equal(found[0][:, :, 16:], rows_at(cache, torch.arange(16, 32)))
    raw.release()  # and a buffer made in inference mode can be used outside of it
    reused = cache.snapshot([0])
    assert torch.equal(reused.rows(torch.arange(16)), rows_at(cache, torch.arange(16)))


def test_nothing_asked_nothing_done(cache: PagedCache) -> None:
    none = torch.empty(0, dtype=torch.int64)
    cache.write(random_rows(cache, 0), none)
    assert cache.snapshot([]).rows(none).shape == cache.layout.shape(0)


# --- what is refused -----------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_is_written(cache: PagedCache) -> None:
    every = torch.arange(cache.slots)
    before = rows_at(cache, every)
    with pytest.raises(PlanError, match="slot"):
        cache.write(random_rows(cache, 2), torch.tensor([0, cache.slots]))
    with pytest.raises(PlanError, match="slot"):
        cache.write(random_rows(cache, 2), torch.tensor([0, -2]))
    with pytest.raises(NamespaceError):
        cache.write(random_rows(cache, 2), torch.arange(3))
    with pytest.raises(NamespaceError):
        cache.write(random_rows(cache, 3).float(), torch.arange(3))
    with pytest.raises(PlanError, match="block id"):
        cache.snapshot([0, BLOCKS])
    with pytest.raises(PlanError, match="block id"):
        cache.snapshot([-1])
    with pytest.raises(PlanError, match="position"):
        cache.snapshot([0]).rows(torch.tensor([16]))
    with pytest.raises(PlanError, match="rows need"):
        cache.snapshot([0]).rows(torch.arange(3), out=random_rows(cache, 4))
    assert torch.equal(rows_at(cache, every), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": torch.zeros(7, 2, 16, 48, dtype=torch.uint8)}, "uint8"),
        ({"kv_cache": torch.zeros(7, 2, 16, 48).to(torch.float8_e4m3fn)}, "float8"),
        ({"kv_cache": torch.zeros(7, 2, 16, 40)}, "is not K and V"),
        ({"kv_cache": torch.zeros(7, 16, 96)}, "tensor"),
        ({"kv_cache": []}, "tensor"),
        ({"kv_cache": torch.zeros(9, 2, 16, 48)}, "differ"),
        ({"num_kv_heads": 4}, "is not K and V"),
        ({"sliding_window": 64}, "sliding"),
        ({"kv_sharing_target_layer_name": name_of(0)}, "shared"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"impl": SimpleNamespace(alibi_slopes=torch.ones(4))}, "ALiBi"),
        ({"attn_backend": SimpleNamespace(get_name=lambda: "ROCM_ATTN")}, "ROCM_ATTN"),
        ({"attn_backend": SimpleNamespace(get_name=lambda: "CPU_ATTN")}, "CPU_ATTN"),
        (
            {"attn_backend": SimpleNamespace(get_name=lambda: "CPU_ATTN"), "isa": "neon"},
            "isa neon",
        ),
    ],
)
def test_unknown_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    layers = logical_layers()
    for field, value in changes.items():
        setattr(layers[name_of(1)], field, value)
    with pytest.raises(UnsupportedError, match=message):
        cache_of(layers)


def test_layers_must_be_attention_layers_in_a_known_order() -> None:
    layers = logical_layers()
    caches = {name: layer.kv_cache for name, layer in layers.items()}
    with pytest.raises(UnsupportedError, match="no KV cache"):
        PagedCache.from_context(layers, {})
    with pytest.raises(UnsupportedError, match="no attention layer"):
        PagedCache.from_context({}, caches)
    with pytest.raises(UnsupportedError, match="place of layer"):
        PagedCache.from_context(layers, {"model.attn": caches[name_of(0)]})
    with pytest.raises(UnsupportedError, match="several KV caches"):
        PagedCache.from_context(layers, {**caches, "model.layers.1.cross": caches[name_of(1)]})


@needs_cpu_platform
def test_windows_and_alibi_of_real_layers_are_seen(vllm_config: VllmConfig) -> None:
    windowed = cpu_layers(vllm_config, torch.float32, None, 32, 64, per_layer_sliding_window=16)
    with pytest.raises(UnsupportedError, match="sliding"):
        cache_of(windowed)
    alibi = cpu_layers(vllm_config, torch.float32, None, 32, 64, alibi_slopes=[0.5] * 4)
    with pytest.raises(UnsupportedError, match="ALiBi"):
        cache_of(alibi)
