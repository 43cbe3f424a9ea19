"""Loads the library that takes most of a command's start without what no command uses."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec

_CLIENT = "lance_namespace_urllib3_client"
"""A client of catalogues behind REST that LanceDB brings. Whoever imports one of its modules
imports its hundred calls, and pydantic builds checks of their arguments."""


def load_lancedb() -> None:
    """Import LanceDB in little more than half the time.

    Nothing in a process of ours makes a call of `_CLIENT`. So there this package is put in place as
    an empty one, in which LanceDB finds the modules that it asks for, and no other. In a process of
    others nothing is left out.
    """
    if "lancedb" in sys.modules:
        return
    spec = None if _CLIENT in sys.modules else find_spec(_CLIENT)
    if spec is not None:
        sys.modules[_CLIENT] = module_from_spec(spec)
    import_module("lancedb")
