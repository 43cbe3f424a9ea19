"""`kvshare salt`: the salt of a tenant."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_store.cli.common import ConfigOption, SetOption, sourced


def command(
    tenant: Annotated[str, typer.Argument(metavar="NAME", help="Name of the tenant.")],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Print the cache_salt of a tenant, made with tenant_key, as a gateway has to send it."""
    from kvshare_store.namespace import Tenants  # noqa: PLC0415 - only here

    typer.echo(Tenants(sourced(None, config, set_).config).salt(tenant))
