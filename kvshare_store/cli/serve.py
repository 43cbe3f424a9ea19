"""`kvshare serve`: run the daemon of a home in the foreground."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, SetOption, configured
from kvshare_store.cli.libraries import load_lancedb
from kvshare_store.config import StoreConfig, named_file
from kvshare_store.errors import UnsupportedError
from kvshare_store.observability.logs import log_process_as
from kvshare_store.readable import size

if TYPE_CHECKING:
    from kvshare_store.daemon.server import Server
    from kvshare_store.http.address import Entrance

log = logging.getLogger("kvshare")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


ListenOption = Annotated[
    str | None,
    typer.Option(
        "--listen", metavar="tcp://HOST:PORT", help="Serve other machines there; needs the keys."
    ),
]
CertOption = Annotated[
    str | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate of the daemon.")
]
KeyOption = Annotated[
    str | None, typer.Option("--tls-key", metavar="FILE", help="Private key of that certificate.")
]
ClientsOption = Annotated[
    str | None,
    typer.Option("--tls-clients", metavar="FILE", help="Certificates that vouch for clients."),
]
HTTP_LIBRARIES = ("fastapi", "jinja2", "prometheus_client", "uvicorn")
"""Of the extra `http`."""

HttpOption = Annotated[
    str | None,
    typer.Option(
        "--http", metavar="HOST:PORT", help="Serve the page, JSON and metrics there as well."
    ),
]


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    http: HttpOption = None,
    listen: ListenOption = None,
    tls_cert: CertOption = None,
    tls_key: KeyOption = None,
    tls_clients: ClientsOption = None,
) -> None:
    """Run the daemon of a home until it is stopped.

    Engines start one by themselves; run it by hand to choose its budgets or to watch it.
    """
    network = {
        "http": http, "listen": listen, "tls_cert": tls_cert, "tls_key": tls_key,
        "tls_clients": tls_clients,
    }  # fmt: skip
    given = [f"{name}={value}" for name, value in network.items() if value is not None]
    run(partial(configured, home, config, [*(set_ or ()), *given]), file=named_file(config))


def run(read: Callable[[], StoreConfig], *, file: str = "") -> None:
    """Serve in this process, by the settings that `read` returns; log to standard error. `file`:
    where these come from and can be read again, if a file was named."""
    config = read()
    entrance = page_entrance(config)
    os.umask(0o077)  # also for what LanceDB writes
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # clients and files take descriptors
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # the cores belong to the engine: what the daemon computes, it computes on one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # until there is somebody to tell, in this thread and in those that libraries start: a signal
    # that one of them does not block would end the process at once
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        load_lancedb()
        from kvshare_store.daemon import address, network, server  # noqa: PLC0415 - seconds, not for --help

        log_process_as(config.log_format)
        log.setLevel(logging.INFO)
        daemon = server.Server(config, reread=read if file else None, file=file)
        for number, act in zip(_SIGNALS, (daemon.drain, daemon.stop, daemon.reload), strict=True):
            signal.signal(number, act)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    socket = address.socket_path(config.home_path)
    log.info("kvshare: %s", start_line(config, str(socket)))
    if config.listen:
        bound = network.Address.parse(config.listen, "listen")._replace(port=daemon.port)
        log.info("kvshare: it listens on %s, with keys", bound)
    if entrance is not None:
        serve_page(daemon, entrance)
    gc.freeze()  # libraries are never garbage, and looking at all of them would take 80 ms
    daemon.serve()
    logging.shutdown()
    os._exit(0)  # the store is closed: a thread that still waits for a medium is not waited for


def page_entrance(config: StoreConfig) -> Entrance | None:
    """Where the page will be, if one is asked for. Whoever asks for one that cannot be had, or that
    would be open to everybody, is told before the store is opened."""
    if not config.http:
        return None
    missing = [name for name in HTTP_LIBRARIES if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the page needs {', '.join(missing)}: pip install 'kvshare-store[http]'"
        )
    from kvshare_store.http import address  # noqa: PLC0415 - not for --help

    return address.entrance(config)


def serve_page(daemon: Server, entrance: Entrance) -> None:
    """Serve the page until the daemon ends."""
    from kvshare_store.http.serving import HttpServer  # noqa: PLC0415 - an extra

    daemon.attach(HttpServer(daemon, daemon.store.metrics.health, entrance))
    log.info("kvshare: the page is on %s", entrance.address.url)


def start_line(config: StoreConfig, socket: str) -> str:
    """What a daemon says about itself once it serves."""
    disk = size(config.disk_bytes) if config.disk else "off"
    return (
        f"serving {config.home_path} on {socket}, host {size(config.host_bytes)}, disk {disk}, "
        f"policy {config.policy}"
    )
