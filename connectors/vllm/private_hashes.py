"""Block hashes of a request that holds edited rows.

vLLM publishes blocks in its prefix cache under hashes of their tokens. Edited rows depend on more
than their tokens, so from the first edited block on the hashes are keyed, with a secret of the
engine and everything that the rows were made from. Two requests have the same private hashes only
if tokens, tenant, policy and plan are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import blake3
import msgspec
from vllm.v1.core.kv_cache_utils import BlockHash

from kvshare_store.plan import ReusePlan, Span

if TYPE_CHECKING:
    from kvshare_connectors.vllm.types import BlockHasher
    from vllm.v1.request import Request


class PrivateHashes:
    """The public and the private hashes of one request; `hide` and `show` switch between them."""

    def __init__(self, request: Request, key: bytes, first: int) -> None:
        """`first`: index of the first block that holds an edited row."""
        self.key = key
        self._request = request
        self._public = request.block_hashes
        # it is None where vLLM caches no prefixes; then `publishing` hides nothing
        self._public_hasher = cast("BlockHasher", request._block_hasher)
        self._private = self._public[:first]

    def hide(self) -> None:
        """From now on the request's blocks are published under private hashes."""
        self._use(self._private, self._new_hashes)

    def show(self) -> None:
        """From now on its blocks are published under vLLM's own hashes."""
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
        fresh = self._public[len(self._private) :]
        return [BlockHash(blake3.blake3(digest, key=self.key).digest()) for digest in fresh]


def key_of(
    secret: bytes, namespace: str, policy: str, plan: ReusePlan, spans: Iterable[Span]
) -> bytes:
    """A key of 32 bytes from everything that the rows are made from. `secret`: 32 bytes."""
    names = [block.name for block in plan.blocks]
    made_of = msgspec.msgpack.encode((namespace, policy, names, list(spans)))
    return blake3.blake3(made_of, key=secret).digest()
