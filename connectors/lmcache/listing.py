"""All keys of a home, page by page."""

from __future__ import annotations

from kvshare_connectors.lmcache.objects import Parts
from kvshare_connectors.lmcache.shelf import Shelf

from kvshare_store.namespace import Tenants

Page = tuple[list[tuple[Parts, int]], str | None]
"""Keys with their sizes, and where the next page begins; None after the last one."""


def next_keys(shelf: Shelf, tenants: Tenants, model: str, size: int, cursor: str) -> Page:
    """At most `size` keys after `cursor` (empty: from the start), of one model or of all (empty).

    A cursor is the place of the last key: its namespace and its node. `ValueError` if it is
    malformed, or if `size` is not positive.
    """
    if size <= 0:
        raise ValueError(f"a page has at least one key, not {size}")
    at, _, after = cursor.partition(":")
    if cursor and not (at and after):
        raise ValueError(f"{cursor!r} is no cursor of this adapter")
    keys: list[tuple[Parts, int]] = []
    for holding in shelf.held(model):
        if holding.digest < at:
            continue
        behind = after if holding.digest == at else ""
        for node, key, nbytes in shelf.keys(holding, behind, size - len(keys), tenants):
            keys.append((key, nbytes))
            last = f"{holding.digest}:{node}"
        if len(keys) == size:
            return keys, last
    return keys, None
