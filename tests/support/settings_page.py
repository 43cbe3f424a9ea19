"""The tables of the page on settings, made by `python -m tests.support.settings_page`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from kvshare_store.config import PER_ENGINE, StoreConfig, load_config, load_settings
from kvshare_store.config.settings import SIZES
from kvshare_store.daemon.reloading import LIVE, files_of
from kvshare_store.errors import ConfigError
from tests.support.documents import DOCS
from tests.support.made_parts import Parts, code, listed, remake, table
from tests.support.source_fields import Field, fields_of

PAGE = DOCS / "configuration.md"
_BEGINNINGS = {
    "serving": "home",
    "second looks and quality": "second_look",
    "the daemon": "start_daemon",
    "tiers": "device_bytes",
    "between machines": "listen",
    "what is kept": "max_nodes",
}
"""The tables, each with its first setting."""
_UNITS = {"Tokens": "tokens", "Seconds": "seconds", "Milliseconds": "milliseconds"}
_TRIED = {int: (-1, 0, 1, 2**20), float: (-1, 0, 0.25, 0.5, 0.75, 1, 2**20)}
"""Numbers that tell the bounds of a setting apart."""


def parts() -> Parts:
    """A table for each group of settings, and the ways to give one."""
    fields = fields_of(StoreConfig)
    names = [field.name for field in fields]
    cuts = [*(names.index(first) for first in _BEGINNINGS.values()), len(names)]
    assert cuts == sorted(cuts), "the tables stand in the order of the settings"
    tables = {
        name: _table(fields[begin:end])
        for name, (begin, end) in zip(_BEGINNINGS, pairwise(cuts), strict=True)
    }
    return {"ways": _ways("policy", "faithful"), **tables}


def _ways(name: str, value: str) -> str:
    """One setting in each of the ways to give it, the strongest first; they are tried."""
    assert load_settings({name: value}, environ={}).given() == {name: value}
    assert load_settings(environ={_variable(name): value}).given() == {name: value}
    rows = (
        ("vLLM's `kv_connector_extra_config`", f'"kvshare.{name}": "{value}"'),
        ("`kvshare vllm serve`", f"--kvshare.{name} {value}"),
        ("other commands", f"--set {name}={value}"),
        ("environment", f"{_variable(name)}={value}"),
        ("settings file (YAML)", f"{name}: {value}"),
    )
    return table(("where", "how"), ((where, code(how)) for where, how in rows))


def _table(fields: list[Field]) -> str:
    rows = (
        (
            listed((code(field.name), code(_variable(field.name)))),
            _default(field.name),
            ", ".join(_values(field)),
            _changed(field.name),
            _linked(field.about),
        )
        for field in fields
    )
    return table(("setting, variable", "default", "values", "changed by", "meaning"), rows)


def _variable(name: str) -> str:
    return f"KVSHARE_{name.upper()}"


def _default(name: str) -> str:
    """A default as people write it."""
    value = getattr(load_config(environ={}), name)
    if value is None:
        return "the policy's"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return code(value.replace(str(Path.home()), "~")) if value else "none"
    if isinstance(value, int):
        gib = value / 2**30
        return f"{gib:g} GiB" if gib >= 1 else str(value)
    return f"{value:g}"


def _values(field: Field) -> Iterator[str]:
    """What a setting may be."""
    hint = get_type_hints(StoreConfig)[field.name]
    several = isinstance(hint, UnionType) or get_origin(hint) is Union
    for kind in get_args(hint) if several else (hint,):
        if get_origin(kind) is Literal:
            yield from map(code, get_args(kind))
        elif kind in _TRIED:
            yield _numbers(field, kind)
        elif kind is not NoneType:
            yield {bool: "on, off", str: "text"}[kind]


def _numbers(field: Field, kind: type) -> str:
    """Which numbers a setting takes, and of what."""
    found = [value for value in _TRIED[kind] if _taken(field.name, value)]
    if field.name in SIZES:
        return "bytes: 0, or from 1 MiB" if 0 in found else "bytes: from 1 MiB"
    what = _UNITS.get(field.kind.partition(" ")[0], "whole number" if kind is int else "number")
    if found[0] < 0:
        return f"{what}, also below 0"
    least = "above 0" if found[0] == 0.25 else f"from {found[0]:g}"
    most = {2**20: "", 0.75: " to below 1"}.get(found[-1], f" to {found[-1]:g}")
    return f"{what} {least}{most}"


def _taken(name: str, value: float) -> bool:
    """Whether a settings file may say so."""
    try:
        load_config({name: str(value)}, environ={})
    except ConfigError:
        return False
    return True


def _changed(name: str) -> str:
    """What it takes until another value counts."""
    if name in PER_ENGINE:
        return "engine, reload" if name in LIVE else "engine"
    if name in LIVE:
        return "reload"
    is_text = getattr(StoreConfig(), name) == ""
    names_file = is_text and files_of(load_config({name: "file:PATH"}, environ={}), "")
    return "restart; its file: reload" if names_file else "restart"


def _linked(text: str) -> str:
    """Names of pages become links to them."""
    return re.sub(r"docs/([\w/]+\.md)(#[\w-]+)?", r"[\1](\1\2)", text)


if __name__ == "__main__":
    remake(PAGE, parts())
