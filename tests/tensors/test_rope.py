"""Moved K against K that was rotated once at the target position, for every supported kind of
scaling.

The tables are built from transformers' own formulas, so nothing here shares code with `Rope`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvshare_store.errors import NamespaceError, PlanError
from kvshare_store.tensors import rope as rope_module
from kvshare_store.tensors.rope import Rope

POSITIONS = 2048
HEAD_DIM = 32
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 256},
}
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Two roundings of numbers up to about 4: one when K is stored, one when it is moved."""

each_scaling = pytest.mark.parametrize("scaling", SCALINGS)
each_pairing = pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@functools.cache
def table(scaling: str, rotary_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    """cos and sin `[POSITIONS, rotary_dim / 2]`, fp64, as transformers computes them."""
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    magnitude = 1.0
    if scaling != "default":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers = pytest.importorskip("transformers")
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = transformers.LlamaConfig(
            hidden_size=2 * rotary_dim,
            num_attention_heads=2,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]},
        )
        inv_freq, magnitude = ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
    angles = torch.arange(POSITIONS, dtype=torch.float64)[:, None] * inv_freq.double()
    return angles.cos() * magnitude, angles.sin() * magnitude


def rope_of(scaling: str, neox: bool, rotary_dim: int = HEAD_DIM) -> Rope:
    cos, sin = table(scaling, rotary_dim)
    return Rope(cos.float(), sin.float(), neox=neox)


