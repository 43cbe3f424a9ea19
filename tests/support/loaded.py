"""Loads what a daemon needs, in the process from which daemons are forked.

Threads do not survive a fork. So LanceDB's, which waits for work from the import on, is ended here,
and `begin_lance` begins it in a process that needs it.
"""

from __future__ import annotations

from collections.abc import Callable

from kvshare_store.cli.libraries import load_lancedb

load_lancedb()

from lancedb import background_loop  # noqa: E402 - it loads all of LanceDB

from kvshare_store.cli import main, serve  # noqa: E402, F401 - for the daemons
from kvshare_store.daemon import server  # noqa: E402, F401 - the same

_LOOP = background_loop.LOOP
_BEGIN: Callable[[], None] = _LOOP._start


def _end_lance() -> None:
    _LOOP.loop.call_soon_threadsafe(_LOOP.loop.stop)
    _LOOP.thread.join()
    _LOOP.loop.close()
    # LanceDB begins its thread in every child and warns of what held a lock: nothing here does
    _LOOP._start = lambda: None  # type: ignore[method-assign]
    background_loop._FORK_WARNED = True


def begin_lance() -> None:
    """Begin LanceDB's thread in a forked process."""
    _BEGIN()


_end_lance()
