"""Loads the library that takes most of a command's start without what no command uses."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def load_lancedb() -> None:
    """Import LanceDB in two thirds of the time.

    It brings a client of catalogues behind REST, and pydantic builds checks of the arguments of its
    hundred calls while it is imported. Nothing in a process of ours makes such a call, so there
    they are left out; in a process of others nothing is.
    """
    if "lancedb" in sys.modules:
        return
    pydantic: Any = import_module("pydantic")
    checked, pydantic.validate_call = pydantic.validate_call, _as_it_is
    try:
        import_module("lancedb")
    finally:
        pydantic.validate_call = checked


def _as_it_is(call: Any = None, **_: Any) -> Any:
    return _as_it_is if call is None else call
