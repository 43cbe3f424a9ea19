"""The JSON API: the same questions and chores that the command line has."""

from __future__ import annotations

from array import array
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from kvshare_store.config import PolicyName
from kvshare_store.daemon import protocol
from kvshare_store.errors import PlanError
from kvshare_store.errors.wording import short
from kvshare_store.http import models
from kvshare_store.http.asking import CHORE_S, Asking
from kvshare_store.http.guard import Forms
from kvshare_store.plan import LABEL_CHARS, LONGEST_PATIENCE_S, LONGEST_S

_NAME = 256

_HEX = r"^[0-9a-f]{1,64}$"
_START = r"^[0-9a-f]{0,64}$"
_DRY = "Only say what would be done."
_POSITIVE = Annotated[int, Field(ge=0, le=2**31 - 1)]


async def asking(request: Request) -> Asking:
    """Who answers."""
    found: Asking = request.app.state.asking
    return found


async def own_form(
    request: Request,
    x_csrf_token: Annotated[str, Header(max_length=200, description="Of a page's form.")] = "",
) -> None:
    """Refuse what neither bears the token nor comes from a page of ours."""
    forms: Forms = request.app.state.forms
    forms.check(request.scope, x_csrf_token)


Ask = Annotated[Asking, Depends(asking)]
NodeId = Annotated[str, Path(pattern=_HEX, description="Id of a node, or a unique beginning.")]
Digest = Annotated[str, Path(pattern=_HEX, description="Digest, or a unique beginning of it.")]
After = Annotated[str, Query(max_length=120, description="`next` of the answer before.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many, at most.")]

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": models.Error, "description": "The request cannot be answered as it is."},
    "5XX": {"model": models.Error, "description": "The daemon cannot answer now."},
}
router = APIRouter(prefix="/api", responses=_ERRORS)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExplainBody(_Body):
    """The prompt: exactly one of `text`, `tokens`, `node` and `request`."""

    text: str = Field(default="", description="With all markers of its chat template.")
    tokens: list[_POSITIVE] = Field(
        default=[], max_length=protocol.EXPLAINED_TOKENS, description="Token ids."
    )
    node: str = Field(default="", pattern=_START, description="A stored prompt.")
    request: str = Field(default="", max_length=_NAME, description="A request of the log.")
    only: str = Field(default="", pattern=_START, description="The one candidate.")
    namespace: str = Field(default="", pattern=_START, description="Where it is looked for.")
    policy: PolicyName | None = Field(default=None, description="Plan under this policy.")

    def message(self) -> protocol.Explain:
        """As the daemon is asked; `PlanError` unless it names one prompt."""
        if sum(map(bool, (self.text, self.tokens, self.node, self.request))) != 1:
            raise PlanError("name one prompt: text, tokens, node or request")
        packed = array("i", self.tokens).tobytes()
        return protocol.Explain(
            packed, self.text, self.node, self.request, self.only, self.namespace, self.policy
        )


class PurgeBody(_Body):
    """What to purge: a namespace, all of a tenant, or a node with what was computed behind it."""

    namespace: str = Field(default="", pattern=_START, description="All of a namespace.")
    tenant: str | None = Field(default=None, description="All of a tenant.")
    lineage: str = Field(default="", pattern=_START, description="A node with its lineage.")
    patience: float = Field(
        default=30.0, ge=0, le=LONGEST_PATIENCE_S, description="Seconds to wait for leases."
    )
    dry_run: bool = Field(default=False, description=_DRY)


class EvictBody(_Body):
    """What to forget: the nodes for which all of it holds. Pinned ones stay."""

    nodes: list[Annotated[str, Field(pattern=_HEX)]] = Field(
        default=[], max_length=1000, description="Only these."
    )
    tenant: str | None = Field(default=None, description="Only those of this tenant.")
    older_than: float | None = Field(
        default=None,
        ge=0,
        le=LONGEST_S,
        description="Only those stored more than so many seconds ago.",
    )
    policy: PolicyName | None = Field(
        default=None, description="Only those of which rows were reused under this policy."
    )
    dry_run: bool = Field(default=False, description=_DRY)


# --- questions ------------------------------------------------------------------------------------


@router.get("/stats", response_model=models.Stats)
async def stats(ask: Ask) -> Any:
    """Counters since the daemon started, tiers, times and health, as `kvshare stats --json`."""
    return await ask(protocol.Stats())


@router.get("/tenants", response_model=list[models.Tenant])
async def tenants(ask: Ask) -> Any:
    """Tenants with their namespaces, prompts, bytes and limits; that with the most bytes first."""
    return await tenants_of(ask)


async def tenants_of(ask: Asking) -> list[dict[str, Any]]:
    """Tenants and pools, the one with the most bytes first."""
    held = await ask(protocol.Held(""))
    spaces = [
        {
            "digest": one["digest"],
            **{field: one["namespace"][field] for field in ("model", "tenant", "lora")},
            "pool": one["namespace"].get("pool", ""),
            "nodes": one["nodes"],
            "bytes": one["nbytes"],
            "quota": one["most_bytes"],
            "nodes_quota": one["most_nodes"],
            "plans_per_second": one["plans_per_second"],
            "saves_per_second": one["saves_per_second"],
        }
        for one in held
    ]
    spaces.sort(key=lambda space: (space["tenant"], space["pool"], -space["bytes"]))
    found = [
        {
            "tenant": tenant,
            "pool": pool,
            "nodes": sum(space["nodes"] for space in mine),
            "bytes": sum(space["bytes"] for space in mine),
            "namespaces": mine,
        }
        for (tenant, pool), group in groupby(spaces, key=itemgetter("tenant", "pool"))
        for mine in [list(group)]
    ]
    return sorted(found, key=lambda one: -one["bytes"])


