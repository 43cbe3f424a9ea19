"""Who may ask for what. A role includes those before it.

`reader` looks and loads: plans, rows, status. `engine` also stores and reports. `admin` also
removes, keeps, moves and stops what belongs to others.
"""

from __future__ import annotations

from typing import get_args

from kvshare_store.daemon import protocol
from kvshare_store.daemon.protocol import Role
from kvshare_store.errors import DeniedError
from kvshare_store.namespace import Namespace

ROLES: tuple[Role, ...] = get_args(Role)
"""From the least to the most."""

_STORING = (
    protocol.Stage, protocol.WriteRows, protocol.Commit, protocol.Abandon, protocol.Forget,
    protocol.Flush, protocol.NextLook, protocol.Looked,
)  # fmt: skip
_REPORTING = (
    protocol.Observe, protocol.Decline, protocol.EngineCached, protocol.Prefilled,
    protocol.Working, protocol.Failed,
)  # fmt: skip
"""What it says of speed and of counts changes plans and numbers of others."""
_RULING = (
    protocol.Clear, protocol.Pin, protocol.Evict, protocol.Export, protocol.Import,
    protocol.Collect, protocol.Purge, protocol.CheckTree, protocol.CheckBlocks, protocol.Stop,
)  # fmt: skip
NEEDED: dict[type, Role] = {
    **dict.fromkeys(get_args(protocol.Request), "reader"),
    **dict.fromkeys((*_STORING, *_REPORTING), "engine"),
    **dict.fromkeys(_RULING, "admin"),
}
"""The least role for each message."""


def lesser(one: Role, other: Role) -> Role:
    """The one of two roles that may do less."""
    return min(one, other, key=ROLES.index)


def allows(kind: type, role: Role) -> bool:
    """Whether a client of this role may send a message of this kind."""
    return ROLES.index(role) >= ROLES.index(NEEDED[kind])


def check(kind: type, role: Role) -> None:
    """`DeniedError` unless a client of this role may send a message of this kind."""
    needed = NEEDED[kind]
    if not allows(kind, role):
        what = protocol.tag_of(kind)
        raise DeniedError(
            f"{what!r} needs the role {needed}, this connection has {role}: "
            "use a certificate with that role, or run it on the daemon's machine as its owner"
        )


def check_writer(namespace: Namespace, role: Role) -> None:
    """`DeniedError` unless a client of this role may store prompts there: into pools only `admin`
    may, which no connection of an engine is that serves requests."""
    if namespace.pool and role != "admin":
        raise DeniedError(
            f"storing into a pool needs the role admin, this connection has {role}: "
            "`kvshare publish` does it"
        )
