"""The scheduler side on its own, without engine or daemon: what is asked, promised and told."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvshare_connectors.vllm.identity as identity_module
import pytest
from kvshare_connectors.vllm.identity import namespace_of
from kvshare_connectors.vllm.planning import Planning

from kvshare_store.config import StoreConfig, policy_names
from kvshare_store.daemon import protocol
from kvshare_store.errors import DeadlineError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, ReusePlan, Run, Span
from kvshare_store.tensors.layout import KVLayout

pytestmark = pytest.mark.filterwarnings("ignore")

NAMESPACE = Namespace(model="m", layout=KVLayout(2, 1, 8, "float32"))
LENGTH = 100
PLAN = ReusePlan(
    namespace=NAMESPACE.digest,
    tokens=LENGTH,
    exact=40,
    spans=(Span(0, 40, 0, 0, 0, True), Span(50, 30, 52, 0, 52)),
    blocks=(BlockRef("ab" * 32, 128, 4096, 0),),
    donors=("d",),
    generation=1,
    lease="lease",
    saving_ms=10.0,
)
"""Forty exact tokens, ten placeholders, thirty edited tokens, and a tail of twenty."""


class FakeLink:
    """Answers every lookup with `plan`, once `late` more questions for the answer were asked."""

    def __init__(self) -> None:
        self.plan: ReusePlan | None = PLAN
        self.late = 0
        self.asked: list[tuple[str, str | None]] = []
        self.told: list[Any] = []
        self.given_up = 0

    def ask(self, tokens: Any, namespace: Namespace, policy: str | None) -> bytes | None:
        self.asked.append((namespace.digest, policy))
        return b"%d" % len(self.asked)

    def answer(self, request_id: bytes, seconds: float) -> ReusePlan | None:
        if self.late > 0:
            self.late -= 1
            raise DeadlineError("not yet")
        return self.plan

    def give_up(self, request_id: bytes) -> None:
        self.given_up += 1

    def tell(self, message: Any) -> None:
        self.told.append(message)


ids = itertools.count()


def request(**fields: Any) -> Any:
    """As much of a vLLM request as planning looks at."""
    defaults = {
        "request_id": f"request-{next(ids)}",
        "prompt_token_ids": list(range(LENGTH)),
        "num_prompt_tokens": LENGTH,
        "num_preemptions": 0,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "mm_features": [],
        "prompt_embeds": None,
        "resumable": False,
        "cache_salt": None,
        "lora_request": None,
        "kv_transfer_params": None,
        "_block_hasher": None,
    }
    return SimpleNamespace(**(defaults | fields))


def lora(name: str, path: str) -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_path=path)


def policy(name: Any) -> dict[str, Any]:
    return {"kvshare.policy": name}


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def planning(link: FakeLink) -> Planning:
    return planned(link)


def planned(link: FakeLink, **config: Any) -> Planning:
    config = {"min_saving_ms": 0.0} | config
    planning = Planning(StoreConfig(**config), NAMESPACE, link, 32)  # type: ignore[arg-type]
    planning.places_runs = True
    return planning


def finish(lease: str, reason: str, recomputed: int) -> protocol.Finish:
    return protocol.Finish(lease, protocol.Outcome(failed=reason, recomputed=recomputed))


# --- who may share --------------------------------------------------------------------------------


def test_salts_and_adapters_are_walls(planning: Planning) -> None:
    parties = [
        request(),
        request(cache_salt="a"),
        request(cache_salt="b"),
        request(lora_request=lora("a", "/x")),
        request(lora_request=lora("a", "/y")),
        request(lora_request=lora("b", "/x")),
        request(cache_salt="a", lora_request=lora("a", "/x")),
        request(cache_salt="a@/x"),
        request(cache_salt="b", lora_request=lora("a", "/x")),
    ]
    digests = [planning.state_of(party).namespace.digest for party in parties]
    assert len(set(digests)) == len(parties)


def test_the_same_salt_and_adapter_share(planning: Planning) -> None:
    party = {"cache_salt": "a", "lora_request": lora("a", "/x")}
    first, second = (planning.state_of(request(**party)).namespace for _ in range(2))
    assert first.digest == second.digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder, as far as its identity goes."""
    folder = tmp_path / "one" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "model-2.safetensors").write_bytes(b"")
    return folder


