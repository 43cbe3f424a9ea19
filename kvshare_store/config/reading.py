"""Where settings come from.

Precedence, strongest first: explicit values (`kvshare.<field>` in the engine's connector config,
command-line options), environment `KVSHARE_<FIELD>`, the YAML file, the defaults of `StoreConfig`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from kvshare_store.config.files import read_yaml
from kvshare_store.config.settings import FIELDS, LARGEST, SIZES, StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import either, nearest, unknown

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)
_LEAST_BYTES = 2**20
"""A smaller budget would not hold a single block of the smallest models."""
_ENVIRONMENT = "KVSHARE_"


def parse_size(value: object, name: str = "size") -> int:
    """Bytes of `value`: an int, or text such as `512MiB`, `4GB`, `1.5g`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{name}: {value!r} is not a size; write bytes or e.g. '4GiB'")
    unit = (match[2] or "").lower()
    nbytes = float(match[1]) * (_BINARY.get(unit) or _UNITS[unit])
    if nbytes >= LARGEST:
        raise ConfigError(f"{name}: {value!r} is too large")
    return int(nbytes)


class Settings(NamedTuple):
    """A configuration, and where each value came from."""

    config: StoreConfig
    sources: dict[str, str]
    """`default`, `environment`, `config file PATH` or `given` for every field."""

    def given(self) -> dict[str, Any]:
        """The values that were set, by field."""
        return {
            name: getattr(self.config, name)
            for name, source in self.sources.items()
            if source != "default"
        }


def load_config(
    explicit: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> StoreConfig:
    """Merge file, environment and explicit values into one `StoreConfig`.

    `explicit` may hold `config` (a YAML path) beside the fields; `defaults` stand in for the
    fields' own. Raises `ConfigError` naming the source, the setting and the value when one is
    unknown, of the wrong type or out of range.
    """
    return load_settings(explicit, file=file, environ=environ, defaults=defaults).config


def named_file(file: str | os.PathLike[str] | None = None) -> str:
    """The settings file that is named, by an option (`file`) or by the environment; empty if none
    is."""
    return os.fspath(file or os.environ.get(f"{_ENVIRONMENT}CONFIG", ""))


def load_settings(
    explicit: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """As `load_config`, with the source of each value."""
    environ = os.environ if environ is None else environ
    explicit = dict(explicit or {})
    named = explicit.pop("config", None)
    file = file or named or environ.get(f"{_ENVIRONMENT}CONFIG")
    if not isinstance(file, str | os.PathLike | None):
        raise ConfigError(f"kvshare settings: config must be the path of a file, got {file!r}")
    values: dict[str, Any] = dict(defaults or {})
    sources = dict.fromkeys(FIELDS, "default")
    for source, layer in _layers(explicit, file, environ):
        values |= layer
        sources |= dict.fromkeys(layer, source)
    try:
        return Settings(msgspec.convert(values, StoreConfig, strict=False), sources)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {_refusal(error) or error}") from error


def _layers(
    explicit: Mapping[str, Any], file: str | os.PathLike[str] | None, environ: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sources, weakest first, with their values."""
    if file is not None:
        source = f"config file {file}"
        yield source, _checked(_read_settings(Path(file)), f"{source}: ")
    variable = f"environment variable {_ENVIRONMENT}"
    yield "environment", _checked(_from_environment(environ), variable, in_capitals=True)
    yield "given", _checked(explicit, "kvshare settings: ")


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings in the environment. `ConfigError` for a name that is almost one of them."""
    for name in unknown_variables(environ):
        meant = nearest(name.removeprefix(_ENVIRONMENT).lower(), (*FIELDS, "config"))
        if meant is not None:
            variable = f"{_ENVIRONMENT}{meant.upper()}"
            raise ConfigError(f"environment variable {name}: did you mean {variable}?")
    return {
        name: environ[f"{_ENVIRONMENT}{name.upper()}"]
        for name in FIELDS
        if f"{_ENVIRONMENT}{name.upper()}" in environ
    }


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Environment variables with the prefix of the settings that are none. Others may have set
    them: Kubernetes does, for a service named `kvshare`."""
    known = {f"{_ENVIRONMENT}{name.upper()}" for name in (*FIELDS, "config")}
    return sorted(name for name in environ if name.startswith(_ENVIRONMENT) and name not in known)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_settings(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "config file", "is not YAML", told=_one_line)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold 'field: value' lines")
    return data


def _checked(
    values: Mapping[str, Any], source: str, *, in_capitals: bool = False
) -> dict[str, Any]:
    """Parse sizes, refuse unknown names, and check the type of every value on its own."""
    checked = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise ConfigError(f"{source}{unknown('setting', name, FIELDS)}")
        label = source + (name.upper() if in_capitals else name)
        checked[name] = _size(value, label) if name in SIZES else value
        _check(name, checked[name], label)
    return checked


def _size(value: object, label: str) -> int:
    nbytes = parse_size(value, label)
    if 0 < nbytes < _LEAST_BYTES:
        raise ConfigError(
            f"{label}: {value!r} has no room for one block; the least that makes sense is 1MiB"
        )
    return nbytes


def _check(name: str, value: object, label: str) -> None:
    try:
        msgspec.convert({name: value}, StoreConfig, strict=False)
    except msgspec.ValidationError as error:
        refusal = _refusal(error)
        if refusal is None:
            refusal = f"{name} must be {_kind(name)}, got {value!r}"
        raise ConfigError(f"{label} {refusal.removeprefix(name).lstrip()}") from error


def _refusal(error: msgspec.ValidationError) -> str | None:
    """The message of `__post_init__`; None if msgspec itself refused a type."""
    return str(error.__cause__) if isinstance(error.__cause__, ConfigError) else None


def _kind(name: str) -> str:
    """Text that says which values a field may hold."""
    hint = get_type_hints(StoreConfig)[name]
    if get_args(hint) and isinstance(get_args(hint)[0], str):
        return f"one of {', '.join(get_args(hint))}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    parts = get_args(hint) or (hint,)
    names = (name for part in parts for name in get_args(part))
    return either((*names, *(words[part] for part in parts if part in words)))
