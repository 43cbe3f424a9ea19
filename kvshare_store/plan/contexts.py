"""Contexts: behind which edited rows the rows of a prompt were computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import blake3
import msgspec

from kvshare_store.plan.spans import Span


class Context(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """From position `start` on a prompt's rows were computed behind edited rows: these.

    Prompts with the same tokens and contexts up to a position have the same rows up to there.
    """

    start: int
    digest: bytes
    """Of the edited spans, 16 bytes."""
    stop: int = 0
    """Where the last of them ends, or of the continued rows that stand behind others here."""


def contexts_of(
    inherited: Iterable[Context],
    spans: Iterable[Span],
    names: Sequence[str],
    exact: int = 0,
    continued: int = 0,
) -> tuple[Context, ...]:
    """The contexts of a prompt's rows: those of the prompt that it continues, and one for the
    edited spans behind that.

    `names`: of the blocks that the spans index. `exact`: length of the prompt's exact prefix, and
    `continued`: where the rows end that continue another prompt. Where its exact prefix is longer
    than that prompt's, its rows stand before those of an inherited context. That makes it another
    one, which depends on how many rows are continued: they were computed behind other rows than
    these, and what follows them is computed behind these.
    """
    contexts = list(inherited)
    before = [context for context in contexts if context.start < exact]
    if before:
        stop = max(continued, *(context.stop for context in before))
        contexts = [Context(exact, _digest(before), stop), *contexts[len(before) :]]
    edited = list(_joined(span for span in spans if span.edited))
    if edited:
        made_of = [(s.start, s.length, s.source, names[s.block], s.row) for s in edited]
        contexts.append(Context(edited[0].start, _digest(made_of), edited[-1].stop))
    return tuple(contexts)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """The same rows in as few spans as possible: an engine loads a part of what was planned."""
    last: Span | None = None
    for span in spans:
        if last is not None and span == _following(last, span.length):
            last = msgspec.structs.replace(last, length=last.length + span.length)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _following(span: Span, length: int) -> Span:
    """The next rows of the same block, for the next positions."""
    places = {"start": span.stop, "source": span.source + span.length}
    return msgspec.structs.replace(span, row=span.row + span.length, length=length, **places)


def cut_contexts(contexts: Iterable[Context], length: int) -> tuple[Context, ...]:
    """The contexts of the first `length` rows of a prompt. One whose edited rows go on behind them
    is another one: what follows is not what followed there."""
    return tuple(
        c if c.stop <= length else Context(c.start, _digest((c.digest, length)), length)
        for c in contexts
        if c.start < length
    )


def _digest(made_of: Any) -> bytes:
    return blake3.blake3(msgspec.msgpack.encode(made_of)).digest(length=16)
