"""What every request must pass before anything else sees it, and what every answer carries.

Whoever is let in may read stored prompts and remove them, as with the command line. So without a
token only processes of the daemon's own user, and of root, are answered. Their browsers open other
people's pages, too: those must not reach the daemon by a name of their own (Host), nor make a
browser send what changes something (`Forms`). docs/design/security.md
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from typing import NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvshare_store.http.peers import user_of

BODY_BYTES = 8 << 20
"""Of a request: a prompt as text, or as a list of token ids."""
OPEN = ("/healthz", "/readyz")
"""Anybody who reaches the port may ask whether the daemon lives: the answer says nothing else."""
_SECURE = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{0,5})?")
"""A name or an address, and perhaps a port. An address of IPv6 stands in brackets."""
_FORM_S = 12 * 3600.0
_DRAIN_S = 2.0
"""How long the rest of a body that is refused is read."""
_BODY_S = 20.0
"""How long a whole body may take."""


class RefusedError(Exception):
    """A request that gets no answer but this."""

    def __init__(self, status: int, why: str, **headers: str) -> None:
        super().__init__(why)
        self.status, self.headers = status, headers
        self.body = {"error": "refused", "message": why}


class Guard:
    """The ASGI application around all others."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token
        self._names = {"localhost", socket.gethostname().lower()}
        self._users = {os.geteuid(), 0}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        secured = _secured(scope, send)
        try:
            self._check(scope)
            if not _fits(scope):
                await _too_long(receive)
            await self._app(scope, _limited(receive), secured)
        except RefusedError as refused:
            await _refuse(refused, secured)

    def _check(self, scope: Scope) -> None:
        headers = headers_of(scope)
        bearer = self._bears(headers)
        if not bearer and not self._known(headers.get("host", "")):
            raise RefusedError(421, "this name is not the daemon's: open it by its IP address")
        if scope["path"] in OPEN:
            return
        if self._token and not bearer and not self._basic(headers):
            why = "the token of http_token is needed: as a bearer token, or as a password"
            asked = 'Basic realm="kvshare", charset="UTF-8"'
            raise RefusedError(401, why, **{"www-authenticate": asked})
        if not self._token and user_of(scope["client"], scope["server"]) not in self._users:
            raise RefusedError(
                403,
                "only the user that runs the daemon is answered; others need a token: "
                "set http_token",
            )
        scope["kvshare.bearer"] = bearer

    def _bears(self, headers: Mapping[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return bool(self._token) and kind.lower() == "bearer" and _same(given, self._token)

    def _basic(self, headers: Mapping[str, str]) -> bool:
        """A browser asks for the token as a password, whatever the name, and keeps it for this
        address and port alone; a cookie would go to every port of the machine."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            pair = base64.b64decode(given, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return False
        return _same(pair.partition(":")[2], self._token)

    def _known(self, host: str) -> bool:
        """Whether this is no name that somebody else could have made point here."""
        parts = _HOST.fullmatch(host)
        if parts is None:
            return False
        try:
            if parts["six"]:
                ipaddress.IPv6Address(parts["six"])
            elif parts["name"].lower() not in self._names:
                ipaddress.IPv4Address(parts["name"])
        except ValueError:
            return False
        return True


def headers_of(scope: Scope) -> dict[str, str]:
    """Of a request; of two with one name the last counts."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _limited(receive: Receive) -> Receive:
    """No more of a body than a request may have, whatever it said before, and in time."""
    taken, whole = 0, False
    deadline = asyncio.get_running_loop().time() + _BODY_S

    async def limited() -> Message:
        nonlocal taken, whole
        try:
            async with asyncio.timeout_at(None if whole else deadline):
                message = await receive()
        except TimeoutError as error:
            raise RefusedError(408, "the rest of the request did not come") from error
        whole = not message.get("more_body", False)
        taken += len(message.get("body", b""))
        if taken > BODY_BYTES:
            await _too_long(receive)
        return message

    return limited


def _fits(scope: Scope) -> bool:
    length = headers_of(scope).get("content-length", "0")
    return bool(re.fullmatch(r"[0-9]{1,9}", length)) and int(length) <= BODY_BYTES


async def _too_long(receive: Receive) -> NoReturn:
    """Refuse it, once some more of it was read: who still sends would not see the answer."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while taken < 4 * BODY_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    raise RefusedError(413, f"a request may have {BODY_BYTES >> 20} MiB")


def _secured(scope: Scope, send: Send) -> Send:
    cached = scope["path"].startswith("/static/")
    extra = {**_SECURE, "cache-control": "max-age=3600" if cached else "no-store"}
    headers = [(name.encode(), value.encode()) for name, value in extra.items()]

    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return secured


async def _refuse(refused: RefusedError, send: Send) -> None:
    body = json.dumps(refused.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **refused.headers,
    }
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Forms:
    """Tokens that only a page of this daemon has: each for one action, and for half a day."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def token(self, action: str) -> str:
        """What a form, or a script of the page, sends along with this action (a path)."""
        until = f"{time.time() + _FORM_S:.0f}"
        return f"{until}.{self._mac(until, action)}"

    def check(self, scope: Scope, given: str) -> None:
        """`RefusedError` unless the request is one of a page of ours, or bears the token."""
        if scope.get("kvshare.bearer"):
            return
        headers = headers_of(scope)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise RefusedError(403, "another site's page sent this")
        until, _, mac = given.partition(".")
        fresh = re.fullmatch(r"[0-9]{1,12}", until) and int(until) > time.time()
        if not fresh or not _same(mac, self._mac(until, scope["path"])):
            raise RefusedError(
                403,
                "send this from the daemon's page, which has a fresh form for it, or with the "
                "bearer token of http_token",
            )

    def _mac(self, until: str, action: str) -> str:
        return hmac.digest(self._key, f"{until} {action}".encode(), "sha256").hex()
