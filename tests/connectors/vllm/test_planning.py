"""The scheduler side alone, without engine or daemon: what it asks, promises and reports."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvshare_connectors.vllm.adapters as adapters_module
import kvshare_connectors.vllm.identity as identity_module
import msgspec
import pytest
import torch
from huggingface_hub import constants
from kvshare_connectors.vllm.identity import namespace_of
from kvshare_connectors.vllm.orders import from_first
from kvshare_connectors.vllm.planning import Planning
from kvshare_connectors.vllm.requests import Reserved

from kvshare_store.config import StoreConfig, policy_names
from kvshare_store.daemon import protocol
from kvshare_store.errors import ConfigError
from kvshare_store.namespace import Namespace, Tenants
from kvshare_store.plan import Outcome
from kvshare_store.plan.spans import Run
from tests.engine.schedulers import LENGTH, NAMESPACE, PLAN, FakeLink

pytestmark = pytest.mark.filterwarnings("ignore")

ids = itertools.count()


def sampling(**fields: Any) -> Any:
    """vLLM's own class, so that a name it does not have fails here."""
    from vllm import SamplingParams

    return SamplingParams(**fields)


def request(**fields: Any) -> Any:
    """The parts of a vLLM request that planning reads."""
    defaults = {
        "request_id": f"request-{next(ids)}",
        "prompt_token_ids": list(range(LENGTH)),
        "num_prompt_tokens": LENGTH,
        "num_output_tokens": 0,
        "num_preemptions": 0,
        "num_computed_tokens": 0,
        "prefill_stats": None,
        "status": None,
        "sampling_params": sampling(),
        "mm_features": [],
        "prompt_embeds": None,
        "resumable": False,
        "cache_salt": None,
        "lora_request": None,
        "kv_transfer_params": None,
        "_block_hasher": None,
        "block_hashes": [],
        "update_block_hashes": lambda: None,
    }
    return SimpleNamespace(**(defaults | fields))


def lora(name: str, path: Path | str, number: int = 1, inplace: bool = False) -> SimpleNamespace:
    """The parts of a vLLM LoRARequest that planning reads."""
    return SimpleNamespace(
        lora_name=name, lora_path=str(path), lora_int_id=number, load_inplace=inplace
    )


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
    planning.place_runs(lambda request: True, exact_only=False)
    return planning


def declined_as(reason: str, request: Any, namespace: Namespace = NAMESPACE) -> protocol.Decline:
    return protocol.Decline(reason, LENGTH, request.request_id, namespace)


def finish(lease: str, reason: str, recomputed: int, cached: int = 0) -> protocol.Finish:
    outcome = Outcome(failed=reason, recomputed=recomputed, cached=cached)
    return protocol.Finish(lease, outcome)


# --- pools ----------------------------------------------------------------------------------------


def test_plans_may_use_the_pools_of_the_engine_unless_the_request_declines(link: FakeLink) -> None:
    planning = planned(link, pools="house, annex")
    for params in (None, {"kvshare.pools": True}, {"kvshare.pools": False}):
        planning.look_ahead([request(kv_transfer_params=params)], busy=False)
    assert link.pools == [("house", "annex")] * 2 + [()]


def test_a_second_look_uses_no_pool(link: FakeLink) -> None:
    planning = planned(link, pools="house")
    state = planning.state_of(request())
    state.look = True
    planning.lookups.ask(state)
    assert link.pools == [()]


def test_an_engine_that_fills_a_pool_has_requests_of_nobody_else(link: FakeLink) -> None:
    planning = Planning(StoreConfig(), NAMESPACE, link, 32, pool="house")  # type: ignore[arg-type]
    for salt in (None, "ann"):
        state = planning.state_of(request(cache_salt=salt))
        assert state.namespace == NAMESPACE.in_pool("house")
        planning.reset()
        assert state.namespace.pool == "house"
        planning = Planning(StoreConfig(), NAMESPACE, link, 32, pool="house")  # type: ignore[arg-type]


# --- who may share --------------------------------------------------------------------------------


def adapter_in(folder: Path, content: bytes = b"weights") -> Path:
    """Write the adapter files that its identity depends on."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_in(tmp_path / "adapter")


def change(file: Path) -> None:
    """Change one byte, as further training would: the size stays, the time stamp changes."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


