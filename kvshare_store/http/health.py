"""For probes and for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from kvshare_store.daemon import protocol
from kvshare_store.errors import KVShareError
from kvshare_store.http import models
from kvshare_store.http.api import Ask
from kvshare_store.observability.exposition import CONTENT_TYPE, exposition

READY_S = 2.0
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}

router = APIRouter()


@router.get("/healthz", response_model=str)
async def healthz() -> str:
    """Whether the HTTP server answers."""
    return "ok"


@router.get("/readyz", response_model=models.Ready, responses={503: {"model": models.Ready}})
async def readyz(ask: Ask, response: Response) -> Any:
    """Whether the daemon answers, and `ok` or `degraded`; 503 if it does not answer, or is ending
    (`draining`)."""
    try:
        said = await ask(protocol.Ready(), READY_S)
    except KVShareError:
        response.status_code = 503
        return models.Ready(ready=False, state="silent")
    if said["draining"]:
        response.status_code = 503
        return models.Ready(ready=False, state="draining")
    return models.Ready(ready=True, state=said["state"])


@router.get("/metrics", response_class=Response, responses=_TEXT)
async def metrics(ask: Ask) -> Response:
    """The daemon's counters, in the text format of Prometheus."""
    return Response(exposition(await ask(protocol.Stats())), media_type=CONTENT_TYPE)
