"""What an engine tells others: KV events for stored blocks, and trace spans of its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from vllm.distributed.kv_events import BlockRemoved, BlockStored

from kvshare_store.daemon import protocol
from tests.engine.harness import BLOCK, Engine, Fresh
from tests.engine.test_behaviour import LENGTH, NEW, edited
from tests.support.traces import Collector, Span
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    with collector.listening():
        yield collector


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:  # vLLM writes the endpoint into the environment
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        engine = Engine(
            tmp_path_factory.mktemp("home"),
            kvshare={"policy": "aggressive"},
            enable_prefix_caching=True,
            disable_log_stats=False,  # vLLM needs them for its own spans
            kv_events_config={"enable_kv_cache_events": True, "publisher": "null"},
            otlp_traces_endpoint=collector.endpoint,
        )
        yield engine
        engine.close()
        trace.get_tracer_provider().shutdown()  # type: ignore[attr-defined]


def step(engine: Engine) -> None:
    """Run steps: events go out with them."""
    engine.ask([5, 6, 7], max_tokens=1, policy="off")


class Router:
    """What a router learns of the store: blocks by hash, with their tokens."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: dict[bytes, list[int]] = {}
        self.ever: list[list[int]] = []
        """Tokens of each block that was announced, whether it was taken back or not."""
        self.of_vllm: set[bytes] = set()
        """Blocks in vLLM's own prefix cache, each counted once."""
        self._engine = engine
        publisher = engine.scheduler.kv_event_publisher
        monkeypatch.setattr(publisher, "publish", self._hear)

    def _hear(self, batch: Any) -> None:
        for event in batch.events:
            if getattr(event, "medium", None) != "CPU":
                self.of_vllm.update(getattr(event, "block_hashes", ()))
            elif isinstance(event, BlockStored):
                assert event.block_size == BLOCK
                assert event.parent_block_hash is None or event.parent_block_hash in self.blocks
                for at, digest in enumerate(event.block_hashes):
                    assert digest not in self.blocks, "announced once"
                    self.blocks[digest] = event.token_ids[at * BLOCK : (at + 1) * BLOCK]
                    self.ever.append(self.blocks[digest])
            else:
                assert isinstance(event, BlockRemoved)
                for digest in event.block_hashes:
                    del self.blocks[digest]

    def until(self, known: Callable[[], bool]) -> None:

        def heard() -> bool:
            step(self._engine)
            return known()

        until(heard, PATIENCE_S)

    @property
    def tokens(self) -> list[list[int]]:
        return sorted(self.blocks.values())


