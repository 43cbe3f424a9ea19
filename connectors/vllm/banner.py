"""What an engine logs when it starts: that KVShare is active, settings that have no effect because
its daemon runs with others, and a home that holds prompts of other models only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from kvshare_connectors.vllm.requests import granted
from vllm.logger import init_logger

from kvshare_store.config import PER_ENGINE, Settings, StoreConfig, unknown_variables
from kvshare_store.daemon import protocol
from kvshare_store.daemon.link import Link
from kvshare_store.errors import KVShareError
from kvshare_store.namespace import Namespace

# vLLM shows information of its own loggers only
_banner = init_logger("vllm.kvshare")
log = logging.getLogger("kvshare")

_ANSWER_S = 5.0
_RECENT_PROMPTS = 256
"""How many of the prompts used last are asked for their model."""
_OWN = (
    "home", *PER_ENGINE, "log_format",
    "connect", "tls_cert", "tls_key", "tls_server", "listen", "tls_clients", "tls_roles",
)  # fmt: skip
"""Settings of which a daemon may have others."""
_LARGER = ("min_prompt_tokens", "min_saving_ms")
"""Both sides ask for so much: the larger one counts."""


def introduce(link: Link, settings: Settings) -> None:
    """Log that KVShare is active, and a warning for each setting without effect."""
    for name in unknown_variables(os.environ):
        log.warning("kvshare: %s in the environment is no setting and is ignored", name)
    try:
        theirs = link.client.call(protocol.Settings(), _ANSWER_S) if link.client.greeted else None
        stats = link.client.call(protocol.Stats(), _ANSWER_S) if theirs is not None else None
    except KVShareError as error:
        log.debug("kvshare: the daemon did not say how it is set up: %s", error)
        theirs = stats = None
    if theirs is None or stats is None:
        _banner.info("KVShare active: %s, which does not answer yet", _daemon(settings.config))
        return
    _banner.info("%s", active(settings, theirs, stats))
    for line in in_vain(settings, theirs):
        log.warning("kvshare: %s", line)


def _daemon(config: StoreConfig) -> str:
    """Which daemon is meant."""
    return f"daemon {config.connect}" if config.connect else f"the daemon of {config.home_path}"


def active(settings: Settings, theirs: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The line that names this engine's policy and what bounds it, home and daemon, its second
    looks and pools, and the daemon's page. A daemon of another machine has neither a home nor a
    process here."""
    config = settings.config
    pools, looks = ", ".join(config.pool_names), config.second_look
    policy, page = granted(theirs["policy"], config.policy), theirs.get("http", "")
    bound = theirs.get("quality_bound") if policy not in ("off", "exact") else 0.0
    where = f"home {config.home_path}, daemon pid {stats['pid']}"
    return (
        f"KVShare active: policy {policy}"
        + (f" under quality_bound {bound:g} (new traffic begins at exact)" if bound else "")
        + f", {_daemon(config) if config.connect else where}, version {stats['version']}"
        + (f", second_look {looks}" if looks != "off" else "")
        + (f", pools {pools}" if pools else "")
        + (f", page http://{page}/" if page and not page.endswith(":0") else "")
    )


def in_vain(settings: Settings, theirs: Mapping[str, Any]) -> list[str]:
    """A line for each given setting that differs from the running daemon's, and one if the daemon
    has a bound that this engine does nothing for."""
    config = settings.config
    other = (
        "its operator can change that"
        if config.connect
        else ("stop it (kvshare stop) to start one with other settings")
    )
    lines = [
        f"{name}={value} does not count here: {_daemon(config)} runs with {theirs[name]}; {other}"
        for name, value in settings.given().items()
        if name not in _OWN and name in theirs and not _counts(name, value, theirs[name])
    ]
    if theirs.get("quality_bound") and config.second_look == "off":
        lines.append(
            f"the daemon has quality_bound={theirs['quality_bound']:g} and this engine scores no "
            "answers: without scores nothing but exact rows is reused. Set second_look=idle here"
        )
    return lines


def _counts(name: str, value: Any, theirs: Any) -> bool:
    """Whether a setting that the engine was given holds for its requests."""
    if name == "policy":  # a stricter one holds
        return bool(granted(theirs, value) == value)
    return bool(value == theirs or (name in _LARGER and value > theirs))


def look_for_own_prompts(link: Link, namespace: Namespace) -> None:
    """Warn if the home holds prompts of other models only: every request will miss at first."""
    if not link.client.greeted:
        return
    try:
        nodes = link.client.call(protocol.ListNodes(_RECENT_PROMPTS), _ANSWER_S)
    except KVShareError as error:
        log.debug("kvshare: the daemon did not say what it holds: %s", error)
        return
    models = sorted({str(node["model"]) for node in nodes})
    if models and namespace.model not in models:
        log.warning(
            "kvshare: the prompts stored last in %s are of %s, none is of %s: nothing is reused "
            "until its own are stored; if that is the same model, serve it under the same name, "
            "else choose another home with kvshare.home",
            link.client.home, ", ".join(models), namespace.model,
        )  # fmt: skip
