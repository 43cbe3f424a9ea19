"""The page on the protocol. `python -m tests.support.protocol_page` makes it from the code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from kvshare_store.daemon import protocol
from kvshare_store.daemon.lanes import lane_of
from kvshare_store.daemon.roles import NEEDED
from kvshare_store.errors import ErrorKind, error_for
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Context, Outcome, ReusePlan, Span
from kvshare_store.save.staging import Reuse, Staged
from kvshare_store.tensors.layout import KVLayout

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
_RECORDS = (
    protocol.Welcome, protocol.Reply, Namespace, KVLayout, ReusePlan, Span, BlockRef, Context,
    Outcome, Reuse, Staged, protocol.Holding,
)  # fmt: skip
_INTRO = f"""\
# Protocol

How clients and the daemon talk, versions {protocol.OLDEST} to {protocol.NEWEST}. The tables are
made from `kvshare_store/daemon/protocol.py` by `python -m tests.support.protocol_page`; a test
compares them. What becomes of connections, limits and endings:
[design/daemon.md](design/daemon.md). Who may connect: [design/security.md](design/security.md).

A stream (the Unix socket `kvshare.sock` in the home, or TLS over TCP) carries frames both ways:

| bytes | what |
|---|---|
| 4 | length of the body, little-endian |
| 8 | id of the request, which its answer has too; zeros: why the daemon hangs up |
| length | body: MessagePack |

A request is a map with `type` and the fields below; a field with a default may be left out. The
first is `hello`. An answer is a `Reply`: `result`, or `error` and `message`. Requests of one
connection may be answered in any order. On the Unix socket the descriptor of the client's outbox
goes with `hello`, and that of the arena with its answer.

**Compatibility.** Versions only grow. Both sides speak the newest that both know. Unknown fields
are ignored. An unknown `type` is answered with `protocol`, and the connection lives on. New
fields have defaults under which old ones mean what they meant. Types, error kinds and reasons are
never renamed or used again. `Namespace` and `KVLayout` are the exception: a field that a release
does not know is an error there, because they decide who shares rows with whom.
`tests/daemon/test_release_before.py` holds it: clients and daemons of the release before, built
from its tag, work with those of this one. No release is made yet, so an older commit of the same
protocol stands for it.
"""


class Field(NamedTuple):
    """One field of a message, as the source says it."""

    name: str
    kind: str
    default: str
    about: str

    def __str__(self) -> str:
        default = f" = {self.default}" if self.default else ""
        return _code(f"{self.name}: {self.kind}{default}")


def page() -> str:
    """The whole page."""
    parts = [_INTRO, "## Messages\n", *_messages(), "## Records\n", *_records(), *_errors()]
    return "\n".join(parts)


def _messages() -> Iterator[str]:
    """Two tables: each message with its reply, and what its fields mean."""
    yield "| type | role | lane | fields | asks for |\n|---|---|---|---|---|"
    meanings = []
    for kind in get_args(protocol.Request):
        tag, fields = protocol.tag_of(kind), fields_of(kind)
        cells = (f"`{tag}`", NEEDED[kind], lane_of(kind), _listed(fields), about(kind))
        yield _row(cells)
        meanings += [_row((f"`{tag}.{f.name}`", f.about)) for f in fields if f.about]
    yield "\n| field | meaning |\n|---|---|"
    yield "\n".join(meanings) + "\n"


def _records() -> Iterator[str]:
    yield "Spans, block references and contexts are arrays of their fields, in this order."
    yield "All others are maps.\n"
    yield "| record | fields | what it is |\n|---|---|---|"
    for kind in _RECORDS:
        yield _row((kind.__name__, _listed(fields_of(kind)), about(kind)))
    yield ""


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "| error | again later | exit code of a command | what it says |\n|---|---|---|---|"
    for kind in ErrorKind:
        error = error_for(kind, "")
        again = "yes" if error.retryable else "no"
        yield _row((f"`{kind}`", again, str(error.exit_code), about(type(error))))
    yield ""


def fields_of(kind: type) -> list[Field]:
    """The fields of a message, in order, each with the text that follows it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: list[Field] = []
    for line in tree.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            default = ast.unparse(line.value) if line.value is not None else ""
            found.append(Field(line.target.id, _plain(line.annotation), default, ""))
        elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and found:
            found[-1] = found[-1]._replace(about=_line(str(line.value.value)))
    return found


def _plain(annotation: ast.expr) -> str:
    """A type without its bounds."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        return ast.unparse(annotation.slice.elts[0])
    return ast.unparse(annotation)


def about(kind: Any) -> str:
    """What a class says about itself."""
    return _line(inspect.getdoc(kind) or "")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _listed(fields: list[Field]) -> str:
    return "<br>".join(map(str, fields)) or "–"  # noqa: RUF001


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
