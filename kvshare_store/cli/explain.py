"""`kvshare explain`: why a prompt is served as it is, token by token."""

from __future__ import annotations

import json as json_module
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    answering,
    configured,
    console,
    print_json,
)
from kvshare_store.cli.log import request_lines
from kvshare_store.errors import ConfigError
from kvshare_store.readable import KIND_COLOURS, REASONS, printable, share, short, shortened

Found = Mapping[str, Any]

COLOURS = {**KIND_COLOURS, "recomputed": "yellow"}
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
NamespaceOption = Annotated[
    str, typer.Option("--namespace", metavar="DIGEST", help="Digest, or a unique beginning of it.")
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", metavar="NAME", help="What this policy would do.")
]
FullOption = Annotated[bool, typer.Option("--full", help="Shorten no text.")]


def command(
    prompt: PromptArgument = None,
    node: NodeOption = None,
    request: RequestOption = "",
    tokens: TokensOption = False,
    tokenizer: TokenizerOption = None,
    namespace: NamespaceOption = "",
    policy: PolicyOption = None,
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
        found = ask(Explain(ids, text, first, request, only, namespace, policy))
    if tokenizer is not None and found["explanation"] is not None:
        _decode(found["explanation"], tokenizer)
    if json:
        print_json(found)
        return
    out = console()
    for part in parts(found, marked=out.color_system is None, limit=0 if full else _PART_CHARS):
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


# --- what people read -----------------------------------------------------------------------------


def parts(found: Found, *, marked: bool, limit: int) -> Iterable[RenderableType]:
    """From top to bottom. `marked`: words stand in for colours; `limit`: characters of a part that
    are shown, 0: all."""
    request, explained = found["request"], found["explanation"]
    if request is not None:
        yield from request_lines(request)
        if explained is None:
            yield "Its tokens were not kept (setting log_prompts), so it is not planned again."
            return
        yield "Planned again, with what the store holds now:\n"
    yield from headline(explained)
    yield Text()
    yield fates_table(explained)
    if explained["candidates"]:
        yield Text()
        yield candidates_table(explained["candidates"])
    if explained["divergence"] is not None:
        yield Text("\nfirst difference", style="bold")
        yield Padding(divergence_text(explained["divergence"], explained["tokens"]), (0, 0, 0, 2))
    yield Text("\nprompt", style="bold").append_text(legend(marked))
    yield Padding(prompt_text(explained["parts"], marked=marked, limit=limit), (0, 0, 0, 2))
    if any(part["donor"] for part in explained["parts"]):
        yield Text()
        yield spans_table(explained["parts"])


def headline(explained: Found) -> Iterable[str]:
    """What the plan is, and what it is expected to save."""
    tenant = f", tenant {printable(explained['tenant'])}" if explained["tenant"] else ""
    yield (
        f"{explained['tokens']:,} tokens, policy {explained['policy']}, "
        f"{printable(explained['model'])} (namespace {explained['namespace']}{tenant})"
    )
    if explained["declined"]:
        yield f"no plan: {explained['declined']}"
    else:
        reused = explained["tokens"] - explained["by_kind"].get("recomputed", 0)
        made = explained["generation"]
        yield (
            f"plan: {reused:,} tokens reused, {explained['tokens'] - reused:,} computed; "
            + (f"the prompt's rows are then of generation {made}" if made else "exact")
        )
    expected = explained["expected"]
    if expected is not None:
        yield (
            f"expected: {expected['without']:,.1f} ms without; compute {expected['compute']:,.1f} "
            f"+ load {expected['load']:,.1f} + seams {expected['seams']:,.1f} ms with it: saves "
            f"{expected['saving']:,.1f} ms"
        )


def fates_table(explained: Found) -> Table:
    """Tokens by kind of reuse, and by the rule that recomputes them."""
    table = _table("tokens")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(overflow="fold", style="dim")
    whole = explained["tokens"]
    for kind, style in COLOURS.items():
        count = explained["by_kind"].get(kind, 0)
        if kind != "recomputed":
            table.add_row(Text(kind, style), f"{count:,}", share(count, whole), "")
    by_reason = explained["by_reason"].items()
    for reason, count in sorted(by_reason, key=lambda item: -item[1]):
        label = Text(f"recomputed: {reason}", COLOURS["recomputed"])
        table.add_row(label, f"{count:,}", share(count, whole), REASONS.get(reason, ""))
    return table


def candidates_table(candidates: Sequence[Found]) -> Table:
    """A line for each stored prompt that was nominated."""
    table = _table("candidate")
    for column in ("score", "prefix", "shared", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("found by", no_wrap=True)
    table.add_column("why", overflow="fold")
    for one in candidates:
        table.add_row(
            Text(short(one["node"]), "cyan"),
            f"{one['score']:.3f}",
            f"{one['prefix']:,}",
            f"{one['shared']:,}",
            f"{one['kept']:,}",
            ", ".join(one["found_by"]),
            Text(one["why"], "green" if one["taken"] else ""),
        )
    return table


def divergence_text(divergence: Found, length: int) -> Text:
    """Where the prompt leaves the stored one with the longest common beginning."""
    at, name = divergence["position"], short(divergence["node"])
    if at == length:
        return Text(f"none: {name} begins with the whole prompt")
    text = Text(f"at token {at:,}, from {name}\n")
    for label, side in (("prompt", "request"), ("stored", "donor")):
        words = printable(divergence[f"{side}_text"]).replace("\n", "↵")
        text.append(f"{label}  ", style="dim").append(f"{words or '(its end)'}\n")
    text.right_crop(1)
    return text


def legend(marked: bool) -> Text:
    """What the colours mean."""
    if marked:
        return Text("  [kind: text], recomputed tokens with the rule", style="dim")
    text = Text("  ")
    for kind, style in COLOURS.items():
        text.append(f"{kind} ", style=style)
    return text


def prompt_text(pieces: Sequence[Found], *, marked: bool, limit: int) -> Text:
    """The whole prompt in one running text, each part in the colour of its kind."""
    text = Text()
    for piece in pieces:
        words = printable(piece["text"])
        words = shortened(words, limit) if limit else words
        if marked:
            words = f"[{piece['reason'] or piece['kind']}: {words}]"
        text.append(words, style=COLOURS[piece["kind"]])
        if not marked and words.isdigit():
            text.append(" ")
    return text


def spans_table(pieces: Sequence[Found]) -> Table:
    """Where each run of reused rows comes from, and the placeholders between them."""
    table = _table("positions")
    table.add_column("tokens", justify="right")
    table.add_column("kind", no_wrap=True)
    table.add_column("from", style="cyan", no_wrap=True)
    table.add_column("at", justify="right")
    for piece in pieces:
        kind = piece["kind"] if piece["donor"] else f"recomputed: {piece['reason']}"
        source = str(piece["source"]) if piece["donor"] else ""
        table.add_row(
            f"{piece['start']}…{piece['stop'] - 1}",
            f"{piece['stop'] - piece['start']:,}",
            Text(kind, COLOURS[piece["kind"]]),
            short(piece["donor"]),
            source,
        )
    return table


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(title, no_wrap=True)
    return table
