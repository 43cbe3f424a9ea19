"""Rows that can be told apart: what a test saves, and what it knows about every row it is served.

No model is needed to see whether a store serves the right rows. Every row here is a hash of the
tokens up to it, so a row identifies the prefix it was computed for. Rows computed after an edit
also depend on a salt, as a real engine's rows would differ there. Nothing here uses the store's own
ideas of alignment, segments or provenance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import blake3
import numpy as np
import numpy.typing as npt

from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.save.staging import Buffer, Staged, packed, reuse_of
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from kvshare_store.store import Store  # takes seconds to import, and clients do not need it

Rows = npt.NDArray[Any]
"""Words in canonical order: `[layers, 2, T, kv_heads, head_dim]`."""


class RowFact(NamedTuple):
    """What is known about one row: its token, its position, and its context."""

    token: int
    position: int
    exact: bool
    """Whether it was computed in its own full context."""
    prefix: bytes
    """Hash of the tokens up to and including it."""


def prompt(seed: int, length: int) -> list[int]:
    """A prompt that shares next to nothing with those of other seeds."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1 << 30, length)]


def prefix_hashes(tokens: Sequence[int]) -> list[bytes]:
    """For each position a hash of the tokens up to and including it."""
    hasher, hashes = blake3.blake3(), []
    for token in tokens:
        hasher.update(int(token).to_bytes(4, "little"))
        hashes.append(hasher.digest())
    return hashes


def rows_for(
    tokens: Sequence[int], layout: KVLayout, *, exact: int | None = None, salt: str = ""
) -> Rows:
    """The rows an engine would compute for a prompt. Those of the first `exact` positions (None:
    all) depend on the prefix only, the others also on `salt`."""
    exact = len(tokens) if exact is None else exact
    raw = bytearray()
    for at, prefix in enumerate(prefix_hashes(tokens)):
        hasher = blake3.blake3(prefix)
        hasher.update(b"" if at < exact else f"edited:{salt}".encode())
        raw += hasher.digest(length=layout.row_bytes)
    dtype = np.uint32 if layout.itemsize == 4 else np.uint16
    by_row = np.frombuffer(bytes(raw), dtype).reshape(
        len(tokens), layout.layers, 2, layout.kv_heads, layout.head_dim
    )
    return np.ascontiguousarray(np.moveaxis(by_row, 0, 2))


def row_keys(rows: Rows) -> list[bytes]:
    """The bytes of each row, by which rows are recognised."""
    return [rows[:, :, at].tobytes() for at in range(rows.shape[2])]


def positions_of(runs: Iterable[Any]) -> list[int]:
    """The positions in runs or spans (anything with `start` and `stop`)."""
    return [at for run in runs for at in range(run.start, run.stop)]


def pick(rows: Rows, positions: Sequence[int]) -> bytes:
    """The rows at `positions`, one after the other in canonical order, as `Store.save` expects
    them."""
    return np.ascontiguousarray(rows[:, :, list(positions)]).tobytes()


def gather(plan: ReusePlan, layout: KVLayout, rows_of: Any) -> Rows:
    """The rows that a plan's spans refer to, without rotation, as rows of the whole request.
    `rows_of(ref)` gives a block's bytes. Positions that no span covers stay zero."""
    shape = layout.shape(plan.tokens)
    found = np.zeros(shape, np.uint32 if layout.itemsize == 4 else np.uint16)
    blocks: list[BlockRef] = list(plan.blocks)
    for span in plan.spans:
        ref = blocks[span.block]
        words = layout.words(rows_of(ref), ref.rows)
        found[:, :, span.start : span.stop] = words[:, :, span.row : span.row + span.length]
    return found


class RowOracle(Protocol):
    """Computes rows and checks those that are served: a `RowBook`, or rows that describe themselves
    (`tests.support.chaos.rows`)."""

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows: ...

    def write(
        self, tokens: Sequence[int], rows: Rows, positions: Sequence[int], exact: int
    ) -> None: ...

    def check(self, tokens: Sequence[int], plan: ReusePlan, rows: Rows) -> None: ...


