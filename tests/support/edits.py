"""Applies edit scripts, to check the stored ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvshare_store.nodes.edits import Edit, Tokens


def apply_edits(edits: Iterable[Edit], donor: Tokens) -> Tokens:
    """The request that `edits` make of `donor`. The edits must cover the donor in order."""
    parts: list[Tokens] = [np.empty(0, np.int32)]
    at = 0
    for edit in edits:
        assert at == edit.start <= edit.stop <= len(donor)
        if edit.kind == "keep":
            parts.append(donor[edit.start : edit.stop])
        parts.append(np.asarray(edit.tokens, np.int32))
        at = edit.stop
    assert at == len(donor)
    return np.concatenate(parts)
