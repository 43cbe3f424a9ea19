"""Messages on the wire, and where the socket is."""

from __future__ import annotations

import contextlib
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.daemon import protocol
from kvshare_store.errors import ProtocolError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.plan.spans import Run, Span
from kvshare_store.save.staging import Reuse, Staged
from kvshare_store.tensors.layout import KVLayout
from tests.support.made_parts import parts_in

NAMESPACE = Namespace("m", KVLayout(2, 1, 4, "float32"), tenant="t")
REUSE = Reuse((Span(0, 4, 0, 0, 0, True),), ("ab" * 32,), ("node",), 1)
MESSAGES = [
    protocol.Hello(1, 7),
    protocol.Plan(NAMESPACE, b"1234", "exact", look=True),
    protocol.Decline("late", 40, "r", NAMESPACE),
    protocol.EngineCached(32),
    protocol.Prefilled("chat-1", 0.25),
    protocol.Settings(),
    protocol.ReadRows("lease", "ab" * 32, 3),
    protocol.Finish("lease", Outcome(3, 4, 5, 6, 0.5, "aborted")),
    protocol.Observe(512, 0.25, "model"),
    protocol.Working(True),
    protocol.NextLook(("ab",), scores=True),
    protocol.Looked("ab", 7, "computed", (0.0, 0.25)),
    protocol.Stage(NAMESPACE, b"1234", REUSE, 1, greedy=True, request="r"),
    protocol.WriteRows("save", 7, b"rows"),
    protocol.Commit("save"),
    protocol.Abandon("save"),
    protocol.Failed("timeout"),
    protocol.Stats(),
    protocol.Ready(),
    protocol.Flush(),
    protocol.ListNodes(3),
    protocol.Branch("ab", after="1.5-cd", limit=3),
    protocol.ShowNode("ab"),
    protocol.Explain(b"1234", node="ab", only="cd", tenant="t"),
    protocol.ListRequests(3, True, True),
    protocol.Quality("ab", "ab/cd/append", True, 50, 3),
    protocol.Diff("ab", "cd"),
    protocol.HasNodes(("ab", "cd")),
    protocol.PlanNode("ab", 2.5),
    protocol.Forget(("ab",)),
    protocol.Held("model"),
    protocol.NodesOf("digest", "ab", 7),
    protocol.Clear(),
    protocol.Evict(("ab",), "t", 1.0, "exact", True),
    protocol.Pin("ab", False),
    protocol.Export("/a", ("ab",), "t", True),
    protocol.Import("/a"),
    protocol.Purge("ab"),
    protocol.Collect(True),
    protocol.CheckTree(True),
    protocol.CheckBlocks(("a", "b"), True),
    protocol.Stop(True),
]
REPLIES: list[protocol.Welcome | ReusePlan | Staged] = [
    protocol.Welcome(protocol.NEWEST, 17, "0123abcd", "balanced"),
    ReusePlan(
        namespace="n",
        tokens=9,
        exact=4,
        spans=REUSE.spans,
        blocks=(BlockRef("ab" * 32, 4, 256, 64, 7, True),),
        donors=("node",),
        lease="lease",
        arena="0123abcd",
        saving_ms=1.5,
        policy="balanced",
    ),
    Staged(id="s", fresh=(Run(0, 4),), sizes=(3, 1)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_requests_arrive_as_they_were_sent(message: protocol.Request) -> None:
    back = protocol.decode_request(protocol.encode(message))
    assert type(back) is type(message)
    assert back == message


def test_the_list_above_is_complete() -> None:
    assert {type(message) for message in MESSAGES} == set(typing.get_args(protocol.Request))


def test_plans_and_saves_arrive_as_they_were_sent() -> None:
    for sent in REPLIES:
        reply = protocol.decode_reply(protocol.encode(protocol.Reply(result=sent)))
        assert msgspec.convert(reply.result, type(sent)) == sent


@given(st.binary(max_size=60))
def test_rubbish_is_a_protocol_error_and_nothing_else(body: bytes) -> None:
    for decode in (protocol.decode_request, protocol.decode_reply):
        with contextlib.suppress(ProtocolError):
            assert isinstance(decode(body), msgspec.Struct)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "explode"},
        {"type": "commit"},
        {"type": "commit", "staged": 3},
        {"type": "plan", "namespace": {}, "tokens": b""},
        {"type": "finish", "lease": "x", "outcome": {"exact": "many"}},
        {"type": "list", "limit": "all"},
        ["commit", "x"],
    ],
    ids=repr,
)
def test_messages_that_say_something_else(message: object) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(msgspec.msgpack.encode(message))


def test_a_layout_that_makes_no_sense_is_malformed() -> None:
    raw = protocol.encode(protocol.Plan(NAMESPACE, b""))
    with pytest.raises(ProtocolError):
        protocol.decode_request(raw.replace(b"kv_heads\x01", b"kv_heads\x00"))


def test_both_sides_speak_the_newest_version_that_both_know() -> None:
    oldest, newest = protocol.OLDEST, protocol.NEWEST
    assert protocol.common_version(protocol.Hello(1, newest + 5)) == newest
    assert protocol.common_version(protocol.Hello(oldest, oldest)) == oldest
    for strange in (protocol.Hello(0, oldest - 1), protocol.Hello(newest + 1, newest + 2)):
        with pytest.raises(ProtocolError, match="same kvshare-store release"):
            protocol.common_version(strange)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_field_of_a_newer_release_is_ignored(message: protocol.Request) -> None:
    plain = msgspec.msgpack.decode(protocol.encode(message)) | {"since_the_next_release": [1]}
    body = msgspec.msgpack.encode(plain)
    assert protocol.decode_request(body) == message
    assert protocol.kind_of(body) is type(message)


def test_the_page_is_what_the_code_says() -> None:
    """`python -m tests.support.protocol_page` writes it anew."""
    # the recording of a release takes the messages from here, and needs no daemon
    from tests.support.protocol_page import PAGE, parts
    from tests.support.source_fields import fields_of

    assert parts_in(PAGE) == parts()
    for kind in typing.get_args(protocol.Request):
        names = [field.name for field in fields_of(kind)]
        assert names == list(kind.__struct_fields__)


def test_the_kind_is_known_without_decoding_the_rest() -> None:
    broken = msgspec.msgpack.encode({"type": "commit", "staged": 3})
    assert protocol.kind_of(broken) is protocol.Commit
    for body in (b"", b"\xc1", msgspec.msgpack.encode({"type": "explode"}), b"\x91" * 100_000):
        with pytest.raises(ProtocolError):
            protocol.kind_of(body)
