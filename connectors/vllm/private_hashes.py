"""Block hashes of a request that holds edited rows: nobody else's blocks are found by them.

vLLM publishes a request's blocks in its prefix cache under their hashes. From the first edited
block on the rows are not what their tokens say, so their hashes are keyed: with a secret of the
engine, and with all that made the rows. Two requests have the same private hashes only if they
have the same tokens, tenant, policy and plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import blake3
import msgspec

from kvshare_store.plan import ReusePlan, Span

if TYPE_CHECKING:
    from vllm.v1.request import Request


class PrivateHashes:
    """The hashes of one request, public and private; `hide` and `show` put them in its place."""

    def __init__(self, request: Request, key: bytes, first: int) -> None:
        """`first`: index of the first block that holds an edited row."""
        self.key = key
        self._request = request
        self._public: list[Any] = request.block_hashes
        self._public_hasher: Any = request._block_hasher
        self._private: list[Any] = self._public[:first]

    def hide(self) -> None:
        """From now on the request's blocks are published under private hashes."""
        self._use(self._private, self._new_hashes)

    def show(self) -> None:
        """From now on its blocks are published under vLLM's own hashes."""
        self._use(self._public, self._public_hasher)

    def _use(self, hashes: list[Any], hasher: Any) -> None:
        self._request.block_hashes, self._request._block_hasher = hashes, hasher
        self._request.update_block_hashes()

    def _new_hashes(self, request: Request) -> list[Any]:
        """Private hashes of the blocks that are full now and have none yet.

        They are made from vLLM's own, each of which goes on from vLLM's own: so they do not depend
        on how many blocks were filled at once.
        """
        request.block_hashes = self._public
        self._public.extend(self._public_hasher(request))
        request.block_hashes = self._private
        fresh = self._public[len(self._private) :]
        return [blake3.blake3(digest, key=self.key).digest() for digest in fresh]


def key_of(
    secret: bytes, namespace: str, policy: str, plan: ReusePlan, spans: Iterable[Span]
) -> bytes:
    """32 bytes that stand for where the rows come from. `secret`: 32 bytes of the engine's own."""
    names = [block.name for block in plan.blocks]
    made_of = msgspec.msgpack.encode((namespace, policy, names, list(spans)))
    return blake3.blake3(made_of, key=secret).digest()
