"""What the JSON API answers, as types: they check each answer, and OpenAPI is made of them.

What the store has as a struct becomes a model here; nothing is written down twice.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_args, get_origin

import msgspec
from pydantic import BaseModel, ConfigDict, Field, create_model

from kvshare_store.daemon.evicting import Evicted as EvictedStruct
from kvshare_store.daemon.planned_again import Differs
from kvshare_store.daemon.scored import QualityReport
from kvshare_store.lookup import explanation, request_log, steering
from kvshare_store.maintenance import purge
from kvshare_store.save import verdicts


@cache
def model_of(struct: type[msgspec.Struct], *without: str) -> type[BaseModel]:
    """A model with the fields of a struct, and of those within it."""
    fields: dict[str, Any] = {}
    hints = {field.name: field for field in msgspec.structs.fields(struct)}
    for name, field in hints.items():
        if name not in without:
            default = ... if field.required else field.default
            fields[name] = (_converted(field.type), default)
    doc = (struct.__doc__ or "").strip()
    return create_model(struct.__name__, __doc__=doc, **fields)


def _converted(kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return model_of(kind)
    arguments = get_args(kind)
    if not arguments or get_origin(kind) is Annotated:
        return kind
    converted = tuple(_converted(one) for one in arguments)
    if converted == arguments:
        return kind
    if get_origin(kind) is tuple:
        return tuple.__class_getitem__(converted)
    found = converted[0]
    for one in converted[1:]:
        found = found | one
    return found


Verdict = model_of(verdicts.Verdict)
Purged = model_of(purge.Purged)
Evicted = model_of(EvictedStruct)
Candidate = model_of(explanation.Candidate)
Steering = model_of(steering.Steering)
Expected = model_of(explanation.Expected)
Quality = model_of(QualityReport)
Purges: Any = list[Purged]  # type: ignore[valid-type]


class Logged(model_of(request_log.Logged, "prompt", "source")):  # type: ignore[misc]
    """One request that has ended, and what a second look has said of its answer."""

    verdict: Verdict | None = None  # type: ignore[valid-type]


Requests: Any = list[Logged]


class Error(BaseModel):
    """Why there is no answer. `error` is a stable code."""

    error: str
    message: str


class Ready(BaseModel):
    """Whether the daemon answers, and whether any part of it is in trouble."""

    ready: bool
    state: str


class _Open(BaseModel):
    """May say more than is listed."""

    model_config = ConfigDict(extra="allow")


class Tier(_Open):
    """Bytes that a tier holds, and may hold."""

    bytes: int
    budget: int
    blocks: int
    kept_free: int = 0


class Times(_Open):
    """Seconds."""

    p50: float
    p99: float


class Health(_Open):
    """`ok` or `degraded`, and why."""

    state: str
    reasons: dict[str, str]
    failures: dict[str, int]


class Move(BaseModel):
    """Blocks and bytes that were copied from one tier to another."""

    source: str
    target: str
    blocks: int
    bytes: int


class Stats(_Open):
    """Counters since the daemon started."""

    version: str
    policy: str
    pid: int
    since: float
    lookups: int
    hits_exact: int
    hits_continued: int
    hits_edited: int
    misses: int
    tokens_requested: int
    tokens_reused_exact: int
    tokens_reused_continued: int
    tokens_reused_edited: int
    tokens_recomputed: int
    tokens_engine_cached: int
    bytes_loaded: int
    bytes_stored: int
    nodes: int
    blocks: int
    leases: int
    declined: dict[str, int]
    errors: dict[str, int]
    tiers: dict[str, Tier]
    moved: list[Move]
    evicted: dict[str, int]
    health: Health
    seconds: dict[str, Times]


class Space(BaseModel):
    """What is stored of one namespace, bytes of rows before any codec."""

    digest: str
    model: str
    tenant: str
    pool: str
    lora: str
    nodes: int
    bytes: int
    quota: int = Field(description="Bytes that it may have; 0: no limit.")
    nodes_quota: int = Field(description="Prompts that it may have; 0: no limit.")
    plans_per_second: float = Field(description="Plans that it may ask for; 0: no limit.")
    saves_per_second: float = Field(description="Prompts that it may save; 0: no limit.")


class Tenant(BaseModel):
    """All namespaces of one tenant or pool; the empty name is that of requests without a salt."""

    tenant: str
    pool: str
    nodes: int
    bytes: int
    namespaces: list[Space]


class NodeSummary(BaseModel):
    """A stored prompt. Lengths in tokens."""

    id: str
    namespace: str
    model: str
    tenant: str
    pool: str
    tokens: int
    answer_tokens: int = 0
    """So many of them, at the end, are its answer."""
    exact_rows: int
    generation: int
    policy: str
    parent: str | None
    created: float
    pinned: bool
    merged: bool
    sources: int = 0
    preview: str


class Listed(NodeSummary):
    """A node of a list: what its edit added and removed, and the rows that it stores itself."""

    children: int
    added: int
    removed: int
    own_rows: int
    own_blocks: int


class Nodes(BaseModel):
    """Some nodes; `next`, if it is not empty, is `after` of the next question."""

    nodes: list[Listed]
    total: int
    next: str


class Edit(BaseModel):
    """One operation on `start … stop-1` of the parent."""

    kind: str
    start: int
    stop: int
    removed: str
    added: str


class Block(BaseModel):
    """Where rows of a node lie."""

    name: str
    tier: str
    rows: int
    users: int


class Node(NodeSummary):
    """A stored prompt in full."""

    path: list[str]
    children: list[str]
    edits: list[Edit]
    text: str
    verdict: Verdict | None = None  # type: ignore[valid-type]
    blocks: list[Block]


class Run(BaseModel):
    """Tokens `start … stop-1`, all of one kind."""

    start: int
    stop: int
    kind: str
    text: str


class Part(Run):
    """Tokens of one fate: who they are taken from, or which rule recomputes them."""

    reason: str
    donor: str
    source: int
    tokens: list[int]


class Divergence(BaseModel):
    """Where the prompt leaves the stored one with which it begins longest."""

    node: str
    position: int
    request: list[int]
    donor: list[int]
    request_text: str
    donor_text: str


class Explained(BaseModel):
    """One plan, and why."""

    namespace: str
    model: str
    tenant: str
    policy: str
    tokens: int
    answer_tokens: int = 0
    """Of a stored prompt: so many of them, at the end, are its answer."""
    declined: str
    generation: int
    by_kind: dict[str, int]
    by_reason: dict[str, int]
    expected: Expected | None  # type: ignore[valid-type]
    steering: Steering | None = None  # type: ignore[valid-type]
    divergence: Divergence | None
    candidates: list[Candidate]  # type: ignore[valid-type]
    parts: list[Part]
    donor_parts: list[Run]


class Explanation(BaseModel):
    """`request`: the logged one that was asked for, if any."""

    request: Logged | None
    explanation: Explained | None
    differs: Differs = Field(
        default="", description="What makes this plan another one than what the request was served."
    )
