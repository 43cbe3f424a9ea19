"""What messages of errors and of the log are made of: ids cut short, the name that was probably
meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_ID = 12
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_NEAR = 0.8
"""Likeness from which one name is taken for another; `polici` and `policy` have 0.83."""


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that was probably meant; None if none is near."""
    found = difflib.get_close_matches(name, known, 1, _NEAR)
    return found[0] if found else None


def unknown(what: str, name: object, known: Sequence[str]) -> str:
    """That there is no such name, and which one was probably meant."""
    meant = nearest(str(name), known)
    hint = f"did you mean {meant}?" if meant else "`kvshare config` lists all"
    return f"unknown {what} {name!r}; {hint}"


def either(words: Iterable[str]) -> str:
    """`a`, `a or b`."""
    return " or ".join(words)


def short(name: str) -> str:
    """The beginning of an id or block name: enough to find it again."""
    return name[:_ID]


def duration(seconds: float) -> str:
    """`5 min`: whole units of the largest kind that fits."""
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def os_reason(error: BaseException) -> str:
    """Why a call of the system failed, without the number and the path that Python adds."""
    return str(getattr(error, "strerror", None) or error)
