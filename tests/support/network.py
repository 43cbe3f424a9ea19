"""Several hosts on one machine: network namespaces, joined by a bridge that can be cut.

    with Network() as network:
        host = network.host("a")
        subprocess.Popen([*host.prefix, "ping", network.hub.address])
        host.cut()

Needs root and `ip` (Debian: iproute2). All hosts share files and Unix sockets, which are not part
of a network namespace.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import NamedTuple, Self, TypeVar

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_NET = "10.231.17"
"""Addresses that exist inside the namespaces only."""
_NUMBERS = range(2, 250)


class Host(NamedTuple):
    """One host. Put `prefix` before a command to run it there."""

    namespace: str
    address: str
    link: str
    """The hub's end of its cable."""
    hub: str

    @property
    def prefix(self) -> list[str]:
        """What runs a command on this host."""
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Unplug the cable: what is sent is lost without an error."""
        _ip("-n", self.hub, "link", "set", self.link, "down")

    def join(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self.hub, "link", "set", self.link, "up")

    def here(self, function: Callable[[], T]) -> T:
        """Call a function on this host, in a thread that moves there and ends afterwards."""
        result: list[T] = []

        def call() -> None:
            enter(self.namespace)
            result.append(function())

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return result[0]


class Network:
    """A hub with a bridge, and hosts around it. Everything is removed when its context ends."""

    def __init__(self) -> None:
        self._name = f"kvs{os.getpid() % 1_000_000}"
        self._hosts: list[Host] = []
        self.hub = Host(f"{self._name}-hub", f"{_NET}.1", "br0", f"{self._name}-hub")
        """The host on which the servers run."""

    @staticmethod
    def possible() -> bool:
        """Whether this process may make network namespaces."""
        if shutil.which("ip") is None or os.geteuid() != 0:
            return False
        probe = f"kvs{os.getpid()}-probe"
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
        if made.returncode:
            return False
        _ip("netns", "del", probe)
        return True

    def __enter__(self) -> Self:
        hub = self.hub.namespace
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{self.hub.address}/24", "dev", "br0")
        _ip("-n", hub, "link", "set", "br0", "up")
        return self

    def host(self, name: str) -> Host:
        """Another host, plugged in."""
        number = _NUMBERS[len(self._hosts)]
        hub, namespace, link = self.hub.namespace, f"{self._name}-{name}", f"to-{number}"
        _ip("netns", "add", namespace)
        host = Host(namespace, f"{_NET}.{number}", link, hub)
        self._hosts.append(host)
        _ip("link", "add", link, "netns", hub, "type", "veth",
            "peer", "name", "eth0", "netns", namespace)  # fmt: skip
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", hub, "link", "set", link, "master", "br0", "up")
        return host

    def __exit__(self, *_: object) -> None:
        for host in (*self._hosts, self.hub):
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def enter(namespace: str) -> None:
    """From now on this thread, and those that it begins, are on that host."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(descriptor)
