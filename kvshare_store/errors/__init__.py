"""Every error KVShare raises, in one tree grouped by what a handler does with it.

`kind` is stable and append-only: the same string is the wire code, the metric label and the log
key. At the edge to the engine a handler catches `KVShareError` and answers with a miss.
`wording` has what messages are made of.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class ErrorKind(StrEnum):
    """Stable codes of `KVShareError`s. Never rename one; append."""

    CONFIG = "config"
    HOME = "home"
    BUSY = "busy"
    NAMESPACE = "namespace"
    PLAN = "plan"
    CORRUPT = "corrupt"
    MISSING = "missing"
    NO_SPACE = "no_space"
    STORAGE = "storage"
    LEASE = "lease"
    PROTOCOL = "protocol"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    INTERNAL = "internal"
    SHORT = "short"
    NODE = "node"
    OVERLOAD = "overload"
    ROW = "row"
    NEWER = "newer"
    TORN = "torn"
    FOREIGN = "foreign"
    LIMIT = "limit"
    DENIED = "denied"


class KVShareError(Exception):
    """Base class. The message says what happened and what to do about it.

    `retryable`: the same call may succeed later without anyone changing anything.
    `exit_code`: what the command line exits with.
    """

    kind: ClassVar[ErrorKind]
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


# --- the caller must change something -------------------------------------------------------


class ConfigError(KVShareError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""

    kind = ErrorKind.CONFIG
    exit_code = 2


class HomeError(KVShareError, OSError):
    """The home cannot be used: not readable, not ours, of another format."""

    kind = ErrorKind.HOME
    exit_code = 3


class BusyError(KVShareError):
    """Another process owns the home or the socket."""

    kind = ErrorKind.BUSY
    exit_code = 4


class ForeignError(KVShareError):
    """The remote's prefix belongs to another store."""

    kind = ErrorKind.FOREIGN
    exit_code = 9


class NamespaceError(KVShareError, ValueError):
    """Rows or tokens do not fit the namespace they are said to belong to."""

    kind = ErrorKind.NAMESPACE
    exit_code = 5


class PlanError(KVShareError, ValueError):
    """A plan or a save request contradicts itself or the rows it comes with."""

    kind = ErrorKind.PLAN


class NodeError(KVShareError, LookupError):
    """No node has this id any more, or several ids begin like it."""

    kind = ErrorKind.NODE


class DeniedError(KVShareError):
    """This client may not ask for that: its role or its certificate does not allow it."""

    kind = ErrorKind.DENIED
    exit_code = 10


class UnsupportedError(KVShareError):
    """The model, layout or engine setting is one KVShare declines to serve."""

    kind = ErrorKind.UNSUPPORTED
    exit_code = 6


# --- the answer is a miss; nothing is wrong with the caller ---------------------------------


class MissError(KVShareError):
    """Base of what a reader turns into a miss."""

    kind = ErrorKind.MISSING


class MissingBlockError(MissError, KeyError):
    """A block is not in any tier."""

    kind = ErrorKind.MISSING

    def __str__(self) -> str:
        return Exception.__str__(self)


class CorruptBlockError(MissError):
    """Bytes do not match the name of the block, or are no frame at all."""

    kind = ErrorKind.CORRUPT


class ShortBlockError(CorruptBlockError):
    """A block ends before its header says it does: a torn write, or a read that was cut off."""

    kind = ErrorKind.SHORT


class CorruptRowError(MissError):
    """A row of the catalogue is not what was written, or contradicts itself."""

    kind = ErrorKind.ROW


class NewerRowError(MissError):
    """A row of the catalogue says more than this release knows: a newer release serves it."""

    kind = ErrorKind.NEWER


class TornTableError(MissError):
    """A file of the catalogue cannot be read: what only it held is gone."""

    kind = ErrorKind.TORN


class LeaseError(MissError):
    """The lease is unknown or has ended, so its rows may be gone."""

    kind = ErrorKind.LEASE


# --- the storage or the daemon did not do it; later it may ----------------------------------


class NoSpaceError(KVShareError):
    """A budget is full of rows that are in use."""

    kind = ErrorKind.NO_SPACE
    retryable = True


class FullDiskError(NoSpaceError):
    """The disk of this machine has no room: its file system, or the budget of the disk tier."""


class StorageError(KVShareError, OSError):
    """A tier's read or write failed."""

    kind = ErrorKind.STORAGE
    retryable = True


class ClaimedBlockError(StorageError):
    """Another machine is removing a block from the shared remote; the prompt can be saved again."""


class OverloadError(KVShareError):
    """The daemon has as much to do as it takes, for this client or for all; ask again later."""

    kind = ErrorKind.OVERLOAD
    retryable = True


class LimitError(KVShareError):
    """A namespace saves more prompts than `saves_per_second` lets it; ask again later."""

    kind = ErrorKind.LIMIT
    retryable = True


class ProtocolError(KVShareError):
    """The other side of the socket speaks another version, or sent something malformed."""

    kind = ErrorKind.PROTOCOL


class UnavailableError(KVShareError, ConnectionError):
    """No daemon answers."""

    kind = ErrorKind.UNAVAILABLE
    retryable = True
    exit_code = 7


class DeadlineError(KVShareError, TimeoutError):
    """The answer did not come in time."""

    kind = ErrorKind.TIMEOUT
    retryable = True
    exit_code = 8


class InternalError(KVShareError):
    """A bug in the daemon; its log has the traceback."""

    kind = ErrorKind.INTERNAL


def _leaves(cls: type[KVShareError]) -> list[type[KVShareError]]:
    found = [cls] if "kind" in vars(cls) and cls is not MissError else []
    for child in cls.__subclasses__():
        found += _leaves(child)
    return found


def error_for(kind: str, message: str) -> KVShareError:
    """Rebuild an error from its wire form; an unknown kind becomes a `ProtocolError`."""
    for cls in _leaves(KVShareError):
        if cls.kind == kind:
            return cls(message)
    return ProtocolError(f"unknown error kind {kind!r}: {message}")