def identity(folder: Path, kv_dtype: str = "auto", tp: int = 1, rope: Any = None) -> str:
    """Digest of the namespace that an engine with this model gets."""
    spec = SimpleNamespace(dtype="torch.float32", num_kv_heads=1, head_size=8)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["0", "1"])
    text = SimpleNamespace(rope_parameters=rope)
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), revision=None, hf_text_config=text),
        cache_config=SimpleNamespace(cache_dtype=kv_dtype),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
    )
    caches = SimpleNamespace(kv_cache_groups=[group])
    return namespace_of(config, caches).digest  # type: ignore[arg-type]


def test_a_copy_of_a_model_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "two" / "model")
    assert identity(copy) == identity(model)


@pytest.mark.parametrize("at", [0, 77_777, 255_999])
@pytest.mark.parametrize("whole", [True, False], ids=["read whole", "read in slices"])
def test_one_changed_weight_makes_another_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, at: int, whole: bool
) -> None:
    monkeypatch.setattr(identity_module, "_WHOLE_BYTES", 1 << 20 if whole else 0)
    monkeypatch.setattr(identity_module, "_SLICE_BYTES", 1 << 10)
    before = identity(model)
    weights = bytearray((model / "model-1.safetensors").read_bytes())
    weights[at] ^= 1
    (model / "model-1.safetensors").write_bytes(weights)
    assert identity(model) != before


def test_what_else_makes_another_model(model: Path) -> None:
    seen = {
        identity(model),
        identity(model, kv_dtype="fp8"),
        identity(model, tp=2),
        identity(model, rope={"rope_theta": 1e6}),
    }
    (model / "config.json").write_text('{"rope_theta": 1e6}')
    seen.add(identity(model))
    (model / "model-2.safetensors").rename(model / "model-3.safetensors")
    seen.add(identity(model))
    assert len(seen) == 6


# --- what is declined -----------------------------------------------------------------------------

DECLINED = [
    ("multimodal", {"mm_features": [object()]}),
    ("multimodal", {"prompt_embeds": object()}),
    ("pooling", {"sampling_params": None}),
    ("pooling", {"prompt_token_ids": None}),
    ("prompt_logprobs", {"sampling_params": SimpleNamespace(prompt_logprobs=1)}),
    ("prompt_logprobs", {"sampling_params": SimpleNamespace(prompt_logprobs=0)}),
    ("streaming_input", {"resumable": True}),
    ("policy_off", {"kv_transfer_params": policy("off")}),
    ("unknown_policy", {"kv_transfer_params": policy("careless")}),
    ("unknown_policy", {"kv_transfer_params": policy(["exact"])}),
    ("unknown_policy", {"kv_transfer_params": policy({})}),
    ("unknown_policy", {"kv_transfer_params": policy(0)}),
    ("unknown_policy", {"kv_transfer_params": policy("")}),
]


@pytest.mark.parametrize(("reason", "fields"), DECLINED)
def test_declined_requests_are_counted_and_never_looked_up(
    planning: Planning, link: FakeLink, reason: str, fields: dict[str, Any]
) -> None:
    declined = request(**fields)
    for _ in range(2):
        assert planning.matched(declined, 0) == (0, False)
    assert link.told == [protocol.Decline(reason, LENGTH)]
    assert not link.asked


@pytest.mark.parametrize("params", [None, {}, [], "exact", 7, {"policy": "off"}, {1: 2}])
def test_other_parameters_steer_nothing(planning: Planning, link: FakeLink, params: Any) -> None:
    planning.matched(request(kv_transfer_params=params), 0)
    assert link.asked == [(NAMESPACE.digest, "balanced")]


@pytest.mark.parametrize("configured", policy_names())
@pytest.mark.parametrize("asked", [None, *policy_names()])
def test_the_stricter_policy_holds(link: FakeLink, configured: str, asked: str | None) -> None:
    """Whatever the daemon is configured for: it may have been started by a laxer engine."""
    names = policy_names()
    expected = min(configured, asked or configured, key=names.index)
    planning = planned(link, policy=configured)
    planning.matched(request(kv_transfer_params=policy(asked)), 0)
    if expected == "off":
        assert link.told == [protocol.Decline("policy_off", LENGTH)]
    else:
        assert link.asked == [(NAMESPACE.digest, expected)]


