"""The release that runs."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """As pip knows it; `unknown` where the sources run without being installed."""
    try:
        return metadata.version("kvshare-store")
    except metadata.PackageNotFoundError:
        return "unknown"
