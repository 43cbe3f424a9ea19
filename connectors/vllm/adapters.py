"""The identity of an adapter: a fingerprint of its files, not only its name and path.

A worker loads an adapter when its id (`lora_int_id`) is first used, keeps it while there is room,
and may read the files again later. While the files are unchanged since the id was first seen, they
are the weights in use. Once they differ, the worker may use either version: requests are declined
until the adapter is loaded under another id, in place, or by another engine.

vLLM's own prefix cache knows an adapter by name and path only, and keeps its blocks when it is
unloaded. So requests of changed files are kept apart there (`Adapter.apart`): else they would be
computed behind rows of the old version, and stored as rows of the new one.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvshare_connectors.vllm.identity import WEIGHTS, fingerprint, local_folder, snapshot_of

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

_CONFIGURATION = "adapter_config.json"

Files = list[tuple[str, int, int]]
"""Name, bytes and time of the last change (ns) of every file that makes an adapter."""


class Adapter(NamedTuple):
    """An adapter's identity in the namespace, and why its requests are declined, if they are."""

    identity: str
    declined: str = ""
    apart: str = ""
    """Requests share blocks in vLLM's own prefix cache only with those that have the same here."""


NO_ADAPTER = Adapter("")


class Adapters:
    """The adapters of one engine."""

    def __init__(self) -> None:
        self._loaded: dict[int, str] = {}
        """By id: fingerprint of the files when it was first seen, or last loaded in place."""
        self._first: dict[tuple[str, str], str] = {}
        """By name and path: fingerprint of the files when these were first seen."""
        self._secret = secrets.token_hex(16)
        self._read: dict[Path, tuple[Files, str]] = {}
        """By folder: its files when they were last read, and their fingerprint."""

    def of(self, lora: LoRARequest | None) -> Adapter:
        """The adapter of a request. Reads its files only if they have changed."""
        if lora is None:
            return NO_ADAPTER
        label = f"{lora.lora_name}@{lora.lora_path}"
        try:
            contents = self._contents(lora.lora_path)
        except OSError:
            contents = ""
        if not contents:
            return Adapter(label, "adapter_unknown")
        identity = f"{label}#{contents}"
        if lora.load_inplace:
            self._loaded[lora.lora_int_id] = contents
        first = self._first.setdefault((lora.lora_name, lora.lora_path), contents)
        if self._loaded.setdefault(lora.lora_int_id, contents) != contents:
            return Adapter(identity, "adapter_changed", f"{contents} or others")
        return Adapter(identity, apart="" if contents == first else contents)

    def keep_apart(self, request: Request, adapter: Adapter) -> None:
        """Give the request's blocks hashes of their own in vLLM's prefix cache, if need be.

        vLLM makes hashes of the salt, too. The tenant must have been read from it before.
        """
        if adapter.apart:
            # a secret, so that no client can send the same salt
            request.cache_salt = f"{request.cache_salt or ''}#{self._secret}#{adapter.apart}"
            request.block_hashes.clear()
            request.update_block_hashes()

    def _contents(self, path: str) -> str:
        """Fingerprint of the adapter's files; empty if there are none."""
        folder = local_folder(os.path.expanduser(path)) or snapshot_of(path)
        if folder is None or not (files := _files(folder)):
            return ""
        known, contents = self._read.get(folder, ([], ""))
        if known != files:
            contents = fingerprint(folder, _CONFIGURATION)
            self._read[folder] = (files, contents)
        return contents


def _files(folder: Path) -> Files:
    """The files of an adapter; empty if none of them holds weights."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if entry.name.endswith((*WEIGHTS, _CONFIGURATION))]
        stats = [(entry.name, entry.stat()) for entry in kept]
    if not any(name.endswith(WEIGHTS) for name, _ in stats):
        return []
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
