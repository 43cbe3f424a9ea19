"""Which store a remote's prefix belongs to: one object under the prefix says so."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection

import msgspec

from kvshare_store.blocks.remotes.base import Remote
from kvshare_store.errors import ForeignError, MissingBlockError, UnsupportedError
from kvshare_store.errors.wording import short

MARK = "kvshare-store.json"
_BLOCK = re.compile(r"^blocks/([0-9a-f]{64})/[0-9a-f]{64}$")


class _Mark(msgspec.Struct):
    store: str


class Owner:
    """The store that the prefix must belong to. `namespaces`: all that it has ever saved into.
    Releases before this one wrote no mark; their blocks are recognised by the namespace."""

    def __init__(self, store: str, namespaces: Collection[str]) -> None:
        self.store = store
        self._namespaces = namespaces
        self._sure = False
        self._alone: asyncio.Lock | None = None

    def doubt(self) -> None:
        """Check the mark again before the next write or removal."""
        self._sure = False

    async def check(self, remote: Remote) -> None:
        """Mark a prefix that has no mark. `ForeignError` if it belongs to another store, or holds
        blocks that this store has not written."""
        if self._alone is None:
            self._alone = asyncio.Lock()
        async with self._alone:
            if self._sure:
                return
            if not await self._marked(remote):
                await self._refuse_what_others_wrote(remote)
                await remote.create(MARK, msgspec.json.encode(_Mark(self.store)))
                await self._marked(remote)  # another may have been first
            self._sure = True

    async def _marked(self, remote: Remote) -> bool:
        """Whether the mark is there; `ForeignError` if it names another store."""
        try:
            value = bytes(await remote.get(MARK))
        except MissingBlockError:
            return False
        try:
            found = msgspec.json.decode(value, type=_Mark).store
        except msgspec.DecodeError:
            found = "?"
        if found != self.store:
            raise ForeignError(
                f"{remote.name} belongs to store {short(found)}, this is store "
                f"{short(self.store)}: choose another prefix; or, if that store is gone for good, "
                f"remove {MARK} and blocks/ there"
            )
        return True

    async def _refuse_what_others_wrote(self, remote: Remote) -> None:
        try:
            async for entry in remote.list("blocks/"):
                found = _BLOCK.match(entry.key)
                if found is None or found[1] not in self._namespaces:
                    raise ForeignError(
                        f"{remote.name} holds {entry.key[:40]}, which this store has not written: "
                        "choose another prefix, or remove blocks/ there"
                    )
        except UnsupportedError:
            return  # the engine cannot list; from now on the mark tells