@pytest.fixture
def router(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Router:
    engine.clear()
    engine.planning.announcer.forget()  # type: ignore[union-attr]
    step(engine)
    return Router(engine, monkeypatch)


def blocks_of(tokens: list[int]) -> list[list[int]]:
    return [tokens[at : at + BLOCK] for at in range(0, len(tokens) - BLOCK + 1, BLOCK)]


def test_exact_rows_are_announced_and_taken_back(
    engine: Engine, router: Router, fresh: Fresh
) -> None:
    prompt = fresh(LENGTH)
    answer = engine.store(prompt, max_tokens=40)
    whole = [*prompt, *answer.tokens[:-1]]
    router.until(lambda: len(router.blocks) == len(whole) // BLOCK)
    assert router.tokens == sorted(blocks_of(whole))
    assert router.blocks.keys() <= router.of_vllm, "under the hashes that vLLM gives them"
    engine.client.call(protocol.Clear())
    router.until(lambda: not router.blocks)


def test_edited_and_continued_rows_never_are(engine: Engine, router: Router, fresh: Fresh) -> None:
    """Behind each, an exact prompt is announced: by then what waits for that was announced too."""
    exact: list[list[int]] = []

    def announce() -> None:
        exact.append(fresh(LENGTH))
        engine.store(exact[-1], max_tokens=1)
        router.until(lambda: blocks_of(exact[-1])[-1] in router.ever)
        engine.forget()

    announce()
    follower = edited(exact[0], 44)
    assert engine.store(follower, max_tokens=1).said["edited"] > 0
    announce()
    assert engine.store([*follower, *NEW]).said["continued"] > 0
    announce()
    assert sorted(router.ever) == sorted(block for prompt in exact for block in blocks_of(prompt))


def test_a_tenants_blocks_have_its_salt(engine: Engine, router: Router, fresh: Fresh) -> None:
    prompt = fresh(LENGTH)
    engine.store(prompt, max_tokens=1)
    engine.store(prompt, max_tokens=1, salt="acme")
    router.until(lambda: len(router.blocks) == 2 * (LENGTH // BLOCK))
    assert router.tokens == sorted(2 * blocks_of(prompt))
    assert router.blocks.keys() <= router.of_vllm


def test_after_a_reset_a_prompt_is_announced_when_it_is_found(
    engine: Engine, router: Router, fresh: Fresh
) -> None:
    """vLLM then tells routers that this engine has no blocks, on any medium."""
    prompt = fresh(LENGTH)
    engine.store(prompt, max_tokens=1)
    router.until(lambda: bool(router.blocks))
    engine.forget()
    router.until(lambda: not router.blocks)
    assert engine.ask(prompt, max_tokens=1).said["exact"] == LENGTH - 1
    router.until(lambda: router.tokens == sorted(blocks_of(prompt)))


def test_nothing_is_announced_that_new_weights_cannot_use(
    engine: Engine, router: Router, fresh: Fresh
) -> None:
    engine.store(fresh(LENGTH), max_tokens=1)
    router.until(lambda: bool(router.blocks))
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    router.until(lambda: not router.blocks)


# --- traces --------------------------------------------------------------------------------------

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
"""A header `traceparent`: trace, parent span, and that the trace is sampled."""


def spans(engine: Engine, collector: Collector, wanted: int) -> dict[str, Span]:
    """Spans by name, once so many have come."""
    engine.settle()
    trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
    found = [span for span in collector.spans if span.name.startswith("kvshare.")]
    assert len(found) == wanted
    return {span.name: span for span in found}


def test_a_request_is_part_of_its_clients_trace(
    engine: Engine, collector: Collector, fresh: Fresh
) -> None:
    engine.clear()
    prompt = fresh(LENGTH)
    engine.store(prompt)
    engine.forget()
    trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
    collector.spans.clear()
    name = engine.add(edited(prompt, 44), trace_headers={"traceparent": CLIENT})
    (answer,) = engine.drain()[name]
    found = spans(engine, collector, 7)  # with a save for its answer
    assert found.keys() == {
        f"kvshare.{part}"
        for part in ("request", "lookup", "plan", "load", "partial_prefill", "save")
    }
    request = found.pop("kvshare.request")
    assert {span.trace for span in (request, *found.values())} == {CLIENT.split("-")[1]}
    assert request.parent == CLIENT.split("-")[2]
    assert {span.parent for span in found.values()} == {request.id}
    assert request.attributes["kvshare.edited"] == answer.said["edited"] > 0
    assert request.attributes["gen_ai.request.id"].startswith(name)
    computed = found["kvshare.partial_prefill"].attributes["kvshare.recomputed"]
    assert computed == answer.said["recomputed"]
    assert found["kvshare.load"].attributes["kvshare.bytes"] > 0
    order = ("lookup", "plan", "load")
    starts = [found[f"kvshare.{part}"].start for part in order]
    assert starts == sorted(starts)
    first_token = found["kvshare.partial_prefill"].end
    assert found["kvshare.plan"].end <= found["kvshare.load"].start
    assert found["kvshare.load"].end <= first_token
    assert found["kvshare.save"].attributes["kvshare.answer"], "the last of two"
    assert first_token <= found["kvshare.save"].start
    assert all(span.start <= span.end for span in found.values())
    assert request.start <= starts[0]
    assert found["kvshare.partial_prefill"].end <= request.end


def test_a_miss_has_no_spans_of_reuse(engine: Engine, collector: Collector, fresh: Fresh) -> None:
    """Without headers a request is a trace of its own."""
    engine.clear()
    trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
    collector.spans.clear()
    engine.ask(fresh(LENGTH), max_tokens=1)
    found = spans(engine, collector, 3)
    assert found.keys() == {"kvshare.request", "kvshare.lookup", "kvshare.save"}
    assert found["kvshare.request"].parent == ""
    assert found["kvshare.request"].attributes["kvshare.reason"] == "empty_store"
    assert found["kvshare.lookup"].attributes["kvshare.reason"] == "empty_store"
