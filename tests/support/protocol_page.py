"""The tables of the page on the protocol, made by `python -m tests.support.protocol_page`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from kvshare_store.daemon import protocol
from kvshare_store.daemon.lanes import lane_of
from kvshare_store.daemon.roles import NEEDED
from kvshare_store.errors import ErrorKind, error_for
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.plan.contexts import Context
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Reuse, Staged
from kvshare_store.tensors.layout import KVLayout
from tests.support.documents import DOCS
from tests.support.made_parts import Parts, listed, remake, table
from tests.support.source_fields import about, fields_of

PAGE = DOCS / "protocol.md"
_RECORDS = (
    protocol.Welcome, protocol.Reply, Namespace, KVLayout, ReusePlan, Span, BlockRef, Context,
    Outcome, Reuse, Staged, protocol.Holding,
)  # fmt: skip


def parts() -> Parts:
    """Everything on the page that the code says."""
    meanings = [
        (f"`{protocol.tag_of(kind)}.{field.name}`", field.about)
        for kind in get_args(protocol.Request)
        for field in fields_of(kind)
        if field.about
    ]
    records = [(kind.__name__, _fields(kind), about(kind)) for kind in _RECORDS]
    return {
        "versions": f"Versions {protocol.OLDEST} to {protocol.NEWEST} are spoken.",
        "messages": table(("type", "role", "lane", "fields", "asks for"), _messages()),
        "fields": table(("field", "meaning"), meanings),
        "records": table(("record", "fields", "what it is"), records),
        "errors": table(
            ("error", "again later", "exit code of a command", "what it says"), _errors()
        ),
    }


def _messages() -> Iterator[tuple[str, ...]]:
    for kind in get_args(protocol.Request):
        tag = f"`{protocol.tag_of(kind)}`"
        yield tag, NEEDED[kind], lane_of(kind), _fields(kind), about(kind)


def _errors() -> Iterator[tuple[str, ...]]:
    for kind in ErrorKind:
        error = error_for(kind, "")
        again = "yes" if error.retryable else "no"
        yield f"`{kind}`", again, str(error.exit_code), about(type(error))


def _fields(kind: type) -> str:
    return listed(map(str, fields_of(kind)))


if __name__ == "__main__":
    remake(PAGE, parts())
