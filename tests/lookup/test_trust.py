"""Whose rows a request is served: its own first, and of one other source no more than a cap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.questions import answer
from kvshare_store.lookup import trust
from kvshare_store.lookup.explanation import Explanation
from kvshare_store.namespace import Namespace, Sources
from kvshare_store.nodes.node import SOURCES, Node, node_id
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Buffer, packed
from kvshare_store.store import Store
from tests.save.test_answers import save as save_answer
from tests.support.oracle import Driver, positions_of, prompt

Open = Callable[..., Driver]

ANN, BOB, CAT = b"ann-hash", b"bob-hash", b"cat-hash"
HEAD, BODY = prompt(1, 24), prompt(2, 120)
INJECTED = [*HEAD, *prompt(3, 12), *BODY]
VICTIM = [*HEAD, *BODY, *prompt(4, 8)]


@pytest.fixture
def engine(driver: Open) -> Driver:
    return open_(driver)


def open_(driver: Open, share: float = 1.0) -> Driver:
    return driver(min_prompt_tokens=4, approximation_price=0.0, unconfirmed_share=share)


def sent(engine: Driver, tokens: list[int], source: bytes = b"", policy: str | None = None) -> Node:
    """Serve and save a prompt of a source. Returns its node."""
    plan = engine.serve(tokens, source=source, policy=policy)
    engine.save(tokens, None if plan.declined else plan)
    engine.store.flush()
    return node(engine, tokens)


def node(engine: Driver, tokens: Sequence[int]) -> Node:
    for exact in (True, False):
        name = node_id(engine.namespace.digest, np.asarray(tokens, np.int32), exact)
        found = engine.store.tree.get(name)
        if found is not None:
            return found
    raise AssertionError("the prompt is not stored")


def edited(plan: ReusePlan) -> list[int]:
    return positions_of(span for span in plan.spans if not span.exact)


# --- whose a node is ------------------------------------------------------------------------------


def test_a_node_remembers_who_sent_it_over_a_restart(engine: Driver) -> None:
    assert sent(engine, VICTIM, ANN).sources == (ANN,)
    assert sent(engine, VICTIM, BOB).sources == (ANN, BOB)
    assert sent(engine, [*VICTIM, 7], CAT).sources == (CAT,), "a longer prompt is another one"
    config = engine.store.config
    engine.store.close()
    with Store(config) as again:
        assert {one.sources for one in again.tree} == {(ANN, BOB), (CAT,)}


def test_few_sources_are_remembered(engine: Driver) -> None:
    for number in range(SOURCES + 3):
        sent(engine, VICTIM, bytes([number]) * 8)
    assert len(node(engine, VICTIM).sources) == SOURCES


def test_those_that_ask_before_it_is_stored_count(engine: Driver) -> None:
    engine.serve(VICTIM, source=ANN)
    engine.serve(VICTIM, source=BOB)
    engine.save(VICTIM)
    assert node(engine, VICTIM).sources == (ANN, BOB)


def test_nobody_confirms_a_prompt_that_goes_on(engine: Driver) -> None:
    """Who sends the beginning of a prompt has not sent what follows."""
    sent(engine, [*VICTIM, *prompt(5, 20)], ANN)
    engine.serve(VICTIM, source=BOB)
    engine.store.flush()
    assert node(engine, [*VICTIM, *prompt(5, 20)]).sources == (ANN,)


def test_an_answer_is_of_one_request(engine: Driver) -> None:
    """What one source makes the model say is not confirmed by those that asked the same."""
    sent(engine, VICTIM, ANN)
    save_answer(engine, VICTIM, prompt(6, 10))
    assert node(engine, [*VICTIM, *prompt(6, 10)]).sources == (ANN,)
    engine.serve(VICTIM, source=BOB)
    save_answer(engine, VICTIM, prompt(7, 10))
    assert node(engine, [*VICTIM, *prompt(7, 10)]).sources == ()


def test_a_save_that_names_its_source_needs_no_memory_of_its_lookup(engine: Driver) -> None:
    """The daemon may have been started again since, or others may have asked the same."""
    engine.serve(VICTIM, source=BOB)
    engine.save(VICTIM, source=ANN)
    assert node(engine, VICTIM).sources == (ANN, BOB)
    save_answer(engine, VICTIM, prompt(6, 10), source=CAT)
    assert node(engine, [*VICTIM, *prompt(6, 10)]).sources == (CAT,)


def test_a_template_of_a_pool_is_nobodys(engine: Driver) -> None:
    """Whoever looks it up before, whoever saves it, and whoever looks it up then."""
    pool = engine.namespace.in_pool("templates")
    engine.store.plan(VICTIM, pool, source=ANN)
    staged = engine.store.stage(VICTIM, pool, source=BOB)
    rows = bytes(len(VICTIM) * pool.layout.row_bytes)
    assert engine.store.commit(staged.id, Buffer(packed(rows, staged.sizes, pool.layout)))
    engine.store.plan(VICTIM, pool, source=CAT)
    engine.store.flush()
    assert [one.sources for one in engine.store.tree] == [()]


def test_a_settled_node_keeps_its_sources(engine: Driver) -> None:
    sent(engine, INJECTED, ANN)
    assert sent(engine, VICTIM, BOB).generation == 1
    engine.save(VICTIM, engine.serve(VICTIM, policy="exact"))
    assert (node(engine, VICTIM).generation, node(engine, VICTIM).sources) == (0, (BOB,))


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_rows_that_are_cut_off_keep_out_no_donor_of_ones_own(driver: Open, share: float) -> None:
    """A stranger who guesses the whole prompt has more of it than one's own prompt of yesterday."""
    engine = open_(driver, share)
    sent(engine, [*HEAD, *BODY[:90]], ANN)
    sent(engine, [*prompt(3, 12), *VICTIM], BOB)
    plan = engine.serve([*prompt(8, 3), *VICTIM], source=ANN)
    assert plan.reused >= 90