# --- what is promised -----------------------------------------------------------------------------


def test_a_plan_is_promised_up_to_its_last_span(planning: Planning) -> None:
    wanted = request()
    assert planning.matched(wanted, 0) == (80, True)
    assert planning.matched(wanted, 32) == (48, True)
    assert planning.matched(wanted, 64) == (16, False)


def test_a_scheduler_that_places_no_runs_gets_the_prefix_only(link: FakeLink) -> None:
    """Without `--scheduler-cls` a parked request would wait for ever."""
    planning = planned(link)
    planning.places_runs = False
    assert planning.matched(request(), 0) == (40, False)
    assert planning.matched(request(), 32) == (8, False)
    assert planning.matched(request(), 64) == (16, False)


def test_a_request_in_the_queue_for_long_asks_again(link: FakeLink) -> None:
    planning = planned(link, lease_seconds=0.001)
    queued = request()
    for _ in range(2):
        (state,) = planning.look_ahead([queued], busy=False)
        state.planned_at -= 1.0
    assert len(link.asked) == 2
    assert link.told == [finish("lease", "queued_too_long", LENGTH)]


def test_a_reservation_holds_for_one_step(planning: Planning) -> None:
    (state,) = planning.look_ahead([request()], busy=False)
    state.reserved = True
    planning.look_ahead([], busy=False)
    assert not state.reserved


def test_a_late_plan_is_asked_for_again_in_the_next_step(
    planning: Planning, link: FakeLink
) -> None:
    link.late = 2
    wanted = request()
    planning.look_ahead([wanted], busy=True)
    assert planning.matched(wanted, 0) == (None, False)
    assert planning.matched(wanted, 0) == (80, True)
    assert not link.given_up


def test_past_the_deadline_a_request_is_a_miss(link: FakeLink) -> None:
    planning = planned(link, plan_deadline_ms=1.0)
    link.late = 10**6
    wanted = request()
    (state,) = planning.look_ahead([wanted], busy=True)
    state.asked_at -= 1.0
    assert planning.matched(wanted, 0) == (0, False)
    assert link.given_up == 1


# --- leases ---------------------------------------------------------------------------------------


def test_a_plan_that_vllms_own_cache_makes_needless_is_given_up(
    planning: Planning, link: FakeLink
) -> None:
    assert planning.matched(request(), 96) == (0, False)
    assert link.told == [finish("lease", "engine_prefix", 4)]


def test_a_promise_that_is_not_taken_is_given_up(planning: Planning, link: FakeLink) -> None:
    wanted = request()
    planning.matched(wanted, 0)
    planning.allocated(wanted, None, 0)  # type: ignore[arg-type]
    assert link.told == [finish("lease", "not_taken", LENGTH)]
    assert planning.matched(wanted, 0) == (0, False)


def test_an_aborted_request_gives_its_plan_up_at_once(planning: Planning, link: FakeLink) -> None:
    wanted = request()
    planning.look_ahead([wanted], busy=False)
    planning.finished(wanted)
    assert link.told == [finish("lease", "aborted", LENGTH)]
    planning.finished(wanted)
    assert len(link.told) == 1


def test_a_plan_that_comes_after_its_request_has_gone_is_given_up(
    planning: Planning, link: FakeLink
) -> None:
    link.late = 2
    wanted = request()
    planning.look_ahead([wanted], busy=True)
    planning.finished(wanted)
    assert not link.told
    planning.look_ahead([], busy=False)
    assert link.told == [finish("lease", "aborted", LENGTH)]
    planning.look_ahead([], busy=False)
    assert len(link.told) == 1


def test_a_loaded_plan_is_the_workers_to_finish(planning: Planning, link: FakeLink) -> None:
    wanted = request()
    planning.matched(wanted, 0)
    blocks = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],))
    planning.allocated(wanted, blocks, 80)  # type: ignore[arg-type]
    (state,) = planning.parked
    assert state.runs == [Run(40, 50)]
    planning.finished(wanted)
    assert not planning.parked
    assert not link.told
