"""What is wrong with a catalogue, in the words that `kvshare check` prints."""

from __future__ import annotations

from typing import NamedTuple

from kvshare_store.errors import KVShareError


class Fault(NamedTuple):
    """Something in a catalogue that cannot be used. It is left out, whatever becomes of it."""

    about: str
    """Id of the node, digest of the namespace, or name of the file."""
    error: KVShareError
    """Its kind says what: `row`, `newer`, `namespace` or `torn`."""
    repaired: bool = False
    """It is not in the catalogue any more."""
