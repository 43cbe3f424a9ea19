"""A daemon that a benchmark looks into: its program is the benchmark's own, which patches something
and then serves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvshare_store.cli.main import main
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.spawn import daemon_environment, open_log

_START_S, _POLL_S = 120.0, 0.01


@contextmanager
def serving(config: StoreConfig, module: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process that runs `module` with the home and `more` as arguments, once it answers."""
    home = config.home_path
    log = open_log(home)
    try:
        command = [sys.executable, "-m", module, str(home), *more]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=daemon_environment(config))
    finally:
        os.close(log)
    try:
        deadline = time.monotonic() + _START_S
        while not answers(home):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((home / "daemon.log").read_text()[-2000:])
            time.sleep(_POLL_S)
        yield process
    finally:
        process.terminate()
        process.wait(_START_S)


def serve(home: str) -> None:
    """The rest of such a program: `kvshare serve`, with settings from the environment."""
    main(["serve", "--home", home])
