"""What `kvshare doctor` finds, and what it says of any daemon that answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kvshare_store.observability.version import version
from kvshare_store.readable import many

OK, NOTE, WARNING, WRONG = "ok", "note", "warning", "wrong"
_DAMAGED = "`kvshare check` says what is damaged; see daemon.log"
_LOOK_AT = {
    "corrupt": _DAMAGED,
    "storage": _DAMAGED,
    "row": _DAMAGED,
    "torn": _DAMAGED,
    "no_space": "too little memory or disk: the engine's log, or daemon.log, says which",
    "internal": "a bug, no damage: the engine's log, or daemon.log, has its traceback",
}
"""What to do about errors of each kind that is not expected. Engines report theirs, too."""


class Finding(NamedTuple):
    """One thing that was checked."""

    state: str
    what: str
    found: str
    advice: str = ""


def health(stats: dict[str, Any]) -> Iterator[Finding]:
    """Of a daemon, by its statistics: whether all of its parts work, and whether rows were lost."""
    theirs, state = stats["version"], stats["health"]["state"]
    found = f"process {stats['pid']}, version {theirs}, {state}, {many(stats['nodes'], 'node')}"
    if theirs != version():
        yield Finding(WARNING, "daemon", found, f"restart it: this is {version()}")
    elif state in ("ok", "well"):
        yield Finding(OK, "daemon", found)
    else:
        failed = ", ".join(stats["health"]["failures"])
        yield Finding(WRONG, "daemon", found, f"parts have failed ({failed}): see daemon.log")
    for kind, count in stats["errors"].items():
        if kind in _LOOK_AT:
            yield Finding(WARNING, "errors", f"{kind}: {count:,}", _LOOK_AT[kind])
