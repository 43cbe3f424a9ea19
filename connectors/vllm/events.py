"""Tells routers that listen to vLLM's KV events what the store has of this engine's prompts.

Only exact rows: an event says that a block holds the KV of its tokens in their full context. A
prompt is announced once the daemon has stored it, and withdrawn once the daemon no longer has it; a
thread asks. Blocks have the hashes that vLLM itself gives them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvshare_connectors.vllm.requests import RequestState
from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from kvshare_store.bounded import Latest
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import KVShareError
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.nodes.node import node_id
from kvshare_store.observability.threads import Health, Supervised

if TYPE_CHECKING:
    from vllm.v1.request import Request

log = logging.getLogger("kvshare")

_EVERY_S = 0.5
"""Seconds between two questions to the daemon."""
_PATIENCE = 120
"""A prompt that is still missing after so many questions was not stored."""
_MOST = 4096
"""Most prompts that are announced; the oldest is withdrawn for the next one."""
_ASKED = 256
"""How many of these one question is about."""


class Prompt(NamedTuple):
    """The full paged blocks of a prompt, possibly with its answer, in order."""

    hashes: tuple[BlockHash, ...]
    tokens: tuple[int, ...]
    """Hashes of these blocks."""
    extra_keys: tuple[tuple[object, ...] | None, ...]
    """The other inputs of each hash."""
    lora: tuple[int, str] | None


class Announced:
    """Which blocks are announced to routers, by prompt.

    Blocks that several prompts have are announced once, and withdrawn with the last of these
    prompts. Not thread-safe.
    """

    def __init__(self, block: int) -> None:
        """`block`: tokens of a paged block."""
        self._block = block
        self._prompts: OrderedDict[str, tuple[BlockHash, ...]] = OrderedDict()
        self._users: Counter[BlockHash] = Counter()

    def oldest(self, count: int) -> list[str]:
        """Ids of announced prompts, least recently checked first."""
        return list(self._prompts)[:count]

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, name: str, prompt: Prompt) -> list[KVCacheEvent]:
        """A prompt is stored."""
        if name in self._prompts:
            return []
        known = sum(1 for digest in prompt.hashes if digest in self._users)  # they come first
        self._prompts[name] = prompt.hashes
        self._users.update(prompt.hashes)
        return [self._stored(prompt, known)] if known < len(prompt.hashes) else []

    def _stored(self, prompt: Prompt, known: int) -> BlockStored:
        lora_id, lora_name = prompt.lora or (None, None)
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(digest) for digest in prompt.hashes[known:]],
            parent_block_hash=maybe_convert_block_hash(prompt.hashes[known - 1]) if known else None,
            token_ids=list(prompt.tokens[known * self._block :]),
            block_size=self._block,
            lora_id=lora_id,
            medium=MEDIUM_CPU,
            lora_name=lora_name,
            extra_keys=to_event_extra_keys(prompt.extra_keys[known:]),
            group_idx=0,
        )

    def keep(self, name: str) -> None:
        """A prompt is still stored."""
        self._prompts.move_to_end(name)

    def remove(self, name: str) -> list[KVCacheEvent]:
        """A prompt has left the store."""
        hashes = self._prompts.pop(name, ())
        self._users.subtract(hashes)
        gone = [digest for digest in hashes if not self._users[digest]]
        for digest in gone:
            del self._users[digest]
        if not gone:
            return []
        names = [maybe_convert_block_hash(digest) for digest in gone]
        return [BlockRemoved(block_hashes=names, medium=MEDIUM_CPU, group_idx=0)]


class Announcer:
    """One per engine. The scheduler's thread says what is being stored and takes the events."""

    def __init__(self, config: StoreConfig, block: int) -> None:
        """`block`: tokens of a paged block."""
        self._home = config.home_path
        self._block = block
        self._lock = threading.Lock()
        self._waiting: Latest[str, tuple[Prompt, int]] = Latest(_MOST)
        """Prompts that are being stored, and how many more questions each may take."""
        self._announced = Announced(block)
        self._events: deque[KVCacheEvent] = deque()
        self._stop = threading.Event()
        self._thread = Supervised("kvshare-events", self._run, Health(), self._stop)

    # --- the scheduler's thread --------------------------------------------------------------

    def saving(self, state: RequestState, length: int) -> None:
        """The first `length` tokens of a request, all of whose rows are exact, are being stored."""
        tokens = as_tokens(state.request.all_token_ids[:length])
        self.found(state, length, node_id(state.namespace.digest, tokens, True))

    def found(self, state: RequestState, length: int, node: str) -> None:
        """The rows of these tokens are, or are about to be, in a node of the store."""
        request = state.request
        count = min(length // self._block, len(request.block_hashes))
        if not count:
            return
        with self._lock:
            self._waiting[node] = (_prompt(request, count, self._block), _PATIENCE)

    def take(self) -> list[KVCacheEvent]:
        """Events since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def forget(self) -> None:
        """Routers have dropped everything: prompts are announced again when they are stored or
        found next."""
        with self._lock:
            self._waiting.clear()
            self._take_back(self._announced.oldest(_MOST))

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join()

    # --- the other thread --------------------------------------------------------------------

    def _run(self) -> None:
        with Client(self._home) as client:
            while not self._stop.wait(_EVERY_S):
                try:
                    self._ask(client)
                except KVShareError as error:
                    log.debug("kvshare: what is stored could not be asked: %s", error)
                    client.reconnect()

    def _ask(self, client: Client) -> None:
        with self._lock:
            names = [*self._waiting, *self._announced.oldest(_ASKED)]
        if not names:
            return
        found = client.call(protocol.HasNodes(tuple(names), use=False))
        with self._lock:  # new prompts first: they may have blocks of those that left
            here = {name for name, is_here in zip(names, found, strict=True) if is_here}
            self._look_at_waiting(names, here)
            for name in self._announced.oldest(_ASKED):
                if name in here:
                    self._announced.keep(name)
            self._take_back(name for name in names if name not in here)
            self._take_back(self._announced.oldest(max(0, len(self._announced) - _MOST)))

    def _look_at_waiting(self, names: Sequence[str], here: set[str]) -> None:
        for name in names:
            if name not in self._waiting:
                continue
            prompt, patience = self._waiting[name]
            if name in here:
                self._events.extend(self._announced.add(name, prompt))
            if name in here or not patience:
                del self._waiting[name]
            else:
                self._waiting[name] = (prompt, patience - 1)

    def _take_back(self, names: Iterable[str]) -> None:
        for name in names:
            self._events.extend(self._announced.remove(name))


def _prompt(request: Request, count: int, block: int) -> Prompt:
    """The first `count` paged blocks of a request."""
    lora = request.lora_request
    return Prompt(
        tuple(request.block_hashes[:count]),
        tuple(request.all_token_ids[: count * block]),
        tuple(
            generate_block_hash_extra_keys(request, start, start + block, 0)[0]
            for start in range(0, count * block, block)
        ),
        (lora.adapter_id, lora.name) if lora is not None else None,
    )