def test_salts_and_adapters_are_walls(planning: Planning, tmp_path: Path) -> None:
    x, y = adapter_in(tmp_path / "x"), adapter_in(tmp_path / "y", b"others")
    parties = [
        request(),
        request(cache_salt="a"),
        request(cache_salt="b"),
        request(lora_request=lora("a", x, 1)),
        request(lora_request=lora("a", y, 2)),
        request(lora_request=lora("b", x, 3)),
        request(cache_salt="a", lora_request=lora("a", x, 1)),
        request(cache_salt=f"a@{x}"),
        request(cache_salt="b", lora_request=lora("a", x, 1)),
    ]
    states = [planning.state_of(party) for party in parties]
    assert len({state.namespace.digest for state in states}) == len(parties)
    assert not any(state.declined for state in states)


def test_the_same_salt_and_adapter_share(planning: Planning, adapter: Path) -> None:
    party = {"cache_salt": "a", "lora_request": lora("a", adapter)}
    first, second = (planning.state_of(request(**party)).namespace for _ in range(2))
    assert first.digest == second.digest


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("way", ["another engine", "another id", "in place"])
def test_one_changed_byte_makes_another_adapter(
    link: FakeLink, adapter: Path, file: str, way: str
) -> None:
    """Whatever makes vLLM read the files again."""
    planning = planned(link)
    before = planning.state_of(request(lora_request=lora("a", adapter)))
    change(adapter / file)
    if way == "another engine":
        planning = planned(link)
    again = lora("a", adapter, 2 if way == "another id" else 1, inplace=way == "in place")
    after = planning.state_of(request(lora_request=again))
    assert after.namespace.digest != before.namespace.digest
    assert not before.declined
    assert not after.declined


def test_an_adapter_whose_files_change_while_it_is_loaded_is_declined(
    planning: Planning, link: FakeLink, adapter: Path
) -> None:
    """vLLM keeps using what it has loaded until something makes it read the files again."""
    weights = adapter / "adapter_model.safetensors"
    trained = weights.read_bytes()
    before = planning.state_of(request(lora_request=lora("a", adapter)))
    change(weights)
    changed = request(lora_request=lora("a", adapter))
    assert planning.matched(changed, 0) == (0, False)
    space = planning.state_of(changed).namespace
    assert link.told == [declined_as("adapter_changed", changed, space)]
    assert not link.asked
    assert space.digest != before.namespace.digest
    weights.write_bytes(trained)
    restored = planning.state_of(request(lora_request=lora("a", adapter)))
    assert restored.namespace.digest == before.namespace.digest
    assert not restored.declined


@pytest.mark.parametrize("inplace", [False, True])
def test_a_prompt_is_not_stored_whose_adapter_has_changed_meanwhile(
    planning: Planning, adapter: Path, inplace: bool
) -> None:
    saves = []
    for changed in (False, True):
        wanted = request(lora_request=lora("a", adapter, inplace=inplace))
        planning.state_of(wanted).looked_up = True
        if changed:
            change(adapter / "adapter_model.safetensors")
        saves.append(len(planning.build_metadata(prefilled(wanted)).saves))
    assert saves == [1, 0]


def prefilled(wanted: Any) -> Any:
    """The output of vLLM's scheduler for a step that computes a whole prompt."""
    new = SimpleNamespace(req_id=wanted.request_id, num_computed_tokens=0)
    return SimpleNamespace(
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={wanted.request_id: LENGTH},
        kv_connector_block_state=SimpleNamespace(resolve_block_ids=lambda name: ([1, 2, 3, 4],)),
    )