@router.get("/namespaces/{digest}/nodes", response_model=models.Nodes)
async def nodes(
    ask: Ask,
    digest: Digest,
    whole: Annotated[bool, Query(description="Every node, not only where trees begin.")] = False,
    after: After = "",
    limit: Limit = 50,
) -> Any:
    """Stored prompts of a namespace where trees begin, the last stored first."""
    return await ask(protocol.Branch(namespace=digest, whole=whole, after=after, limit=limit))


@router.get("/nodes/{node}", response_model=models.Node)
async def node(ask: Ask, node: NodeId) -> Any:
    """One stored prompt: text, parent and path, edits against the parent, children, blocks, and
    what a second look has said of its answer."""
    return await ask(protocol.ShowNode(node))


@router.get("/nodes/{node}/children", response_model=models.Nodes)
async def children(
    ask: Ask,
    node: NodeId,
    after: After = "",
    limit: Limit = 50,
) -> Any:
    """The prompts that are edits of this one."""
    return await ask(protocol.Branch(node=node, after=after, limit=limit))


@router.get(
    "/nodes/{node}/spans", response_model=models.Explanation, response_model_exclude_unset=True
)
async def spans(
    ask: Ask,
    node: NodeId,
    donor: Annotated[
        str | None, Query(pattern=_HEX, description="Another node than the parent.")
    ] = None,
    policy: Annotated[PolicyName | None, Query(description="Plan under this policy.")] = None,
) -> Any:
    """One stored prompt beside its parent: which tokens it can take from there, as which kind."""
    return await beside(ask, node, donor, policy)


async def beside(ask: Asking, node: str, donor: str | None, policy: str | None) -> Any:
    """As `spans`; `PlanError` for a prompt without a parent that is here."""
    if donor is None:
        found = await ask(protocol.ShowNode(node))
        if found["parent"] not in found["path"]:
            raise PlanError(f"node {short(found['id'])} has no parent here; name a donor")
        donor = found["parent"]
    return await ask(protocol.Explain(node=node, only=donor, policy=policy))


@router.get("/requests", response_model=models.Requests)
async def requests(
    ask: Ask,
    declined: Annotated[bool, Query(description="Only those without reuse.")] = False,
    slow: Annotated[bool, Query(description="The slowest first.")] = False,
    limit: Limit = 50,
) -> Any:
    """The last requests: outcome, reason, tokens by kind, seconds."""
    return await ask(protocol.ListRequests(limit, declined, slow))


@router.get("/quality", response_model=models.Quality)
async def quality(
    ask: Ask,
    namespace: Annotated[
        str, Query(pattern=_START, description="Digest, or a unique beginning of it.")
    ] = "",
    traffic: Annotated[str, Query(max_length=LABEL_CHARS, description="Only this class.")] = "",
    trends: Annotated[bool, Query(description="With what was known in the last day.")] = False,
    start: Annotated[
        int, Query(ge=0, le=2**31 - 1, description="Without so many of the first.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=200, description="How many, at most.")] = 50,
) -> Any:
    """What scored answers say of each class of traffic, floors, and the worst answers. Rates and
    regrets are lists: mean, lower and upper limit. `computed` and `distance` have the parts of a
    policy, from `start` to below `stop`."""
    return await ask(protocol.Quality(namespace, traffic, trends, start, limit))


@router.post(
    "/explain",
    response_model=models.Explanation,
    response_model_exclude_unset=True,  # without a bound or a cap nothing is said of them
    dependencies=[Depends(own_form)],
)
async def explain(ask: Ask, body: ExplainBody) -> Any:
    """Why a prompt is served as it is: one of `text`, `tokens`, `node` and `request`. Nothing is
    served or counted. Of a request `differs` says what makes it another plan than what was served:
    `policy`, `donors`, `plan` or `outcome`."""
    return await ask(body.message())


# --- what changes something -----------------------------------------------------------------------


@router.post("/nodes/{node}/pin", response_model=str, dependencies=[Depends(own_form)])
async def pin(ask: Ask, node: NodeId) -> Any:
    """Keep a prompt until it is purged. The answer is its id."""
    return await ask(protocol.Pin(node, True), CHORE_S)


@router.post("/nodes/{node}/unpin", response_model=str, dependencies=[Depends(own_form)])
async def unpin(ask: Ask, node: NodeId) -> Any:
    """Keep a prompt no longer than others. The answer is its id."""
    return await ask(protocol.Pin(node, False), CHORE_S)


@router.post("/evict", response_model=models.Evicted, dependencies=[Depends(own_form)])
async def evict(ask: Ask, body: EvictBody) -> Any:
    """Forget the stored prompts for which all that is named holds; pinned ones stay."""
    chosen = protocol.Evict(
        tuple(body.nodes), body.tenant, body.older_than, body.policy or "", body.dry_run
    )
    return await ask(chosen, CHORE_S)


@router.post("/purge", response_model=models.Purges, dependencies=[Depends(own_form)])
async def purge(ask: Ask, body: PurgeBody) -> Any:
    """Remove every byte of a namespace, of a tenant, or of a node with its lineage; `remaining`
    says what could not be removed."""
    if bool(body.namespace) + (body.tenant is not None) + bool(body.lineage) != 1:
        raise PlanError("name what to purge: namespace, tenant or lineage")
    chosen = protocol.Purge(body.namespace, body.tenant, body.patience, body.dry_run, body.lineage)
    return await ask(chosen, CHORE_S)
