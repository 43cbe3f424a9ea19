"""Pages that only show something."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from kvshare_store.config import PolicyName, policy_names
from kvshare_store.daemon import protocol
from kvshare_store.errors import KVShareError, NodeError
from kvshare_store.http.api import Ask, Digest, NodeId, beside, tenants_of
from kvshare_store.http.asking import Asking
from kvshare_store.http.chart import chart
from kvshare_store.http.classes import lines, summed
from kvshare_store.http.history import COUNTERS
from kvshare_store.http.rendering import rendered, words
from kvshare_store.plan import LABEL_CHARS

_TENANTS = 200
_REQUESTS = 100
_PAGE = 50
_CLASSES = 25
LINKED = 1024
"""Characters of a tenant's name that fit into a link: as UTF-8 they may take 12 KiB there."""

Full = Annotated[bool, Query(description="Shorten no text.")]
After = Annotated[str, Query(max_length=120)]

router = APIRouter(include_in_schema=False)


@router.get("/")
async def overview(ask: Ask, request: Request) -> Response:
    """What the store does: never looks at its nodes one by one."""
    stats = await ask(protocol.Stats())
    kinds = {kind: stats[name] for kind, name in COUNTERS.items()}
    return rendered(
        request,
        "overview.html",
        home=str(ask.config.home_path),
        stats=stats,
        kinds=kinds,
        chart=chart(ask.history.steps()),
        steps=ask.history.steps(12),
        moved=ask.history.moved(),
    )


@router.get("/tenants")
async def tenants(ask: Ask, request: Request) -> Response:
    """Who has how much."""
    found = await tenants_of(ask)
    return rendered(
        request, "tenants.html", tenants=found[:_TENANTS], count=len(found), linked=LINKED
    )


@router.get("/namespaces/{digest}")
async def namespace(
    ask: Ask, request: Request, digest: Digest, whole: bool = False, after: After = ""
) -> Response:
    """Where the trees of a namespace begin, or all of its prompts."""
    listed = await ask(protocol.Branch(namespace=digest, whole=whole, after=after, limit=_PAGE))
    held = await ask(protocol.Held(""))
    (space,) = [one for one in held if one["digest"].startswith(digest)] or [None]
    return rendered(
        request, "namespace.html", space=space, digest=digest, listed=listed, whole=whole,
        after=after,
    )  # fmt: skip


@router.get("/nodes/{node}")
async def node(
    ask: Ask,
    request: Request,
    node: NodeId,
    policy: Annotated[PolicyName | Literal[""] | None, Query()] = None,
    full: Full = False,
    after: After = "",
) -> Response:
    """One prompt: beside its parent, above its children. `policy`: empty for what a request would
    get now; without it the one that the prompt was served under."""
    found = await ask(protocol.ShowNode(node))
    chosen = found["policy"] if policy is None else policy
    children = await ask(protocol.Branch(node=found["id"], after=after, limit=_PAGE))
    return rendered(
        request,
        "node.html",
        node=found,
        text=words(found["text"], full=full),
        beside=await _beside(ask, found, chosen or None, full=full),
        chosen=chosen,
        children=children,
        after=after,
        full=full,
        policies=policy_names(),
    )


async def _beside(
    ask: Asking, node: dict[str, Any], policy: str | None, *, full: bool
) -> dict[str, Any]:
    """The prompt and its parent in parts; `trouble` says why there are none."""
    if node["parent"] not in node["path"]:
        gone = "Its parent is no longer stored." if node["parent"] else "It has no parent."
        return {"explained": None, "trouble": gone}
    try:
        found = (await beside(ask, node["id"], node["parent"], policy))["explanation"]
    except KVShareError as error:
        return {"explained": None, "trouble": str(error)}
    return {"explained": clipped(found, full=full), "trouble": ""}


def clipped(explained: dict[str, Any], *, full: bool) -> dict[str, Any]:
    """An explanation whose texts are as long as a page shows them."""
    return explained | {
        name: [part | {"text": words(part["text"], full=full)} for part in explained[name]]
        for name in ("parts", "donor_parts")
    }


@router.get("/quality")
async def quality(
    ask: Ask,
    request: Request,
    namespace: Annotated[str, Query(pattern=r"^[0-9a-f]{0,64}$")] = "",
    start: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """What is known of the quality of each class of traffic."""
    found = await ask(protocol.Quality(namespace, "", True, start, _CLASSES))
    scores = (await ask(protocol.Stats()))["scores"]
    now = time.time()
    return rendered(
        request,
        "quality.html",
        found=found,
        listed=[(one, lines(one, found, now, small=True)) for one in found["classes"]],
        scores=summed(scores),
        namespace=namespace,
        start=start,
        shown=_CLASSES,
    )


@router.get("/quality/class")
async def one_class(
    ask: Ask,
    request: Request,
    namespace: Annotated[str, Query(pattern=r"^[0-9a-f]{1,64}$")],
    traffic: Annotated[str, Query(min_length=1, max_length=LABEL_CHARS)],
) -> Response:
    """All that is known of one class."""
    found = await ask(protocol.Quality(namespace, traffic, True))
    if not found["classes"]:
        raise NodeError("no answer of such a class was scored, or it was forgotten since")
    one = found["classes"][0]
    return rendered(
        request,
        "class.html",
        found=found,
        one=one,
        lines=lines(one, found, time.time(), small=False),
    )


@router.get("/requests")
async def requests(
    ask: Ask, request: Request, declined: bool = False, slow: bool = False
) -> Response:
    """The last requests: all, those without reuse, or the slowest."""
    found = await ask(protocol.ListRequests(_REQUESTS, declined, slow))
    return rendered(request, "requests.html", requests=found, declined=declined, slow=slow)