def rotated(keys: Tensor, positions: Tensor, scaling: str, neox: bool, rotary_dim: int) -> Tensor:
    """What a model stores: fp64 `keys` `[L, T, H, D]` rotated once at `positions`."""
    cos, sin = (half[positions][:, None] for half in table(scaling, rotary_dim))
    out = keys.clone()
    for pair in range(rotary_dim // 2):
        first, second = (pair, pair + rotary_dim // 2) if neox else (2 * pair, 2 * pair + 1)
        x, y = keys[..., first], keys[..., second]
        out[..., first] = x * cos[..., pair] - y * sin[..., pair]
        out[..., second] = y * cos[..., pair] + x * sin[..., pair]
    return out


def random_keys(tokens: int, heads: int = 2, layers: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(layers, tokens, heads, HEAD_DIM, generator=generator, dtype=torch.float64)


def random_positions(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, POSITIONS, (tokens,), generator=generator)


@each_scaling
@each_pairing
@each_dtype
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, HEAD_DIM // 2])
def test_moved_is_what_the_model_would_have_stored(
    scaling: str, neox: bool, dtype: torch.dtype, rotary_dim: int
) -> None:
    plain, tokens = random_keys(40), 40
    source, target = random_positions(tokens, 1), random_positions(tokens, 2)
    keys = rotated(plain, source, scaling, neox, rotary_dim).to(dtype)
    expected = rotated(plain, target, scaling, neox, rotary_dim)

    rope_of(scaling, neox, rotary_dim).move(keys, source, target)

    limit = TOLERANCE[dtype] * expected.abs().max()
    assert (keys.double() - expected).abs().max() < limit
    assert torch.equal(keys[..., rotary_dim:], plain[..., rotary_dim:].to(dtype))


@each_dtype
@each_pairing
def test_one_rounding(dtype: torch.dtype, neox: bool) -> None:
    """The result is the fp32 result, rounded once: nothing in between uses the narrow dtype."""
    source, target = random_positions(40, 3), random_positions(40, 4)
    narrow = random_keys(40).to(dtype)
    wide = narrow.float()
    rope = rope_of("yarn", neox)
    rope.move(narrow, source, target)
    rope.move(wide, source, target)
    assert torch.equal(narrow, wide.to(dtype))


@each_pairing
def test_a_rounded_table_is_divided_out(neox: bool) -> None:
    """Models in bf16 use a bf16 table, whose entries are not exactly on the unit circle."""
    cos, sin = (half.to(torch.bfloat16) for half in table("default"))
    rope = Rope(cos, sin, neox=neox)
    source, target = torch.tensor([700] * 8), torch.tensor([3] * 8)
    plain = random_keys(8).float()
    keys = plain.clone()
    zero = torch.zeros(8, dtype=torch.int64)
    rope.move(keys, zero, source)  # position 0 is exact in any table: (1, 0)
    rope.move(keys, source, target)
    rope.move(keys, target, zero)
    assert torch.allclose(keys, plain, atol=1e-5)


# --- rows that stay -------------------------------------------------------------------------------


@each_dtype
@each_pairing
@given(st.data())
def test_rows_that_stay_keep_every_bit(dtype: torch.dtype, neox: bool, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 30))
    place = st.integers(0, POSITIONS - 1)
    source = torch.tensor(data.draw(st.lists(place, min_size=tokens, max_size=tokens)))
    stays = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    moved = torch.tensor(data.draw(st.lists(place, min_size=tokens, max_size=tokens)))
    target = torch.where(stays, source, moved)
    keys = random_keys(tokens).to(dtype)
    # No arithmetic preserves a signalling NaN, a negative zero and a subnormal.
    words = keys.view(torch.int32 if dtype == torch.float32 else torch.int16)
    words[..., 0], words[..., 1] = torch.iinfo(words.dtype).min, 1
    words[..., 2] = {4: 0x7F800001, 2: 0x7F81 if dtype == torch.bfloat16 else 0x7C01}[
        words.element_size()
    ]
    before = words.clone()
    same = source == target

    rope_of("default", neox).move(keys, source, target)

    assert torch.equal(words[:, same], before[:, same])
    if not same.all():
        alone = before[:, ~same].view(dtype)
        rope_of("default", neox).move(alone, source[~same], target[~same])
        assert torch.equal(words[:, ~same], alone.view(words.dtype))


@each_pairing
@given(
    start=st.integers(0, 300),
    tokens=st.integers(1, 80),
    shift=st.integers(-300, 300),
    gap=st.integers(1, 5),
)
def test_any_shift_of_any_run(neox: bool, start: int, tokens: int, shift: int, gap: int) -> None:
    source = start + gap * torch.arange(tokens)
    target = (source + shift).clamp(0, POSITIONS - 1)
    plain = random_keys(tokens)
    keys = rotated(plain, source, "default", neox, HEAD_DIM).float()
    rope_of("default", neox).move(keys, source, target)
    expected = rotated(plain, target, "default", neox, HEAD_DIM)
    assert torch.allclose(keys.double(), expected, atol=2e-5)


# --- shapes and strides ---------------------------------------------------------------------------


@each_pairing
def test_the_k_of_canonical_rows_is_moved_in_place(neox: bool) -> None:
    rows = torch.randn(3, 2, 20, 2, HEAD_DIM)
    before = rows.clone()
    source, target = torch.arange(20), torch.arange(20) + 7
    rope_of("default", neox).move(rows[:, 0], source, target)
    alone = before[:, 0].clone()
    rope_of("default", neox).move(alone, source, target)
    assert torch.equal(rows[:, 0], alone)
    assert torch.equal(rows[:, 1], before[:, 1])
    assert not torch.equal(rows[:, 0], before[:, 0])


@each_pairing
@pytest.mark.parametrize("every", [1, 3])
def test_long_runs_are_done_in_parts(
    neox: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.arange(100)
    target = torch.where(source % every == 0, source + 50, source)
    keys = random_keys(100).float()
    at_once = keys.clone()
    rope_of("yarn", neox).move(at_once, source, target)
    monkeypatch.setattr(rope_module, "SERIAL_ELEMENTS", 2 * HEAD_DIM * 7)
    rope_of("yarn", neox).move(keys, source, target)
    assert torch.equal(keys, at_once)


def test_nothing_to_move() -> None:
    rope, none, some = rope_of("default", True), torch.empty(0, dtype=torch.int64), torch.arange(4)
    for keys, source, target in (
        (torch.empty(3, 0, 2, HEAD_DIM), none, none),
        (torch.empty(0, 4, 2, HEAD_DIM), some, 1 + some),
        (random_keys(4).float(), some, some),
    ):
        before = keys.clone()
        rope.move(keys, source, target)
        assert torch.equal(keys, before)


def test_cache_of_an_engine() -> None:
    cos, sin = table("yarn")
    rope = Rope.from_cache(torch.cat([cos, sin], dim=-1), neox=True)
    assert (rope.positions, rope.rotary_dim, rope.neox) == (POSITIONS, HEAD_DIM, True)
    assert torch.equal(rope.cos, cos)
    assert torch.equal(rope.sin, sin)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [([0, POSITIONS], [0, 1]), ([0, 1], [0, POSITIONS]), ([-1, 1], [0, 1]), ([0, 1], [0, -1])],
)
def test_positions_outside_the_table_are_refused(source: list[int], target: list[int]) -> None:
    keys = random_keys(2).float()
    before = keys.clone()
    with pytest.raises(NamespaceError, match="outside the model's RoPE table of 2048"):
        rope_of("default", True).move(keys, torch.tensor(source), torch.tensor(target))
    assert torch.equal(keys, before)


def test_shapes_that_do_not_fit_are_refused() -> None:
    rope, two, three = rope_of("default", True), torch.arange(2), torch.arange(3)
    for keys, source, target in [
        (torch.zeros(1, 2, 2, HEAD_DIM), three, three),
        (torch.zeros(1, 2, 2, HEAD_DIM), two, three),
        (torch.zeros(2, 2, HEAD_DIM), two, two),
    ]:
        with pytest.raises(PlanError):
            rope.move(keys, source, target)
    with pytest.raises(NamespaceError, match="another model"):
        rope.move(torch.zeros(1, 2, 2, HEAD_DIM - 2), two, two)
    with pytest.raises(NamespaceError, match="one shape"):
        Rope(torch.zeros(4, 2), torch.zeros(4, 3), neox=True)
    with pytest.raises(NamespaceError, match="one shape"):
        Rope(torch.zeros(0, 2), torch.zeros(0, 2), neox=True)
    with pytest.raises(NamespaceError, match="rotary_dim"):
        Rope.from_cache(torch.zeros(4, 5), neox=True)
