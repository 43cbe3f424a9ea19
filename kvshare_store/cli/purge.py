"""`kvshare purge`: remove every byte of a namespace, of a tenant or of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kvshare_store.cli.clear import YesOption
from kvshare_store.cli.common import ConfigOption, HomeOption, answering, configured
from kvshare_store.cli.evict import DryRunOption
from kvshare_store.errors import ConfigError
from kvshare_store.readable import short

NamespaceOption = Annotated[
    str, typer.Option("--namespace", metavar="DIGEST", help="Digest, or a unique beginning of it.")
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
    float, typer.Option("--wait", min=0, metavar="SECONDS", help="For leases and saves to end.")
]


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    namespace: NamespaceOption = "",
    tenant: TenantOption = None,
    pool: PoolOption = "",
    wait: WaitOption = 60.0,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> int:
    """Remove every byte of a namespace: rows, tokens, vectors, old versions, and its key.

    Waits for leases to end. If something remains after that, it is listed and the exit code is 1.
    """
    from kvshare_store.daemon.protocol import Purge  # noqa: PLC0415 - seconds, not for --help

    if bool(namespace) + bool(pool) + (tenant is not None) != 1:
        raise ConfigError("name what to purge: --namespace DIGEST, --tenant NAME or --pool NAME")
    with answering(configured(home, config)) as ask:
        found = ask(Purge(namespace, tenant, dry_run=True, pool=pool))
        if dry_run:
            typer.echo(f"Would remove {counted(found)}.")
            return 0
        if not yes:
            typer.confirm(f"Remove {counted(found)} for good?", abort=True)
        done = ask(Purge(namespace, tenant, patience=wait, pool=pool))
    for one in done:
        for what in one["remaining"]:
            typer.echo(f"{short(one['namespace'])}: {what}", err=True)
    if any(one["remaining"] for one in done):
        typer.echo("Not all could be removed; purge again.", err=True)
        return 1
    typer.echo(f"Removed {counted(done)}.")
    return 0


def counted(found: Sequence[dict[str, Any]]) -> str:
    """The number of prompts and their bytes, in words."""
    models = ", ".join(sorted({one["model"] for one in found}))
    nodes, blocks = (sum(one[what] for one in found) for what in ("nodes", "blocks"))
    return f"{nodes:,} nodes and {blocks:,} blocks of {len(found):,} namespaces ({models})"
