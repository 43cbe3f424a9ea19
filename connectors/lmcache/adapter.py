"""LMCache's L2 adapter on KVShare's store.

    lmcache server ... --l2-adapter '{"type": "plugin",
        "module_path": "kvshare_connectors.lmcache.adapter", "class_name": "KVShareL2Adapter",
        "adapter_params": {"home": "/var/lib/kvshare"}}'

LMCache looks in this module for both classes: the configuration's name follows from the adapter's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from kvshare_connectors.lmcache.interface import accepted, check_complete, lmcache_interface
from kvshare_connectors.lmcache.lane import Failures, Lane
from kvshare_connectors.lmcache.listing import next_keys
from kvshare_connectors.lmcache.objects import Place, parts_of, place_of, salt_of
from kvshare_connectors.lmcache.settings import KVShareL2AdapterConfig
from kvshare_connectors.lmcache.shelf import Shelf
from kvshare_connectors.lmcache.sizes import Sizes

from kvshare_store.errors import KVShareError
from kvshare_store.namespace import Tenants

_LMCACHE = lmcache_interface()
_AdapterBase: Any = _LMCACHE.adapter
T = TypeVar("T")


class KVShareL2Adapter(_AdapterBase):  # type: ignore[misc,no-any-unimported]
    """Stores, looks up and loads LMCache's objects in a home of KVShare's.

    A store task is done when its objects are durable. An object that a lookup has found may be gone
    when it is loaded; LMCache takes that as a miss. `KVShareError` if the home cannot be used;
    after that, whatever fails is a miss.
    """

    def __init__(self, config: KVShareL2AdapterConfig, *_: Any, **__: Any) -> None:
        base = super().__init__
        base(**accepted(base, max_capacity_bytes=config.capacity_bytes))
        self._config = config
        self._tenants = Tenants(config.store)
        self._sizes = Sizes()
        self._locks = Counter[Any]()
        self._locking = threading.Lock()
        self._failures = Failures()
        self._shelf, self._turn = Shelf(config.store), threading.Lock()
        self._with_shelf(lambda shelf: self._sizes.learn_held(shelf.held()))
        self._stores = Lane[Any]("store", config.store, self._failures)
        self._lookups = Lane[Any]("lookup", config.store, self._failures)
        self._loads = Lane[Any]("load", config.store, self._failures)

    def _with_shelf(self, work: Callable[[Shelf], T]) -> T:
        """Do in LMCache's own thread what LMCache waits for."""
        with self._turn:
            return work(self._shelf)

    # --- events ----------------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        """Readable when a store task is done."""
        return self._stores.fd

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup is done."""
        return self._lookups.fd

    def get_load_event_fd(self) -> int:
        """Readable when a load task is done."""
        return self._loads.fd

    # --- store -----------------------------------------------------------------------------------

    def submit_store_task(
        self, keys: Sequence[Any], objects: Sequence[Any], *_: Any, **__: Any
    ) -> int:
        """Store objects; those that are here already are left as they are."""
        failed = _LMCACHE.store_result(False, 0)
        return self._stores.submit(lambda shelf: self._store(shelf, keys, objects), failed)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Results of the store tasks done since the last call."""
        return self._stores.results()

    def _store(self, shelf: Shelf, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        datas = [_bytes_of(one) for one in objects]
        placed = [
            (key, data, place)
            for key, data in zip(keys, datas, strict=True)
            if (place := self._place(key, len(data))) is not None
        ]
        here = shelf.has([place.node for _, _, place in placed])
        fresh = [one for one, known in zip(placed, here, strict=True) if not known]
        for _, data, place in fresh:
            shelf.put(place, data)
        if fresh:
            shelf.flush()
        kept = shelf.has([place.node for _, _, place in fresh])
        stored = [(key, len(d)) for (key, d, _), here in zip(fresh, kept, strict=True) if here]
        for key, data, _ in placed:
            self._sizes.learn(parts_of(key), len(data))
        self._notify("stored", stored)
        success = len(placed) == len(datas) and all(kept)
        return _LMCACHE.store_result(success, sum(nbytes for _, nbytes in stored))

    # --- lookup ----------------------------------------------------------------------------------

    def submit_lookup_and_lock_task(
        self,
        keys: Sequence[Any],
        group_layout_descs: Mapping[int, Any] | None = None,
        *_: Any,
        **__: Any,
    ) -> int:
        """Which objects are here. A lock keeps this adapter from deleting an object, and makes the
        store evict it last. It does not promise that the store still has the object when it is
        loaded."""
        layouts = group_layout_descs if isinstance(group_layout_descs, Mapping) else None
        none = _LMCACHE.bitmap(len(keys))
        return self._lookups.submit(lambda shelf: self._lookup(shelf, keys, layouts), none)

    def query_lookup_and_lock_result(self, task_id: int) -> Any | None:
        """A bitmap, once; None while there is none."""
        return self._lookups.result(task_id)

    def submit_unlock(self, keys: Sequence[Any], *_: Any, **__: Any) -> None:
        """The keys may be deleted again."""
        with self._locking:
            self._locks -= Counter(keys)

    def _lookup(self, shelf: Shelf, keys: Sequence[Any], layouts: Mapping[int, Any] | None) -> Any:
        if not all(self._sizes.of(parts_of(key), layouts) for key in keys):
            self._sizes.learn_held(shelf.held())
        places = self._places(keys, layouts)
        here = shelf.has([place.node for _, place in places])
        found = {at for (at, _), known in zip(places, here, strict=True) if known}
        with self._locking:
            self._locks.update(keys[at] for at in found)
        return _bitmap(len(keys), found)

    def _places(
        self, keys: Sequence[Any], layouts: Mapping[int, Any] | None = None
    ) -> list[tuple[int, Place]]:
        """Where each key's object may be, with the key's index: one place for each size."""
        return [
            (at, place)
            for at, key in enumerate(keys)
            for nbytes in sorted(self._sizes.of(parts_of(key), layouts))
            if (place := self._place(key, nbytes)) is not None
        ]

    def _place(self, key: Any, nbytes: int) -> Place | None:
        return place_of(parts_of(key), nbytes, self._tenants)

    # --- load ------------------------------------------------------------------------------------

    def submit_load_task(
        self, keys: Sequence[Any], objects: Sequence[Any], *_: Any, **__: Any
    ) -> int:
        """Fill objects, each of which must have the size it was stored with."""
        none = _LMCACHE.bitmap(len(keys))
        return self._loads.submit(lambda shelf: self._load(shelf, keys, objects), none)

    def query_load_result(self, task_id: int) -> Any | None:
        """A bitmap, once; None while there is none."""
        return self._loads.result(task_id)

    def _load(self, shelf: Shelf, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        loaded: list[int] = []
        try:
            for at, (key, one) in enumerate(zip(keys, objects, strict=True)):
                data = _bytes_of(one)
                place = self._place(key, len(data))
                if place is not None and shelf.take(place, data):
                    loaded.append(at)
        except KVShareError as error:  # what was loaded before it counts
            self._failures.failed(error, "a load")
        self._notify("accessed", [(keys[at], 0) for at in loaded])
        return _bitmap(len(keys), loaded)

    # --- what LMCache's eviction and its operators ask -------------------------------------------

    def delete(self, keys: Sequence[Any], *_: Any, **__: Any) -> None:
        """Remove objects, except locked ones."""
        with self._locking:
            free = [key for key in keys if not self._locks[key]]
        places = self._places(free)
        try:
            gone = self._with_shelf(lambda shelf: shelf.forget([place.node for _, place in places]))
        except KVShareError as error:
            self._failures.failed(error, "a delete")
            return
        deleted = [(free[at], place.nbytes) for at, place in places if place.node in gone]
        self._notify("deleted", deleted)

    def list_l2_keys(
        self,
        model_name: str | None = None,
        page_size: int = 500,
        cursor: str | None = None,
        **_: Any,
    ) -> Any:
        """The keys of all objects in the home, whoever stored them."""
        if _LMCACHE.key_page is None:
            raise NotImplementedError("this LMCache has no pages of keys")
        found, following = self._with_shelf(
            lambda shelf: next_keys(shelf, self._tenants, model_name or "", page_size, cursor or "")
        )
        keys = [(_LMCACHE.key(**accepted(_LMCACHE.key, **k._asdict())), n) for k, n in found]
        return _LMCACHE.key_page(keys, following)

    def get_usage(self) -> Any:
        """Bytes of all objects in the home, whoever stored them."""
        if _LMCACHE.usage is None:
            return super().get_usage()
        by_salt = Counter[str]()
        for one in self._with_shelf(lambda shelf: shelf.held()):
            by_salt[salt_of(one.namespace, self._tenants)] += one.nbytes
        return _LMCACHE.usage(
            total_bytes_used=by_salt.total(),
            total_capacity_bytes=self._config.capacity_bytes,
            bytes_by_cache_salt=MappingProxyType(dict(by_salt)),
        )

    def report_status(self) -> dict[str, Any]:
        """Whether tasks are processed, and what has failed."""
        lanes = (self._stores, self._lookups, self._loads)
        return {
            "is_healthy": all(lane.alive for lane in lanes) and not self._failures.last,
            "type": type(self).__name__,
            "home": str(self._config.store.home_path),
            "failures": self._failures.counts(),
            "last_failure": self._failures.last,
        }

    def close(self) -> None:
        """Finish the tasks in progress. Everything that was stored stays."""
        for lane in (self._stores, self._lookups, self._loads):
            lane.close()
        with self._turn:
            self._shelf.close()

    def _notify(self, what: str, objects: Sequence[tuple[Any, int]]) -> None:
        """Tell LMCache's listeners; `what`: stored, accessed or deleted."""
        tell = getattr(super(), f"_notify_keys_{what}", None)
        if objects and tell is not None:
            keys, sizes = [key for key, _ in objects], [nbytes for _, nbytes in objects]
            tell(keys, **accepted(tell, sizes=sizes))


def _bytes_of(one: Any) -> memoryview:
    """The bytes of a `MemoryObj`, in place."""
    return memoryview(one.byte_array).cast("B")


def _bitmap(length: int, indices: Sequence[int] | set[int]) -> Any:
    bitmap = _LMCACHE.bitmap(length)
    for at in indices:
        bitmap.set(at)
    return bitmap


check_complete(KVShareL2Adapter, _LMCACHE)
