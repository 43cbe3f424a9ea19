"""Releases one version apart. The messages of the one before were recorded as it sent them
(`tests/data/protocol_before.json`); each release records its own when it is made."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvshare_store.daemon import protocol
from kvshare_store.plan import ReusePlan
from kvshare_store.save.staging import Staged
from tests.daemon.test_protocol import MESSAGES

BEFORE = json.loads((Path(__file__).parents[1] / "data" / "protocol_before.json").read_text())
REQUESTS: dict[str, str] = BEFORE["requests"]
NOW = {type(message).__name__: message for message in MESSAGES}
REPLIES: dict[str, Any] = {
    "Welcome": protocol.Welcome, "ReusePlan": ReusePlan, "Staged": Staged
}  # fmt: skip


def fields(body: bytes) -> Any:
    return msgspec.msgpack.decode(body)


@pytest.mark.parametrize("name", REQUESTS)
def test_what_its_clients_send_is_understood(name: str) -> None:
    body = bytes.fromhex(REQUESTS[name])
    sent = fields(body)
    message = protocol.decode_request(body)
    assert type(message).__name__ == name
    now = fields(protocol.encode(message))
    assert {key: now[key] for key in sent} == sent, "nothing is lost or changed"
    fresh = type(message).__struct_defaults__
    new = set(now) - set(sent)
    defaults = dict(zip(reversed(message.__struct_fields__), reversed(fresh), strict=False))
    sent_now = {key: fields(protocol.encode(defaults[key])) for key in new}
    assert {key: now[key] for key in new} == sent_now, "old meaning"


@pytest.mark.parametrize("name", REQUESTS)
def test_what_its_daemons_know_is_still_sent(name: str) -> None:
    """An older daemon ignores new fields; it needs all the others, of the same types."""
    before, now = fields(bytes.fromhex(REQUESTS[name])), fields(protocol.encode(NOW[name]))
    assert set(before) <= set(now)
    assert {key: type(now[key]) for key in before} == {key: type(before[key]) for key in before}
    assert now["type"] == before["type"]


@pytest.mark.parametrize("name", REPLIES)
def test_what_its_daemons_answer_is_understood(name: str) -> None:
    reply = protocol.decode_reply(bytes.fromhex(BEFORE["replies"][name]))
    found = msgspec.convert(reply.result, REPLIES[name])
    now = msgspec.to_builtins(found)
    assert {key: now[key] for key in reply.result if not isinstance(now[key], tuple | list)} == {
        key: value for key, value in reply.result.items() if not isinstance(value, list)
    }


def test_no_message_was_taken_away() -> None:
    assert set(REQUESTS) <= {kind.__name__ for kind in typing.get_args(protocol.Request)}
    assert protocol.OLDEST <= 2, "the version that it speaks"
