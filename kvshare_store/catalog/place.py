"""Where a catalogue lies: a folder of this machine, or storage that several machines share."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import lancedb

from kvshare_store.blocks.remotes.urls import missing_extra, parse_url
from kvshare_store.blocks.tiers.disk import files
from kvshare_store.errors import HomeError

_CACHE_BYTES = 32 << 20
"""Bytes of each of LanceDB's two caches."""


class Place:
    """`conditional`: the storage supports writes that fail if the object exists. Then, of two
    commits at the same time, one is told to try again instead of overwriting the other."""

    def __init__(self, place: Path | str) -> None:
        self.shared = isinstance(place, str)
        self.conditional = True
        self.folder: Path | None = None
        """Where its files are; None: in object storage."""
        self._options: dict[str, str] = {}
        if isinstance(place, str) and "://" in place:
            self._url, self._options = _s3(place)
            self.conditional = _writes_conditionally(self._url, self._options)
        else:
            self.folder = Path(place).expanduser()
            self._url = str(self.folder)

    def __str__(self) -> str:
        return self._url

    def connect(self) -> Any:
        """LanceDB there; `OSError`, `ValueError` or `RuntimeError` from LanceDB when it cannot."""
        if self.folder is not None:
            files.make_durable_folder(str(self.folder))
        # LanceDB's own limit is gigabytes, and every commit adds 0.1 MB that nobody reads again
        session = lancedb.Session(
            index_cache_size_bytes=_CACHE_BYTES, metadata_cache_size_bytes=_CACHE_BYTES
        )
        options = self._options or None
        return lancedb.connect(self._url, storage_options=options, session=session)


def _s3(place: str) -> tuple[str, dict[str, str]]:
    """The address and LanceDB's options for it; credentials come from the environment."""
    url = parse_url(place)
    if url.scheme != "s3" or not url.host:
        raise HomeError(f"catalog: {url.scheme}:// is not supported; name a folder or s3://bucket")
    url.refuse_credentials()
    url.check_options("endpoint", "region", "allow_http")
    options = {f"aws_{name}": url.options[name] for name in ("endpoint", "region")
               if name in url.options}  # fmt: skip
    if url.flag("allow_http"):
        options["allow_http"] = "true"
    return f"s3://{url.host}/{url.path.strip('/')}", options


def _writes_conditionally(url: str, options: dict[str, str]) -> bool:
    """Try it out: of two writes that may only create an object the second must be refused."""
    try:
        import obstore  # noqa: PLC0415 - an extra
        from obstore.exceptions import AlreadyExistsError, BaseError  # noqa: PLC0415 - an extra
        from obstore.store import S3Store  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise missing_extra("s3") from error
    settings: dict[str, Any] = {name.removeprefix("aws_"): text for name, text in options.items()
                                if name != "allow_http"}  # fmt: skip
    if "allow_http" in options:
        settings["client_options"] = {"allow_http": True}
    store: Any = S3Store.from_url(url, **settings)
    probe = f".probe-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        obstore.put(store, probe, b"1", mode="create")
        try:
            obstore.put(store, probe, b"2", mode="create")
            return False
        except AlreadyExistsError:
            return True
        finally:
            obstore.delete(store, probe)
    except BaseError as error:
        reason = str(error).partition("\n")[0]
        raise HomeError(f"catalog {url} cannot be used: {reason}") from error
