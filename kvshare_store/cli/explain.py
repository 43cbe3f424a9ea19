"""`kvshare explain`: why a prompt is served as it is, token by token."""

from __future__ import annotations

import json as json_module
import sys
from array import array
from pathlib import Path
from typing import Annotated, Any

import typer

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    NamespaceOption,
    answering,
    configured,
    console,
    print_json,
)
from kvshare_store.cli.explained import parts
from kvshare_store.errors import ConfigError

_PART_CHARS = 240

PromptArgument = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT_FILE", help="The prompt as text; - reads standard input."),
]
NodeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="NODE",
        help="A stored prompt instead of a file. A second one is then its only candidate.",
    ),
]
RequestOption = Annotated[
    str, typer.Option("--request", metavar="ID", help="A request that `kvshare log` shows.")
]
TokensOption = Annotated[
    bool, typer.Option("--tokens", help="PROMPT_FILE holds a JSON list of token ids.")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", metavar="DIR", help="tokenizer.json, or its folder; else the namespace's."
    ),
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", metavar="NAME", help="What this policy would do.")
]
PoolsOption = Annotated[
    list[str] | None,
    typer.Option("--pool", metavar="NAME", help="A pool that it may use; may be repeated."),
]
TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", metavar="NAME", help="Of PROMPT_FILE: whose prompt it is."),
]
FullOption = Annotated[bool, typer.Option("--full", help="Shorten no text.")]


def command(
    prompt: PromptArgument = None,
    node: NodeOption = None,
    request: RequestOption = "",
    tokens: TokensOption = False,
    tokenizer: TokenizerOption = None,
    namespace: NamespaceOption = "",
    tenant: TenantOption = None,
    policy: PolicyOption = None,
    pool: PoolsOption = None,
    home: HomeOption = None,
    config: ConfigOption = None,
    full: FullOption = False,
    json: JsonOption = False,
) -> None:
    """Show who could serve a prompt, who does, and why each other token is computed.

    Nothing is served or counted: the planner is asked, as for a request.
    """
    from kvshare_store.daemon.protocol import Explain  # noqa: PLC0415 - seconds, not for --help

    nodes = node or []
    if (prompt is not None) + bool(nodes) + bool(request) != 1 or len(nodes) > 2:
        raise ConfigError("name what to explain: PROMPT_FILE, --node NODE (once or twice), or "
                          "--request ID")  # fmt: skip
    first, only = (*nodes, "", "")[:2]
    ids, text = (b"", "") if prompt is None else _prompt(prompt, tokens, tokenizer)
    with answering(configured(home, config)) as ask:
        pools = tuple(pool or ())
        asked = Explain(ids, text, first, request, only, namespace, policy, pools, tenant)
        found = ask(asked)
    if tokenizer is not None and found["explanation"] is not None:
        _decode(found["explanation"], tokenizer)
    if json:
        print_json(found)
        return
    out = console()
    marked, limit = out.color_system is None, 0 if full else _PART_CHARS
    for part in parts(found, out.width, marked=marked, limit=limit):
        out.print(part, soft_wrap=isinstance(part, str))


def _prompt(name: str, tokens: bool, tokenizer: Path | None) -> tuple[bytes, str]:
    """Token ids as int32, or text for the namespace's tokenizer."""
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"prompt {name} cannot be read: {reason}") from error
    if tokens:
        return _packed(name, content), ""
    if not content:
        raise ConfigError(f"prompt {name} is empty")
    if tokenizer is None:
        return b"", content
    from kvshare_store.simulate.traces import tokenizer as load  # noqa: PLC0415 - NumPy

    return array("i", load(tokenizer)(content)).tobytes(), ""


def _packed(name: str, content: str) -> bytes:
    try:
        ids = json_module.loads(content)
        if not isinstance(ids, list) or not ids:
            raise ValueError
        return array("i", ids).tobytes()
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"prompt {name} is not a JSON list of token ids") from error


def _decode(explanation: dict[str, Any], tokenizer: Path) -> None:
    """The text of what was answered as token ids, by the tokenizer that the prompt was read
    with."""
    import numpy as np  # noqa: PLC0415 - not for --help

    from kvshare_store.lookup.text import decode  # noqa: PLC0415

    folder = str(tokenizer if tokenizer.is_dir() else tokenizer.parent)
    pieces = [(part, "tokens", "text") for part in explanation["parts"]]
    if (divergence := explanation["divergence"]) is not None:
        pieces += [(divergence, side, f"{side}_text") for side in ("request", "donor")]
    for piece, ids, text in pieces:
        words = decode(folder, np.asarray(piece[ids], np.int32))
        piece[text] = piece[text] if words is None else words