# --- whose rows come first ------------------------------------------------------------------------


def variant(seed: int) -> list[int]:
    """A template with one's own words in front: each has as much of the body as the others."""
    return [*prompt(seed, 10), *BODY]


def test_own_rows_first(engine: Driver) -> None:
    own = sent(engine, variant(11), ANN, "exact")
    others = [sent(engine, variant(seed), BOB, "exact") for seed in (12, 13, 14)]
    assert engine.serve(variant(15), source=ANN).donors == (own.id,)
    assert engine.serve(variant(16), source=BOB).donors[0] in {one.id for one in others}


def test_what_several_sources_sent_goes_before_what_one_has_sent(engine: Driver) -> None:
    sent(engine, variant(21), ANN, "exact")
    several = sent(engine, variant(22), ANN, "exact")
    sent(engine, variant(22), BOB, "exact")
    sent(engine, variant(23), ANN, "exact")
    assert engine.serve(variant(24), source=CAT).donors == (several.id,)


def test_much_better_rows_of_others_come_before_own_ones(engine: Driver) -> None:
    sent(engine, [*prompt(31, 10), *BODY[:40]], ANN)
    other = sent(engine, variant(32), BOB, "exact")
    assert engine.serve(variant(33), source=ANN).donors[0] == other.id


def changed(at: int) -> list[int]:
    """A template of 400 tokens with one of them changed."""
    tokens = prompt(35, 400)
    return [*tokens[:at], 1, *tokens[at + 1 :]]


@pytest.mark.parametrize("policy", ["exact", None])
def test_own_rows_come_before_those_of_others_with_a_longer_prefix(
    driver: Open, policy: str | None
) -> None:
    """Else who sends such a prompt puts rows in, or with a cap takes the request's own away."""
    for share in (1.0, 0.0):
        engine = open_(driver, share)
        sent(engine, prompt(36, 40), ANN)
        own = sent(engine, changed(250), ANN, policy)
        sent(engine, changed(260), BOB, "exact")
        plan = engine.serve(changed(270), source=ANN)
        assert own.id in plan.donors
        assert len(edited(plan)) > 100


