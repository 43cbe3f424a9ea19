"""Pages with forms. What removes, pins or unpins something shows first what that is, and asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import parse_qsl, unquote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import ValidationError

from kvshare_store.config import policy_names
from kvshare_store.daemon import protocol
from kvshare_store.errors import KVShareError, PlanError
from kvshare_store.http.api import Ask, ExplainBody, NodeId
from kvshare_store.http.asking import CHORE_S, Asking, status_of
from kvshare_store.http.guard import Forms
from kvshare_store.http.pages import LINKED, Full, clipped
from kvshare_store.http.rendering import rendered

_FIELDS = 16
_PATIENCE_S = 30.0
_EMPTY = {"text": "", "tokens": "", "namespace": "", "policy": ""}

router = APIRouter(include_in_schema=False)


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form of ours; `RefusedError` for one that is somebody else's."""
    body = (await request.body()).decode()
    try:
        found = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=_FIELDS))
    except ValueError as error:
        raise PlanError("this is no form of the page") from error
    forms: Forms = request.app.state.forms
    forms.check(request.scope, found.pop("csrf", ""))
    return found


Form = Annotated[dict[str, str], Depends(form_of)]


# --- explain --------------------------------------------------------------------------------------


@router.get("/explain")
async def explain(
    ask: Ask,
    request: Request,
    asked: Annotated[str, Query(alias="request", max_length=256)] = "",
    full: Full = False,
) -> Response:
    """The form, or why a logged request was served as it was."""
    found, trouble = await _explained(ask, protocol.Explain(request=asked) if asked else None)
    return await _explain_page(ask, request, _EMPTY, found, trouble, full=full)


@router.post("/explain")
async def explain_prompt(ask: Ask, request: Request, form: Form) -> Response:
    """Why a pasted prompt would be served as it would be."""
    fields = _EMPTY | {name: form[name] for name in _EMPTY if name in form}
    try:
        message = _message(fields)
    except PlanError as error:
        return await _explain_page(ask, request, fields, None, error, full=False)
    found, trouble = await _explained(ask, message)
    return await _explain_page(ask, request, fields, found, trouble, full="full" in form)


def _message(fields: Mapping[str, str]) -> protocol.Explain:
    """`PlanError` says what is wrong with the form."""
    text = fields["text"].replace("\r\n", "\n")  # what browsers make of every line end
    try:
        tokens = json.loads(fields["tokens"] or "[]")
        return ExplainBody(
            text=text,
            tokens=tokens,
            namespace=fields["namespace"],
            policy=fields["policy"] or None,  # type: ignore[arg-type]
        ).message()
    except ValidationError as error:
        raise PlanError(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, KVShareError):
            raise
        raise PlanError("the token ids are no JSON list, such as [1, 2, 3]") from error


async def _explained(
    ask: Asking, message: protocol.Explain | None
) -> tuple[Any, KVShareError | None]:
    if message is None:
        return None, None
    try:
        return await ask(message), None
    except KVShareError as error:
        return None, error


async def _explain_page(
    ask: Asking,
    request: Request,
    fields: Mapping[str, str],
    found: Any,
    trouble: KVShareError | None,
    *,
    full: bool,
) -> Response:
    explained = found and found["explanation"]
    return rendered(
        request,
        "explain.html",
        200 if trouble is None else status_of(trouble),
        fields=fields,
        spaces=await ask(protocol.Held("")),
        policies=policy_names(),
        logged=found and found["request"],
        differs=found and found["differs"],
        explained=explained and clipped(explained, full=full),
        trouble=trouble,
        full=full,
    )


# --- pins -----------------------------------------------------------------------------------------


@router.get("/nodes/{node}/pin")
async def ask_pin(ask: Ask, request: Request, node: NodeId) -> Response:
    """What would be kept."""
    found = await ask(protocol.ShowNode(node))
    return rendered(request, "pin.html", node=found, pins=True)


@router.get("/nodes/{node}/unpin")
async def ask_unpin(ask: Ask, request: Request, node: NodeId) -> Response:
    """What would be kept no longer than others."""
    found = await ask(protocol.ShowNode(node))
    return rendered(request, "pin.html", node=found, pins=False)


@router.post("/nodes/{node}/pin")
async def pin(ask: Ask, node: NodeId, form: Form) -> Response:
    """Keep it, and show it again."""
    return RedirectResponse(f"/nodes/{await ask(protocol.Pin(node, True), CHORE_S)}", 303)


@router.post("/nodes/{node}/unpin")
async def unpin(ask: Ask, node: NodeId, form: Form) -> Response:
    """Keep it no longer than others."""
    return RedirectResponse(f"/nodes/{await ask(protocol.Pin(node, False), CHORE_S)}", 303)


# --- what removes ---------------------------------------------------------------------------------


@router.get("/nodes/{node}/evict")
async def ask_evict(ask: Ask, request: Request, node: NodeId) -> Response:
    """What would be forgotten."""
    found = await ask(protocol.ShowNode(node))
    return rendered(request, "evict.html", node=found, done=None)


@router.post("/nodes/{node}/evict")
async def evict(ask: Ask, request: Request, node: NodeId, form: Form) -> Response:
    """Forget one prompt."""
    done = await ask(protocol.Evict((node,)), CHORE_S)
    return rendered(request, "evict.html", node=None, done=done)


@router.get("/purge")
async def ask_purge(
    ask: Ask,
    request: Request,
    tenant: Annotated[str | None, Query(max_length=LINKED)] = None,
    namespace: Annotated[str, Query(pattern=r"^[0-9a-f]{0,64}$")] = "",
) -> Response:
    """What would be removed."""
    _name_one(tenant, namespace)
    would = await ask(protocol.Purge(namespace, tenant, dry_run=True), CHORE_S)
    return _purge_page(request, tenant, namespace, would=would)


@router.post("/purge")
async def purge(ask: Ask, request: Request, form: Form) -> Response:
    """Remove every byte of it."""
    namespace = form.get("namespace", "")
    # encoded once more: browsers change the line ends of a field
    tenant = None if namespace or "tenant" not in form else unquote(form["tenant"], errors="strict")
    _name_one(tenant, namespace)
    done = await ask(protocol.Purge(namespace, tenant, _PATIENCE_S), CHORE_S)
    return _purge_page(request, tenant, namespace, done=done)


def _name_one(tenant: str | None, namespace: str) -> None:
    if bool(namespace) == (tenant is not None):
        raise PlanError("name what to purge: a tenant or a namespace")


def _purge_page(
    request: Request, tenant: str | None, namespace: str, would: Any = None, done: Any = None
) -> Response:
    return rendered(
        request, "purge.html", tenant=tenant, namespace=namespace, would=would, done=done
    )
