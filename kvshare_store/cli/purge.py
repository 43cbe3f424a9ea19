"""`kvshare purge`: remove all of a namespace, a tenant or a pool, or a node with its lineage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from kvshare_store.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    NamespaceOption,
    YesOption,
    answering,
    configured,
    print_json,
)
from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import short
from kvshare_store.plan import LONGEST_PATIENCE_S
from kvshare_store.readable import many, one_line

if TYPE_CHECKING:
    from kvshare_store.daemon.protocol import Purge

_ENGINES = (
    "vLLM's own prefix cache, in the memory of engines, keeps its blocks until it needs their room "
    "or is reset."
)
NodeArgument = Annotated[
    str, typer.Argument(metavar="[NODE]", help="With --lineage: id, or a unique beginning of it.")
]
LineageOption = Annotated[
    bool,
    typer.Option("--lineage", help="NODE, and every prompt with rows computed behind its rows."),
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        metavar="SALT",
        help="Every namespace of this tenant: of requests with this cache_salt, or, where "
        "tenant_key is set, with the salt of this name.",
    ),
]
PoolOption = Annotated[
    str, typer.Option("--pool", metavar="NAME", help="Every namespace of this pool.")
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait",
        min=0,
        max=LONGEST_PATIENCE_S,
        metavar="SECONDS",
        help="For leases and saves to end.",
    ),
]


def command(
    node: NodeArgument = "",
    lineage: LineageOption = False,
    home: HomeOption = None,
    config: ConfigOption = None,
    namespace: NamespaceOption = "",
    tenant: TenantOption = None,
    pool: PoolOption = "",
    wait: WaitOption = 60.0,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> int:
    """Remove every byte of a tenant, a pool or a namespace, or of a prompt and what was built on
    it.

    With its rows go tokens, vectors, old versions, and the key. Waits for leases to end. If
    something remains after that, it is listed and the exit code is 1.

    NODE --lineage removes a prompt that should not have been there: it, the prompts that go on from
    it, and those with rows that were computed behind its rows. Pinned ones go too.
    """
    wanted = _wanted(node, namespace, tenant, pool, lineage=lineage)
    with answering(configured(home, config)) as ask:
        found = ask(msgspec.structs.replace(wanted, dry_run=True))
        if not dry_run:
            if not yes:
                typer.confirm(f"Remove {counted(found)} for good?", abort=True, err=True)
            found = ask(msgspec.structs.replace(wanted, patience=wait))
    if json:
        print_json(found)
    else:
        _say(found, dry_run=dry_run)
    return int(any(one["remaining"] for one in found))


def _wanted(node: str, namespace: str, tenant: str | None, pool: str, *, lineage: bool) -> Purge:
    """What to purge; `ConfigError` unless it is one thing."""
    from kvshare_store.daemon.protocol import Purge  # noqa: PLC0415 - seconds, not for --help

    if bool(node) != lineage:
        raise ConfigError("`purge NODE --lineage` takes both; `evict NODE` forgets one prompt")
    if bool(namespace) + (tenant is not None) + bool(pool) + bool(node) != 1:
        raise ConfigError(
            "name what to purge: --namespace DIGEST, --tenant NAME, --pool NAME or NODE --lineage"
        )
    return Purge(namespace, tenant, pool=pool, lineage=node)


def _say(found: Sequence[dict[str, Any]], *, dry_run: bool) -> None:
    """What went or would go, and what remains."""
    for one in found:
        for name in one["ids"] if dry_run else ():
            typer.echo(short(name))
        for what in one["remaining"]:
            typer.echo(f"{short(one['namespace'])}: {what}", err=True)
    if any(one["remaining"] for one in found):
        typer.echo("Not all could be removed; purge again.", err=True)
    else:
        typer.echo(f"{'Would remove' if dry_run else 'Removed'} {counted(found)}.")
        if not dry_run:
            typer.echo(_ENGINES)


def counted(found: Sequence[dict[str, Any]]) -> str:
    """The number of prompts and their bytes, in words."""
    models = ", ".join(sorted({one_line(one["model"]) for one in found}))
    nodes, blocks, unsure = (sum(one[w] for one in found) for w in ("nodes", "blocks", "unsure"))
    maybe = f" ({unsure:,} of them unsure)" if unsure else ""
    return (
        f"{many(nodes, 'node')}{maybe} and {many(blocks, 'block')} of "
        f"{many(len(found), 'namespace')} ({models})"
    )