def test_without_a_source_and_a_cap_nothing_is_asked(
    engine: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(*_: object) -> None:
        raise AssertionError("sources are looked at")

    monkeypatch.setattr(trust, "Trust", used)
    sent(engine, INJECTED)
    assert sent(engine, VICTIM).sources == ()


# --- the cap --------------------------------------------------------------------------------------


def test_the_cap_keeps_rows_from_behind_another_sources_text_out(driver: Open) -> None:
    engine = open_(driver)
    sent(engine, INJECTED, ANN)
    assert len(edited(engine.serve(VICTIM, source=BOB))) > 100
    engine = open_(driver, 0.0)
    plan = engine.serve(VICTIM, source=BOB)
    assert (plan.exact, plan.reused) == (len(HEAD), len(HEAD))
    assert len(edited(engine.serve(VICTIM, source=ANN))) > 100, "they are its own"
    engine = open_(driver, 0.25)
    assert len(edited(engine.serve(VICTIM, source=BOB))) == len(VICTIM) // 4


def test_rows_whose_text_several_have_sent_are_free(driver: Open) -> None:
    """Both sent the same beginning, each went on with words of its own."""
    engine = open_(driver, 0.0)
    shared = [*prompt(41, 10), *BODY]
    sent(engine, [*shared, *prompt(42, 30)], ANN)
    sent(engine, [*shared, *prompt(43, 30)], BOB)
    request = [*prompt(44, 6), *BODY, *prompt(42, 30), *prompt(45, 4)]
    assert edited(engine.serve(request, source=CAT)) == list(range(6, 6 + len(BODY)))


def test_rows_of_nobody_are_capped(driver: Open) -> None:
    engine = open_(driver, 0.0)
    sent(engine, INJECTED)
    assert engine.serve(VICTIM, source=BOB).reused == len(HEAD)
    assert engine.serve(VICTIM).reused == len(HEAD)


def test_an_edited_prompt_does_not_launder_rows(driver: Open) -> None:
    """An attacker also sends the victim's prompt, made of the attacker's rows."""
    engine = open_(driver, 0.0)
    sent(engine, INJECTED, ANN)
    assert sent(engine, VICTIM, ANN).generation == 1
    assert engine.serve(VICTIM, source=BOB).reused == len(HEAD)
    assert engine.serve([*VICTIM, *prompt(51, 20)], source=BOB).reused == len(HEAD)
    assert engine.serve([*VICTIM, *prompt(51, 20)], source=ANN).continued == len(VICTIM)


def guessed(engine: Driver) -> None:
    """An attacker's rows of the body stand behind an injection and behind edited rows, so in
    nobody's exact prefix. Then the attacker sends the victim's very prompt, made of them."""
    sent(engine, prompt(53, 40), ANN)
    sent(engine, [*prompt(54, 4), *prompt(53, 40), *prompt(3, 12), *BODY], ANN)
    assert sent(engine, VICTIM, ANN).generation == 2


def test_who_sends_an_edited_prompt_again_does_not_confirm_its_rows(driver: Open) -> None:
    """The rows were computed behind text that only the first source has sent."""
    guessed(open_(driver))
    engine = open_(driver, 0.1)
    assert sent(engine, VICTIM, BOB).sources == (ANN,), "the prompt is stored already"
    engine.store.flush()
    assert node(engine, VICTIM).sources == (ANN,)
    following, similar = [*VICTIM, *prompt(55, 20)], [*prompt(56, 5), *VICTIM[5:]]
    for source, tokens in ((BOB, following), (CAT, similar)):
        taken = edited(engine.serve(tokens, source=source))
        assert len(taken) <= len(tokens) // 10


def test_an_edited_prompt_that_several_asked_for_is_nobodys(driver: Open) -> None:
    """Nobody knows whose rows were saved."""
    engine = open_(driver)
    sent(engine, prompt(53, 40), ANN)
    sent(engine, [*prompt(54, 4), *prompt(53, 40), *prompt(3, 12), *BODY], ANN)
    engine.serve(VICTIM, source=BOB, policy="exact")
    assert sent(engine, VICTIM, ANN).generation == 2
    following = [*VICTIM, *prompt(55, 20)]
    for sources in ((BOB, ANN), ()):
        engine = open_(driver, 0.0)
        stored = node(engine, VICTIM)
        engine.store.nodes.state.replace(stored, msgspec.structs.replace(stored, sources=sources))
        for source in (ANN, BOB, CAT):
            assert engine.serve(following, source=source).reused == len(HEAD)


def test_a_conversation_goes_on_from_its_own_rows(driver: Open) -> None:
    """Also where nobody says whose it is."""
    engine = open_(driver)
    sent(engine, INJECTED)
    sent(engine, VICTIM)
    engine = open_(driver, 0.0)
    taken = [at for at in edited(engine.serve([*VICTIM, *prompt(52, 20)])) if at < len(VICTIM)]
    assert taken == [], "the rows are still those of the injected prompt"
    engine.store.purge_lineage(node(engine, INJECTED).id)
    sent(engine, VICTIM)
    assert engine.serve([*VICTIM, *prompt(52, 20)]).exact == len(VICTIM)


# --- names ----------------------------------------------------------------------------------------


def test_names_are_hashed_under_a_key_and_by_namespace(
    config: Callable[..., StoreConfig],
    namespace: Namespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCES", "ab" * 32)
    keyed = Sources(config(source_key="env:SOURCES"))
    found = {
        keyed.of("ann", namespace),
        keyed.of("bob", namespace),
        keyed.of("ann", namespace.for_tenant("acme")),
    }
    assert (len(found), {len(one) for one in found}) == (3, {8})
    assert keyed.of("", namespace) == b"" == Sources(config()).of("ann", namespace)
    monkeypatch.setenv("SOURCES", "cd" * 32)
    assert Sources(config(source_key="env:SOURCES")).of("ann", namespace) not in found


# --- explanations ---------------------------------------------------------------------------------


def kinds(found: Explanation) -> list[str]:
    return [part.reason or part.kind for part in found.parts for _ in range(part.start, part.stop)]


def explained(engine: Driver, tokens: list[int], source: bytes = b"") -> Explanation:
    return engine.store.explain(tokens, engine.namespace, source=source)


def test_an_explanation_says_whose_rows_are_taken_and_what_the_cap_costs(driver: Open) -> None:
    engine = open_(driver, 0.25)
    attacker = sent(engine, INJECTED, ANN)
    found = explained(engine, VICTIM, BOB)
    plan = engine.serve(VICTIM, source=BOB)
    assert [at for at, kind in enumerate(kinds(found)) if kind == "edited"] == edited(plan)
    (candidate,) = found.candidates
    assert (candidate.node, candidate.source) == (attacker.id, "unconfirmed")
    assert candidate.unconfirmed == len(VICTIM) // 4
    assert found.by_reason["source"] > 40
    own = explained(engine, VICTIM, ANN)
    assert "source" not in own.by_reason
    assert (own.candidates[0].source, own.candidates[0].unconfirmed) == ("own", 0)
    sent(engine, INJECTED, BOB)
    assert explained(engine, VICTIM, CAT).candidates[0].source == "confirmed"


def test_a_logged_request_is_explained_for_its_source(driver: Open) -> None:
    engine = driver(
        min_prompt_tokens=4, approximation_price=0.0, unconfirmed_share=0.25, log_prompts=True
    )
    sent(engine, INJECTED, ANN)
    for source, word in ((ANN, "own"), (BOB, "unconfirmed")):
        engine.serve(VICTIM, source=source)
        last = engine.store.requests.last(1)[0]
        found = answer(engine.store, protocol.Explain(request=str(last.number)))
        (candidate,) = found["explanation"]["candidates"]
        assert candidate["source"] == word
        assert "source" not in found["request"], "the hash itself is nobody's business"


def test_without_a_cap_an_explanation_is_silent_on_sources(engine: Driver) -> None:
    sent(engine, INJECTED, ANN)
    plain = msgspec.to_builtins(explained(engine, VICTIM))
    assert not {"source", "unconfirmed"} & plain["candidates"][0].keys()
    assert "steering" not in plain