def test_an_adapter_is_read_once_and_then_looked_at(
    planning: Planning, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def reading(*arguments: Any) -> str:
        read.append(arguments)
        return identity_module.fingerprint(*arguments)

    monkeypatch.setattr(adapters_module, "fingerprint", reading)
    for _ in range(3):
        planning.state_of(request(lora_request=lora("a", adapter)))
    os.utime(adapter / "adapter_config.json", ns=(1, 1))
    assert not planning.state_of(request(lora_request=lora("a", adapter))).declined
    assert len(read) == 2


@pytest.mark.parametrize("there", ["nothing", "no weights"])
def test_an_adapter_whose_files_are_not_to_be_found_is_declined(
    planning: Planning, link: FakeLink, tmp_path: Path, there: str
) -> None:
    if there == "no weights":
        adapter_in(tmp_path / "x")
        (tmp_path / "x" / "adapter_model.safetensors").unlink()
    wanted = request(lora_request=lora("a", tmp_path / "x"))
    space = planning.state_of(wanted).namespace
    assert link.told == [declined_as("adapter_unknown", wanted, space)]


def test_an_adapter_from_the_hub_is_known_once_it_is_downloaded(
    planning: Planning, hub: Path
) -> None:
    wanted = lora("a", "org/adapter")
    assert planning.state_of(request(lora_request=wanted)).declined == "adapter_unknown"
    adapter_in(downloaded(hub, "org/adapter", "1" * 40))
    first = planning.state_of(request(lora_request=wanted))
    adapter_in(downloaded(hub, "org/adapter", "2" * 40), b"others")
    second = planning.state_of(request(lora_request=lora("a", "org/adapter", 2)))
    assert first.declined == second.declined == ""
    assert first.namespace.digest != second.namespace.digest


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub: HF_HUB_CACHE, which is read when it is imported."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def downloaded(hub: Path, repository: str, commit: str, revision: str = "main") -> Path:
    """Where the hub's client keeps a commit, and that a branch or tag is at it. Not made yet."""
    kept = hub / f"models--{repository.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True, exist_ok=True)
    (kept / "refs" / revision).write_text(commit)
    return kept / "snapshots" / commit


def model_in(folder: Path) -> Path:
    """The files of a model, as far as its identity goes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "model-2.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "one" / "model")


def namespace_for(
    model: Path | str,
    kv_dtype: str = "auto",
    tp: int = 1,
    rope: Any = None,
    loading: dict[str, Any] | None = None,
    **fields: Any,
) -> Namespace:
    """The namespace of an engine with this model; `loading` and `fields` are of vLLM's load and
    model configuration."""
    spec = SimpleNamespace(dtype=torch.float32, num_kv_heads=1, head_size=8)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["0", "1"])
    plain = {
        "model": str(model),
        "revision": None,
        "hf_text_config": SimpleNamespace(rope_parameters=rope),
        "hf_config": SimpleNamespace(to_dict=lambda: {"hidden_size": 8}),
        "quantization": None,
        "quantization_config": None,
        "hf_overrides": {},
        "hf_config_path": None,
        "model_class_overrides": {},
        "model_weights": "",
    }
    load = {"download_dir": None, "load_format": "auto", "model_loader_extra_config": {}}
    config = SimpleNamespace(
        model_config=SimpleNamespace(**(plain | fields)),
        load_config=SimpleNamespace(**(load | (loading or {}))),
        cache_config=SimpleNamespace(cache_dtype=kv_dtype),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
    )
    caches = SimpleNamespace(kv_cache_groups=[group])
    return namespace_of(config, caches)  # type: ignore[arg-type]


def identity(model: Path | str, **options: Any) -> str:
    """Digest of that namespace."""
    return namespace_for(model, **options).digest


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


def altered(to: int) -> SimpleNamespace:
    """The model's configuration, once something has overridden it."""
    return SimpleNamespace(to_dict=lambda: {"hidden_size": to})


OTHERWISE: list[dict[str, Any]] = [
    {"kv_dtype": "fp8"},
    {"tp": 2},
    {"rope": {"rope_theta": 1e6}},
    {"quantization": "fp8"},
    {"quantization": "bitsandbytes"},
    {"quantization": "fp8", "quantization_config": {"ignore": ["lm_head"]}},
    {"hf_overrides": {"hidden_act": "relu"}, "hf_config": altered(8)},
    {"hf_overrides": lambda config: config, "hf_config": altered(9)},
    {"hf_config_path": "elsewhere", "hf_config": altered(10)},
    {"model_class_overrides": {"LlamaForCausalLM": "mine:Llama"}},
    {"model_weights": "s3://bucket/model"},
    {"loading": {"load_format": "dummy"}},
    {"loading": {"model_loader_extra_config": {"pattern": "*.safetensors"}}},
]
"""Other ways of running the same files: none may be served rows of another."""


def test_what_else_makes_another_model(model: Path) -> None:
    seen = [identity(model), *(identity(model, **options) for options in OTHERWISE)]
    (model / "config.json").write_text('{"rope_theta": 1e6}')
    seen.append(identity(model))
    (model / "model-2.safetensors").rename(model / "model-3.safetensors")
    seen.append(identity(model))
    (model / "model-4.pt").write_bytes(b"weights")
    seen.append(identity(model))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("options", OTHERWISE[3:], ids=", ".join)
def test_another_engine_that_runs_them_in_that_way_shares(
    model: Path, options: dict[str, Any]
) -> None:
    assert identity(model, **options) == identity(model, **options)


# --- models of the hub ----------------------------------------------------------------------------

COMMIT, LATER = "1" * 40, "2" * 40


def test_a_model_of_the_hub_is_known_by_its_weights(hub: Path) -> None:
    folder = model_in(downloaded(hub, "org/model", COMMIT))
    found = namespace_for("org/model")
    assert found.model == "org/model"
    assert found.tokenizer == str(folder)
    assert found.revision == identity_module.fingerprint(folder)
    (folder / "model-1.safetensors").write_bytes(b"retrained")
    assert identity("org/model") != found.digest


def test_the_hubs_name_and_the_folder_it_was_downloaded_to_are_one_model(hub: Path) -> None:
    """When it is offline, vLLM itself replaces the name by the folder."""
    folder = model_in(downloaded(hub, "org/model", COMMIT))
    assert namespace_for("org/model") == namespace_for(folder)


def test_revisions_of_a_model_of_the_hub(hub: Path) -> None:
    model_in(downloaded(hub, "org/model", COMMIT, "v1"))
    later = model_in(downloaded(hub, "org/model", LATER))
    change(later / "model-1.safetensors")
    assert identity("org/model", revision="v1") == identity("org/model", revision=COMMIT)
    assert identity("org/model") == identity("org/model", revision=LATER)
    assert identity("org/model") != identity("org/model", revision="v1")


def test_a_model_of_the_hub_in_another_folder(hub: Path, tmp_path: Path) -> None:
    model_in(downloaded(tmp_path / "mine", "org/model", COMMIT))
    found = namespace_for("org/model", loading={"download_dir": str(tmp_path / "mine")})
    assert found.tokenizer.startswith(str(tmp_path / "mine"))


def test_a_snapshot_without_weights_is_known_by_its_commit(hub: Path) -> None:
    """The weights were loaded from elsewhere, but belong to that commit."""
    seen = set()
    for commit in (COMMIT, LATER):
        folder = downloaded(hub, "org/model", commit)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        seen.add(namespace_for("org/model").revision)
    assert seen == {COMMIT, LATER}


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("name", ["org/model", "s3://bucket/model", "a/b/c"])
def test_what_is_not_there_is_known_by_its_name_and_revision(
    hub: Path, name: str, revision: str | None
) -> None:
    found = namespace_for(name, revision=revision)
    assert (found.model, found.revision) == (name, revision or "main")
    assert found.tokenizer == ""


# --- what is declined -----------------------------------------------------------------------------

DECLINED = [
    ("multimodal", {"mm_features": [object()]}),
    ("multimodal", {"prompt_embeds": object()}),
    ("pooling", {"sampling_params": None}),
    ("pooling", {"prompt_token_ids": None}),
    ("prompt_logprobs", {"sampling_params": sampling(prompt_logprobs=1)}),
    ("prompt_logprobs", {"sampling_params": sampling(prompt_logprobs=0)}),
    ("prompt_logprobs", {"sampling_params": sampling(prompt_logprob_token_ids=[[1, 2]])}),
    ("streaming_input", {"resumable": True}),
    ("policy_off", {"kv_transfer_params": policy("off")}),
    ("unknown_policy", {"kv_transfer_params": policy("careless")}),
    ("unknown_policy", {"kv_transfer_params": policy(["exact"])}),
    ("unknown_policy", {"kv_transfer_params": policy({})}),
    ("unknown_policy", {"kv_transfer_params": policy(0)}),
    ("unknown_policy", {"kv_transfer_params": policy("")}),
]


def test_an_engine_says_when_it_has_requests(planning: Planning, link: FakeLink) -> None:
    requests = [request(), request()]
    for each in requests:
        planning.state_of(each)
        planning.state_of(each)
    assert link.busy == [True]
    planning.finished(requests[0])
    assert link.busy == [True]
    planning.finished(requests[1])
    assert link.busy == [True, False]


@pytest.mark.parametrize(("reason", "fields"), DECLINED)
def test_declined_requests_are_counted_and_never_looked_up(
    planning: Planning, link: FakeLink, reason: str, fields: dict[str, Any]
) -> None:
    declined = request(**fields)
    for _ in range(2):
        assert planning.matched(declined, 0) == (0, False)
    assert link.told == [declined_as(reason, declined)]
    assert not link.asked


def test_a_declined_request_says_whose_it_is(planning: Planning, link: FakeLink) -> None:
    wanted = request(request_id="r" * 200, cache_salt="alice", kv_transfer_params=policy("off"))
    planning.state_of(wanted)
    assert link.told == [
        protocol.Decline("policy_off", LENGTH, "r" * 128, NAMESPACE.for_tenant("alice"))
    ]


@pytest.mark.parametrize("fields", [{}, {"kv_transfer_params": policy("off")}])
def test_what_vllms_own_cache_had_of_a_miss_is_told_once(
    planning: Planning, link: FakeLink, fields: dict[str, Any]
) -> None:
    """It is reported when vLLM takes the request; before that, vLLM may ask several times."""
    link.plan = None
    wanted = request(**fields)
    for _ in range(2):
        assert planning.matched(wanted, 64) == (0, False)
    declined = [declined_as("policy_off", wanted)] if fields else []
    assert link.told == declined
    for _ in range(2):
        planning.allocated(wanted, None, 0)  # type: ignore[arg-type]
    assert link.told == [*declined, protocol.EngineCached(64, wanted.request_id)]


def test_a_preempted_requests_generated_tokens_are_no_tokens_of_its_prompt(
    planning: Planning, link: FakeLink
) -> None:
    """vLLM's own cache may give it back both. Its answer counts the prompt alone."""
    link.plan = None
    wanted = request(num_preemptions=1, num_output_tokens=40)
    assert planning.matched(wanted, LENGTH + 32) == (0, False)
    planning.allocated(wanted, None, 0)  # type: ignore[arg-type]
    assert link.told == [protocol.EngineCached(LENGTH, wanted.request_id)]
    answer = planning.finished(wanted)
    assert answer is not None
    assert (answer["kvshare.prefix_cached"], answer["kvshare.recomputed"]) == (LENGTH, 0)


@pytest.mark.parametrize("bound", [0.0, 0.02])
def test_an_answer_says_that_a_bound_gave_it_a_stricter_policy(
    planning: Planning, link: FakeLink, bound: float
) -> None:
    link.plan = msgspec.structs.replace(PLAN, spans=PLAN.spans[:1], quality_bound=bound)
    wanted = request()
    planning.matched(wanted, 0)
    answer = planning.finished(wanted)
    assert answer is not None
    assert answer.get("kvshare.quality_bound", 0.0) == bound


def test_a_salt_must_prove_its_tenant_where_there_is_a_key(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENANTS", "ab" * 32)
    planning = planned(link, tenant_key="env:TENANTS")
    proven = Tenants(planning.config).salt("alice")
    for salt in (None, "alice", proven[:-1] + ("0" if proven[-1] != "0" else "1"), "bob" + proven):
        wanted = request(cache_salt=salt)
        assert planning.matched(wanted, 0) == (0, False)
        assert planning.state_of(wanted).declined == "tenant_unproven"  # so it is not stored either
    assert link.asked == []
    assert {message.reason for message in link.told} == {"tenant_unproven"}
    planning.matched(request(cache_salt="alice", kv_transfer_params=policy("off")), 0)
    assert link.told[-1].reason == "policy_off"
    assert {message.namespace for message in link.told} == {None}, "it is nobody's"
    planning.matched(request(cache_salt=proven), 0)
    assert link.asked == [(NAMESPACE.for_tenant("alice").digest, "balanced")]


def named(source: Any) -> dict[str, Any]:
    return {"kvshare.source": source, "kvshare.policy": "faithful"}


def test_a_source_is_hashed_before_it_leaves_the_engine(
    link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCES", "ab" * 32)
    for planning in (planned(link, source_key="env:SOURCES"), planned(link)):
        for source in ("ann", "ann", "bob", "", None, {"no": ["text"]}):
            planning.matched(request(kv_transfer_params=named(source)), 0)
    ann, again, bob, *rest = link.sources
    assert ann == again != bob
    assert (len(ann), rest[:2]) == (8, [b"", b""])
    assert rest[3:] == [b""] * 6, "without a key nothing is said"
    assert link.asked == [(NAMESPACE.digest, "faithful")] * 12, "it is no unknown parameter"


def test_salts_that_we_make_are_taken_by_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each salt is either refused by us or accepted by vLLM."""
    from vllm.entrypoints.generate.base.protocol import validate_cache_salt
    from vllm.exceptions import VLLMValidationError

    monkeypatch.setenv("TENANTS", "ab" * 32)
    tenants = Tenants(StoreConfig(tenant_key="env:TENANTS"))
    for name in ("acme", "a b", "é" * 63, "n" * 63, *map(chr, range(1, 128))):
        with contextlib.suppress(ConfigError):
            validate_cache_salt(tenants.salt(name))
    for name in ("alice@example.com", "org/team", "org\\team", "a\0b", "n" * 64):
        with pytest.raises(VLLMValidationError, match="cache_salt"):
            validate_cache_salt(f"{name}.{'0' * 64}")
        with pytest.raises(ConfigError, match="at most 63 characters and none of"):
            tenants.salt(name)


def test_a_request_that_no_message_can_hold_is_declined(planning: Planning, link: FakeLink) -> None:
    """The daemon would close the engine's connection, and all of its other lookups would fail."""
    for fields in ({"cache_salt": "x" * 1025}, {"num_prompt_tokens": 4 << 20}):
        wanted = request(**fields)
        assert planning.matched(wanted, 0) == (0, False)
        assert planning.state_of(wanted).declined == "too_long"  # so it is not stored either
    assert link.asked == []
    assert {message.reason for message in link.told} == {"too_long"}
    assert [message.namespace for message in link.told] == [None, NAMESPACE]
    planning.matched(request(cache_salt="x" * 1024), 0)
    assert len(link.asked) == 1


@pytest.mark.parametrize("params", [None, {}, [], "exact", 7, {"policy": "off"}, {1: 2}])
def test_other_parameters_steer_nothing(planning: Planning, link: FakeLink, params: Any) -> None:
    planning.matched(request(kv_transfer_params=params), 0)
    assert link.asked == [(NAMESPACE.digest, "balanced")]


@pytest.mark.parametrize("configured", policy_names())
@pytest.mark.parametrize("asked", [None, *policy_names()])
def test_the_stricter_policy_holds(link: FakeLink, configured: str, asked: str | None) -> None:
    """Whatever the daemon is configured for: an engine with a laxer policy may have started it."""
    names = policy_names()
    expected = min(configured, asked or configured, key=names.index)
    planning = planned(link, policy=configured)
    wanted = request(kv_transfer_params=policy(asked))
    planning.matched(wanted, 0)
    if expected == "off":
        assert link.told == [declined_as("policy_off", wanted)]
    else:
        assert link.asked == [(NAMESPACE.digest, expected)]


# --- what is promised -----------------------------------------------------------------------------


def test_a_plan_is_promised_up_to_its_last_span(planning: Planning) -> None:
    wanted = request()
    assert planning.matched(wanted, 0) == (80, True)
    assert planning.matched(wanted, 32) == (48, True)
    assert planning.matched(wanted, 64) == (16, False)


def test_a_scheduler_that_places_no_runs_gets_the_prefix_only(link: FakeLink) -> None:
    """Without `--scheduler-cls` no scheduler computes placeholders, so every load is awaited."""
    planning = planned(link)
    planning.places_runs = False
    assert planning.matched(request(), 0) == (40, True)
    assert planning.matched(request(), 32) == (8, True)
    assert planning.matched(request(), 64) == (0, False)


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
    state.reserved = Reserved(1, 10)
    planning.look_ahead([], busy=False)
    assert state.reserved == Reserved()


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
    wanted = request()
    assert planning.matched(wanted, 96) == (0, False)
    planning.allocated(wanted, None, 0)  # type: ignore[arg-type]
    assert link.told == [finish("lease", "engine_prefix", 4, cached=96)]


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
    (state,) = planning.runs.parked
    assert state.runs == [Run(40, 50)]
    planning.finished(wanted)
    assert not planning.runs.parked
    assert not link.told


@pytest.mark.parametrize(
    ("invalid", "wrong"), [(set(), []), ({9}, []), ({3}, [3, 4]), ({4, 2}, [2, 3, 4])]
)
def test_all_that_follows_an_invalid_block_is_wrong(invalid: set[int], wrong: list[int]) -> None:
    assert from_first([1, 2, 3, 4], invalid) == wrong
