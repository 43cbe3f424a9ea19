"""How a daemon is reached: a socket in its home, found through the opened folder.

The address of a socket is limited to 107 bytes, the path of a home is not. So the address names the
folder by its descriptor (`/proc/self/fd/N/kvshare.sock`). Any home works, and no socket lies in a
folder that other users can write to.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kvshare_store.daemon import wire
from kvshare_store.errors import BusyError, HomeError, OverloadError, UnavailableError

log = logging.getLogger("kvshare")

SOCKET = "kvshare.sock"
_BACKLOG = 4096


def socket_path(home: Path) -> Path:
    """The path of the daemon's socket, for display."""
    return home / SOCKET


def connect(home: Path) -> socket.socket:
    """A non-blocking connection to the daemon of a home, which must run as this user.

    `UnavailableError` if there is none, `OverloadError` if it accepts no more now, `HomeError` if
    the socket cannot be used.
    """
    try:
        with _folder(home) as folder:
            return _checked(_connected(f"/proc/self/fd/{folder}/{SOCKET}"), home)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
        raise UnavailableError(f"no daemon serves {home}") from error
    except BlockingIOError as error:
        raise OverloadError(
            f"the daemon of {home} accepts no connections: it hangs, or too many come at once; "
            "try again, or restart it"
        ) from error
    except OSError as error:
        if isinstance(error, HomeError):
            raise
        raise HomeError(
            f"socket {socket_path(home)} cannot be reached: {error.strerror}; run as the user who "
            "started the daemon, or choose another home with --home or KVSHARE_HOME"
        ) from error


@contextlib.contextmanager
def _folder(home: Path) -> Iterator[int]:
    descriptor = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _connected(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _checked(connection: socket.socket, home: Path) -> socket.socket:
    _, uid = wire.peer(connection)
    if uid == os.getuid():
        return connection
    connection.close()
    raise HomeError(
        f"the process behind {socket_path(home)} belongs to user {uid}, not to {os.getuid()}: "
        "nothing is sent to it; choose another home"
    )


def answers(home: Path) -> bool:
    """Whether a daemon accepts connections for a home."""
    try:
        connect(home).close()
    except (UnavailableError, OverloadError, HomeError):
        return False
    return True


def home_taken(home: Path) -> bool:
    """Whether a process holds the home's lock: it serves the home, or is starting or ending
    there."""
    try:
        lock = os.open(home / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class Listener:
    """A daemon's listening socket. It removes only the file that it made."""

    def __init__(self, home: Path) -> None:
        """`BusyError` if another process listens there, `HomeError` if no socket can be made."""
        if answers(home):
            raise BusyError(f"socket {socket_path(home)} is in use by another process")
        self._home = home
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        try:
            self._folder = os.open(home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._bind()
            except OSError:
                os.close(self._folder)
                raise
        except OSError as error:
            self.socket.close()
            raise HomeError(
                f"socket {socket_path(home)} cannot be made: {error.strerror}"
            ) from error

    def _bind(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # left by a killed daemon: the lock is ours
            os.unlink(SOCKET, dir_fd=self._folder)
        before = os.umask(0o177)
        try:
            self.socket.bind(f"/proc/self/fd/{self._folder}/{SOCKET}")
        finally:
            os.umask(before)
        self._made = _identity(os.stat(SOCKET, dir_fd=self._folder))
        self.socket.listen(_BACKLOG)

    def accept(self) -> socket.socket | None:
        """The next connection, or None if it was another user's. `BlockingIOError` if nobody is
        there."""
        stream, _ = self.socket.accept()
        _, uid = wire.peer(stream)
        if uid == os.getuid():
            stream.setblocking(False)
            return stream
        log.warning("kvshare: user %d was refused", uid)
        stream.close()
        return None

    @property
    def in_place(self) -> bool:
        """Whether the home's path still leads to this socket: a home can be removed or replaced."""
        try:
            return _identity(os.stat(self._home / SOCKET)) == self._made
        except OSError:
            return False

    def close(self) -> None:
        """Stop listening; remove the socket from the folder it was made in, if it is still ours."""
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            if _identity(os.stat(SOCKET, dir_fd=self._folder)) == self._made:
                os.unlink(SOCKET, dir_fd=self._folder)
        os.close(self._folder)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