class RowBook:
    """Remembers every row that was ever saved, by its bytes."""

    def __init__(self, layout: KVLayout, *, whole: bool = False) -> None:
        """`whole`: every prompt that is computed in part is noted with `complete`."""
        self.layout = layout
        self._whole = whole
        self._facts: dict[bytes, RowFact] = {}
        self._prompts: list[tuple[list[int], list[bytes]]] = []
        """Tokens and rows of every prompt that was computed in part."""

    def complete(self, tokens: Sequence[int], plan: ReusePlan, loaded: Rows, rows: Rows) -> None:
        """Note all rows of a prompt: those it `loaded` for a plan, and its own for the rest. Those
        that came from a pool are its own too: they are stored anew."""
        whole = rows.copy()
        reused = positions_of(plan.own(plan.spans))
        whole[:, :, reused] = loaded[:, :, reused]
        self._prompts.append((list(tokens), row_keys(whole)))

    def answered(self, length: int, tokens: Sequence[int], rows: Rows) -> None:
        """Note the rows of an answer behind a prompt of this length."""
        told, keys = list(tokens[:length]), row_keys(rows)[length:]
        self._prompts += [
            (list(tokens), [*known[:length], *keys])
            for prompt, known in self._prompts
            if prompt[:length] == told
        ]

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows:
        """The rows of a prompt whose first `exact` ones have their own full context."""
        return rows_for(tokens, self.layout, exact=exact, salt=salt)

    def write(
        self, tokens: Sequence[int], rows: Rows, positions: Sequence[int], exact: int
    ) -> None:
        """Note the rows that are about to be saved for the fresh `positions` of a prompt."""
        prefixes, keys = prefix_hashes(tokens), row_keys(rows)
        for at in positions:
            fact = RowFact(int(tokens[at]), at, at < exact, prefixes[at])
            known = self._facts.setdefault(keys[at], fact)
            assert known == fact, "two different rows have the same bytes: the test is broken"

    def check(self, tokens: Sequence[int], plan: ReusePlan, rows: Rows) -> None:
        """Check that the served `rows` were saved for these tokens and come from the planned
        places. Exact rows must be those of this very prefix, bit for bit."""
        prefixes, keys = prefix_hashes(tokens), row_keys(rows)
        for span in plan.spans:
            for at in range(span.start, span.stop):
                fact = self._facts.get(keys[at])
                assert fact is not None, f"position {at} got bytes that nobody saved"
                assert fact.token == tokens[at], f"position {at} got the row of another token"
                source = span.source + at - span.start
                assert fact.position == source, f"position {at} is not moved from its root"
                if span.exact:
                    assert fact.exact, f"position {at}: an edited row poses as exact"
                    assert fact.prefix == prefixes[at], f"position {at} is of another prefix"
        self._check_continued(list(tokens), plan, keys)

    def _check_continued(self, tokens: list[int], plan: ReusePlan, keys: list[bytes]) -> None:
        """Whether a prompt with the same first tokens had these very rows in these places."""
        start, stop = plan.exact, plan.continued
        assert positions_of(s for s in plan.spans if s.continued) == list(range(start, stop))
        if stop and self._whole:
            assert any(
                known[:stop] == tokens[:stop] and rows[start:stop] == keys[start:stop]
                for known, rows in self._prompts
            ), "rows are continued in a context that they were not computed in"


def check_partition(plan: ReusePlan) -> None:
    """Spans and placeholders cover the request up to `stop` exactly once, in order."""
    covered = sorted(positions_of(plan.spans) + positions_of(plan.placeholders()))
    assert covered == list(range(plan.stop)), "spans and placeholders do not partition the request"
    assert plan.stop < plan.tokens or not plan.spans, "the last position is never reused"
    assert positions_of(s for s in plan.spans if s.exact) == list(range(plan.exact))
    for span in plan.spans:
        assert span.row >= 0
        assert span.row + span.length <= plan.blocks[span.block].rows
        assert not span.exact or span.source == span.start


