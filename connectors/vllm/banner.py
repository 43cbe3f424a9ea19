"""What an engine says at its start: that KVShare is active, under which settings, and which of the
settings that it was given do not count because its daemon was started with others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from kvshare_connectors.vllm.requests import granted
from vllm.logger import init_logger

from kvshare_store.config import Settings, unknown_variables
from kvshare_store.daemon import protocol
from kvshare_store.daemon.link import Link
from kvshare_store.errors import KVShareError

# vLLM shows information of its own loggers only
_banner = init_logger("vllm.kvshare")
log = logging.getLogger("kvshare")

_ANSWER_S = 5.0
_OWN = ("home", "device_bytes", "plan_deadline_ms", "tenant_key")
"""Settings that each engine has for itself."""


def introduce(link: Link, settings: Settings) -> None:
    """One line that KVShare is active; a warning for what was set in vain."""
    for name in unknown_variables(os.environ):
        log.warning("kvshare: %s in the environment is no setting and is ignored", name)
    home = settings.config.home_path
    try:
        theirs = link.client.call(protocol.Settings(), _ANSWER_S) if link.client.greeted else None
        stats = link.client.call(protocol.Stats(), _ANSWER_S) if theirs is not None else None
    except KVShareError as error:
        log.debug("kvshare: the daemon did not say how it is set up: %s", error)
        theirs = stats = None
    if theirs is None or stats is None:
        _banner.info("KVShare active: home %s, no daemon answers yet", home)
        return
    _banner.info("%s", active(settings, theirs, stats))
    for line in in_vain(settings, theirs):
        log.warning("kvshare: %s", line)


def active(settings: Settings, theirs: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The line that says what serves this engine."""
    policy = granted(theirs["policy"], settings.config.policy)
    return (
        f"KVShare active: policy {policy}, home {settings.config.home_path}, "
        f"daemon pid {stats['pid']}, version {stats['version']}"
    )


def in_vain(settings: Settings, theirs: Mapping[str, Any]) -> list[str]:
    """A line for each setting that was given and is not what the running daemon uses."""
    policy = settings.config.policy
    return [
        f"{name}={value} does not count here: the daemon of {settings.config.home_path} runs with "
        f"{theirs[name]}; stop it (kvshare stop) to start one with other settings"
        for name, value in settings.given().items()
        if name not in _OWN and name in theirs and theirs[name] != value
        # a stricter policy counts for this engine's requests
        if name != "policy" or granted(theirs["policy"], policy) != policy
    ]
