"""What the adapter needs of LMCache, looked up by name because its interfaces move between
releases.

`UnsupportedError` says which name or method is missing, and what to install.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any, NamedTuple

from kvshare_store.errors import UnsupportedError

TESTED = "0.5.6"
_ADAPTERS = "lmcache.v1.distributed.l2_adapters"


class Interface(NamedTuple):
    """The classes of LMCache that the adapter is made of."""

    adapter: Any
    """Base class of L2 adapters."""
    config: Any
    """Base class of their configurations."""
    key: Any
    bitmap: Any
    usage: Any
    """What `get_usage` answers with; None if this LMCache asks adapters for something else."""
    store_result: Callable[[bool, int], Any]
    """Success, and bytes stored."""
    key_page: Callable[[list[tuple[Any, int]], str | None], Any] | None
    """A page of keys with their sizes, and the next cursor; None if this LMCache lists no keys."""


def lmcache_interface() -> Interface:
    """What this LMCache has; `UnsupportedError` if that is too little."""
    api = "lmcache.v1.distributed.api"
    return Interface(
        adapter=_wanted("L2AdapterInterface", f"{_ADAPTERS}.base"),
        config=_wanted("L2AdapterConfigBase", f"{_ADAPTERS}.config"),
        key=_wanted("ObjectKey", api),
        bitmap=_wanted("Bitmap", "lmcache.lmcache_native", "lmcache.native_storage_ops"),
        usage=_found("AdapterUsage", f"{_ADAPTERS}.base"),
        store_result=_found("L2StoreResult", "lmcache.v1.distributed.internal_api") or _success,
        key_page=_key_page(_found("KeyListPage", api), _found("KeyEntry", api)),
    )


def check_complete(adapter: type, interface: Interface) -> None:
    """`UnsupportedError` if LMCache asks for methods that the adapter does not have, or calls those
    that it has in another way than the tested releases."""
    missing = sorted(getattr(adapter, "__abstractmethods__", ()))
    if missing:
        raise UnsupportedError(_advice(f"it asks L2 adapters for {', '.join(missing)}"))
    for name, arguments in _ARGUMENTS.items():
        asked = _positional(getattr(interface.adapter, name, None))
        if asked is not None and asked[: len(arguments)] != arguments:
            raise UnsupportedError(_advice(f"it calls {name}({', '.join(asked)})"))


_ARGUMENTS = {
    "submit_store_task": ["keys", "objects"],
    "submit_lookup_and_lock_task": ["keys"],
    "query_lookup_and_lock_result": ["task_id"],
    "submit_unlock": ["keys"],
    "submit_load_task": ["keys", "objects"],
    "query_load_result": ["task_id"],
    "delete": ["keys"],
}
"""The first parameters of each method; later releases may append more."""


def accepted(function: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """Those of the keyword arguments that a function of LMCache accepts."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def _positional(function: Any) -> list[str] | None:
    if function is None:
        return None
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _wanted(name: str, *modules: str) -> Any:
    found = _found(name, *modules)
    if found is None:
        raise UnsupportedError(_advice(f"{name} is not in {' or '.join(modules)}"))
    return found


def _found(name: str, *modules: str) -> Any:
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


def _advice(what: str) -> str:
    try:
        version = metadata.version("lmcache")
    except metadata.PackageNotFoundError:
        return f"LMCache is not installed: pip install lmcache=={TESTED}"
    return (
        f"LMCache {version} is not one that this release of kvshare-store can work under: {what}. "
        f"Install lmcache=={TESTED}, or a newer kvshare-store"
    )


def _success(success: bool, _: int) -> bool:
    return success


def _key_page(page: Any, entry: Any) -> Callable[[list[tuple[Any, int]], str | None], Any] | None:
    if page is None or entry is None:
        return None
    return lambda keys, cursor: page(
        entries=tuple(entry(key.to_encoded_object_key(), nbytes) for key, nbytes in keys),
        next_page_token=cursor,
    )