class Driver:
    """An engine without a model: saves prompts of one namespace and checks every row it is served.

    Several drivers, also of several stores one after the other, may share a `book`.
    """

    def __init__(self, store: Store, namespace: Namespace, book: RowOracle | None = None) -> None:
        self.store = store
        self.namespace = namespace
        self.book = book or RowBook(namespace.layout, whole=True)
        self._salts = itertools.count()
        self._loaded: dict[str, Rows] = {}
        """For each plan with edited rows what it was served, by lease."""
        self._computed: dict[str, Buffer] = {}
        """Rows of each staged prompt, by the id of its save; `save` forgets them."""

    def plan(self, tokens: Sequence[int], **options: Any) -> ReusePlan:
        """A checked plan. Call `finish` on it afterwards."""
        plan = self.store.plan(tokens, self.namespace, **options)
        check_partition(plan)
        self.check(tokens, plan)
        return plan

    def check(self, tokens: Sequence[int], plan: ReusePlan) -> None:
        """Check the rows that the plan refers to."""
        self.served(tokens, plan, gather(plan, self.namespace.layout, partial(self._rows_of, plan)))

    def served(self, tokens: Sequence[int], plan: ReusePlan, rows: Rows) -> None:
        """Check rows that were loaded for a plan."""
        self.book.check(tokens, plan, rows)
        if plan.generation and isinstance(self.book, RowBook):
            self._loaded[plan.lease] = rows

    def _rows_of(self, plan: ReusePlan, ref: BlockRef) -> memoryview:
        return self.store.rows_of(plan, plan.blocks.index(ref))

    def finish(self, plan: ReusePlan, failed: str = "") -> None:
        """End the request of the plan, whether it used the rows or not."""
        continued = max(0, plan.continued - plan.exact)
        edited, missing = plan.reused - plan.exact - continued, plan.tokens - plan.reused
        nbytes = plan.reused * self.namespace.layout.row_bytes
        outcome = Outcome(plan.exact, edited, missing, nbytes, 1e-3, failed, continued=continued)
        self.store.finish(plan, outcome)

    def serve(self, tokens: Sequence[int], **options: Any) -> ReusePlan:
        """Plan, check and finish."""
        plan = self.plan(tokens, **options)
        if not plan.declined:
            self.finish(plan)
        return plan

    def stage(
        self, tokens: Sequence[int], plan: ReusePlan | None = None, source: bytes = b""
    ) -> Staged:
        """Stage a prompt and compute what `plan` leaves out; `commit` makes it a node."""
        reuse = None if plan is None else reuse_of(plan)
        staged = self.store.stage(tokens, self.namespace, reuse, source=source)
        if not staged.known:
            spans = () if plan is None else plan.spans
            exact = min((span.start for span in spans if not span.exact), default=len(tokens))
            rows = self.book.computed(tokens, exact, f"{id(self)} {next(self._salts)}")
            fresh = positions_of(staged.fresh)
            self.book.write(tokens, rows, fresh, exact)
            if plan is not None and plan.generation and isinstance(self.book, RowBook):
                self.book.complete(tokens, plan, self._loaded[plan.lease], rows)
            blocks = packed(pick(rows, fresh), staged.sizes, self.namespace.layout)
            self._computed[staged.id] = Buffer(blocks)
        return staged

    def commit(self, staged: Staged) -> str | None:
        """Store the rows of a staged prompt. Returns the node's id, or None if it could not be
        kept."""
        return self.store.commit(staged.id, self._computed[staged.id])

    def save(
        self, tokens: Sequence[int], plan: ReusePlan | None = None, source: bytes = b""
    ) -> str | None:
        """Stage and commit. Returns the node's id, or None if it was known or could not be kept."""
        staged = self.stage(tokens, plan, source)
        if staged.known:
            return None
        node = self.commit(staged)
        del self._computed[staged.id]
        return node

    def serve_and_save(self, tokens: Sequence[int]) -> str | None:
        """Plan, save and finish, as an engine does with every request."""
        plan = self.plan(tokens)
        if plan.declined:
            return self.save(tokens)
        self.finish(plan)
        return self.save(tokens, plan)
