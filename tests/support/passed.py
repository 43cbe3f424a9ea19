"""Which files of the store a request passes: the table of docs/design/architecture.md, made by
`python -m tests.support.passed`.

A daemon in this process and a client of it, as a worker has: one prompt is served from the host
tier, another is saved, and every function that is called meanwhile is noted with its file. Left out
is what the daemon would do without the request: whatever its lanes do outside of an answer.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.plan import Outcome
from kvshare_store.plan.editor import Editor
from tests.support.daemons import ClientDriver, serving
from tests.support.documents import DOCS
from tests.support.made_parts import Parts, remake, table
from tests.support.neighbours import NAMESPACE
from tests.support.oracle import prompt
from tests.support.stores import SMALL
from tests.support.waiting import until

NOTE = DOCS / "design" / "architecture.md"
PACKAGE = "kvshare_store/"
LENGTH, WARM = 300, 3
MOVES, ANSWERS = ("daemon/switchboard.py", "turn"), ("daemon/handling.py", "answer")
"""Where the daemon works for a request: while it moves messages, and while a lane answers."""
STORING = ("kvshare-commit", "kvshare-io", "kvshare-disk")
"""Threads that make a node durable, by the beginning of their names."""
STEPS = ("serve", "save, until it is answered", "save, until it is durable")


class Watch:
    """Notes files while it is on, in all threads that begin after it."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.answers = 0
        """How many requests lanes have answered."""
        self._on = self._storing = False
        self._client = threading.current_thread()
        self._inside = threading.local()

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """What Python calls for each call and return."""
        code = frame.f_code
        _, package, name = code.co_filename.rpartition(PACKAGE)
        if not package or event not in ("call", "return"):
            return
        step = 1 if event == "call" else -1
        if (function := (name, code.co_name)) in (MOVES, ANSWERS):
            self._inside.depth = self._depth + step
            self.answers += function == ANSWERS and event == "return"
        if self._on and event == "call" and self._counts():
            self.files.add(name)

    @property
    def _depth(self) -> int:
        return int(getattr(self._inside, "depth", 0))

    def _counts(self) -> bool:
        """Whether this thread works for a request now."""
        thread = threading.current_thread()
        stores = self._storing and thread.name.startswith(STORING)
        return thread is self._client or self._depth > 0 or stores

    @contextmanager
    def on(self, *, storing: bool = False) -> Iterator[set[str]]:
        """The files that are passed in the block; `storing`: also by what makes nodes durable."""
        self.files = set()
        self._on, self._storing = True, storing
        try:
            yield self.files
        finally:
            self._on = False


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch over this thread and all that begin in the block. What others left behind is not
    tidied up meanwhile: it would be noted."""
    watch = Watch()
    gc.collect()
    gc.disable()
    threading.setprofile(watch.note)
    sys.setprofile(watch.note)
    try:
        yield watch
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        gc.enable()


def serve(client: Client, editor: Editor, tokens: list[int]) -> None:
    """Plan a prompt, load its rows from the host tier and end, as an engine does."""
    plan = client.plan(tokens, NAMESPACE)
    assert plan.exact == len(tokens) - 1
    leased = client.leased_rows(plan.lease, plan.arena, plan.blocks)
    for ref in plan.blocks:
        leased.check(ref)
    editor.edit(plan.spans, plan.blocks, lambda ref: leased.rows(ref.offset, ref.nbytes))
    for ref in plan.blocks:
        leased.check(ref)
    client.finish(plan.lease, Outcome(plan.exact, 0, 1))


def passed(home: Path) -> dict[str, set[str]]:
    """The files by step."""
    config = StoreConfig(home=str(home), **SMALL)
    with watching() as watch, serving(config), Client(config.home_path) as client:
        engine, editor = ClientDriver(client, NAMESPACE), Editor(NAMESPACE.layout, None)

        def served(number: int) -> None:
            before = watch.answers
            serve(client, editor, prompt(number, LENGTH))
            until(lambda: watch.answers == before + 2, 60.0)  # the plan, and its end

        for number in range(WARM):
            engine.save(prompt(number, LENGTH))
            client.flush()
            served(number)
        with watch.on() as of_serve:
            served(0)
        with watch.on() as answered:
            engine.save(prompt(WARM, LENGTH))
        client.flush()
        with watch.on(storing=True) as durable:
            engine.save(prompt(WARM + 1, LENGTH))
            client.flush()
    return dict(zip(STEPS, (of_serve, answered, durable), strict=True))


def parts(found: dict[str, set[str]]) -> Parts:
    """The files by folder; of the last step those that the one before does not pass."""
    serve, answered, durable = (found[step] for step in STEPS)
    more = durable - answered
    heads = [
        "folder", f"serve: {len(serve)} files", f"save, until it is answered: {len(answered)}",
        f"until it is durable: {len(more)} more",
    ]  # fmt: skip
    folders = sorted({str(Path(name).parent) for name in serve | durable})
    rows = [
        [
            "top" if folder == "." else f"`{folder}`",
            *(_names(folder, files) for files in (serve, answered, more)),
        ]
        for folder in folders
    ]
    return {"files": table(heads, rows)}


def _names(folder: str, files: set[str]) -> str:
    return ", ".join(sorted(f"`{Path(name).stem}`" for name in files
                            if str(Path(name).parent) == folder))  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        remake(NOTE, parts(passed(Path(place) / "home")))
