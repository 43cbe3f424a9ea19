"""The version of the running release."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The version as pip knows it; `unknown` if the sources run without being installed."""
    try:
        return metadata.version("kvshare-store")
    except metadata.PackageNotFoundError:
        return "unknown"
