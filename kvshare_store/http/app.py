"""The application: routes, their errors, and the guard around all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kvshare_store.errors import InternalError, KVShareError
from kvshare_store.http import actions, api, health, pages
from kvshare_store.http.asking import Asking, status_of
from kvshare_store.http.guard import Forms, Guard, RefusedError
from kvshare_store.http.rendering import rendered
from kvshare_store.observability.version import version


def application(asking: Asking, token: str) -> ASGIApp:
    """What answers HTTP requests. `token`: what whoever asks must have; empty: nothing."""
    return Guard(routes(asking), token)


def routes(asking: Asking) -> FastAPI:
    """Every page and question, without the guard."""
    app = FastAPI(
        title="KVShare",
        version=version(),
        description="The store of one home: what it holds, what it did, and why.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # its scripts would come from elsewhere
        redoc_url=None,
    )
    app.state.asking, app.state.forms = asking, Forms()
    app.include_router(health.router)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.include_router(actions.router)
    static = Path(__file__).parent / "static"
    app.mount("/static", StaticFiles(directory=static), name="static")
    app.add_exception_handler(KVShareError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _elsewhere)
    app.add_exception_handler(UnicodeDecodeError, _invalid)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(Exception, _unforeseen)
    return app


def failure(request: Request, status: int, kind: str, message: str) -> Response:
    """An error, as a page for those who asked for a page."""
    for_people = "text/html" in request.headers.get("accept", "")
    if for_people and not request.url.path.startswith("/api/"):
        return rendered(request, "error.html", status, kind=kind, message=message)
    retry = {"retry-after": "1"} if status == 503 else None
    return JSONResponse({"error": kind, "message": message}, status, headers=retry)


async def _known(request: Request, error: Any) -> Response:
    return failure(request, status_of(error), str(error.kind), str(error))


async def _invalid(request: Request, error: Any) -> Response:
    """Says where and why, and never repeats what was sent."""
    if isinstance(error, RequestValidationError):
        said = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()[:5]]
        message = "; ".join(f"{where}: {why}" for where, why in said)
    else:
        message = "the request is not UTF-8"
    return failure(request, 422, "request", message)


async def _refused(request: Request, error: Any) -> Response:
    return failure(request, error.status, error.body["error"], error.body["message"])


async def _unforeseen(request: Request, error: Any) -> Response:
    """The traceback goes to the log."""
    return failure(
        request, 500, str(InternalError.kind), "the page failed; the daemon's log says why"
    )


async def _elsewhere(request: Request, error: Any) -> Response:
    return failure(request, error.status_code, "request", str(error.detail))
