"""Block hashes of a request that holds edited rows.

vLLM publishes blocks in its prefix cache under hashes of their tokens. Edited rows, and what was
computed behind them, depend on more than their tokens. So from the first such block on the hashes
are keyed, with a secret of the engine, the tenant and the contexts of the block's rows. Requests
with the same tokens and contexts have the same rows and find each other's blocks; no others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import blake3
import msgspec
from vllm.v1.core.kv_cache_utils import BlockHash

from kvshare_store.plan.contexts import Context

if TYPE_CHECKING:
    from kvshare_connectors.vllm.types import BlockHasher
    from vllm.v1.request import Request


class PrivateHashes:
    """The public and the private hashes of one request; `hide` and `show` switch between them."""

    def __init__(self, request: Request, keys: Sequence[tuple[int, bytes]]) -> None:
        """`keys`: see `keys_of`."""
        self.keys = keys
        self._request = request
        self._public = request.block_hashes
        # it is None where vLLM caches no prefixes; then `publishing` hides nothing
        self._public_hasher = cast("BlockHasher", request._block_hasher)
        self._private = self._public[: keys[0][0]]

    def hide(self) -> None:
        """From now on the request's blocks are published, and found, under private hashes."""
        self._use(self._private, self._new_hashes)

    def show(self) -> None:
        """From now on its blocks are published, and found, under vLLM's own hashes."""
        self._use(self._public, self._public_hasher)

    def _use(self, hashes: list[BlockHash], hasher: BlockHasher) -> None:
        self._request.block_hashes, self._request._block_hasher = hashes, hasher
        self._request.update_block_hashes()

    def _new_hashes(self, request: Request) -> list[BlockHash]:
        """Private hashes of the blocks that have become full.

        Each is made from vLLM's own hash of the block, and those form one chain. So they do not
        depend on how many blocks became full at once.
        """
        request.block_hashes = self._public
        self._public.extend(self._public_hasher(request))
        request.block_hashes = self._private
        fresh: list[BlockHash] = []
        for at, (first, key) in enumerate(self.keys):
            stop = self.keys[at + 1][0] if at + 1 < len(self.keys) else len(self._public)
            part = self._public[max(first, len(self._private)) : stop]
            fresh += [BlockHash(blake3.blake3(digest, key=key).digest()) for digest in part]
        return fresh


def keys_of(
    secret: bytes, namespace: str, contexts: Sequence[Context], block: int
) -> list[tuple[int, bytes]]:
    """Keys of 32 bytes, each with the index of the first paged block that it is for, ascending.

    `secret`: 32 bytes. `contexts`: of the request's rows, at least one. `block`: tokens of a paged
    block; its rows may have several contexts.
    """
    keys: dict[int, bytes] = {}
    for count, context in enumerate(contexts, 1):
        made_of = msgspec.msgpack.encode((namespace, contexts[:count]))
        keys[context.start // block] = blake3.blake3(made_of, key=secret).digest()
    return list(keys.items())
