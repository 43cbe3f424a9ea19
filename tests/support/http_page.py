"""The table of the page on HTTP, made by `python -m tests.support.http_page`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvshare_store.http.app import routes
from kvshare_store.http.asking import Asking
from kvshare_store.http.guard import OPEN
from kvshare_store.http.history import History
from tests.support.documents import DOCS
from tests.support.made_parts import Parts, cell, code, listed, remake, table
from tests.support.page import Numb

PAGE = DOCS / "http.md"
_FORM = "x-csrf-token"
"""What the forms of our pages send along."""
Described = dict[str, Any]
"""A part of what `/api/openapi.json` says."""


def described() -> Described:
    """What `/api/openapi.json` answers."""
    return routes(Asking(Numb(), History())).openapi()


def parts() -> Parts:
    """Every question, with who may ask it."""
    document = described()
    rows = (
        (
            code(f"{method.upper()} {path}"),
            _who(path, found),
            listed(_fields(document, found)),
            cell(found["description"]),
        )
        for path, methods in document["paths"].items()
        for method, found in methods.items()
    )
    return {"requests": table(("request", "who", "fields", "what"), rows)}


def _who(path: str, operation: Described) -> str:
    if path in OPEN:
        return "anybody"
    forms = any(one["name"] == _FORM for one in operation.get("parameters", []))
    return "bearer token, or a form of the page" if forms else "who gets in"


def _fields(document: Described, operation: Described) -> Iterator[str]:
    """What may be sent along, in the query or in the body."""
    for one in operation.get("parameters", []):
        if one["in"] == "query":
            yield _field(one["name"], one["schema"], one["description"])
    if "requestBody" in operation:
        asked = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        body = document["components"]["schemas"][asked.rpartition("/")[2]]
        for name, schema in body["properties"].items():
            yield _field(name, schema, schema["description"])


def _field(name: str, schema: Described, about: str) -> str:
    default = schema.get("default")
    said = f" ({default:g})" if isinstance(default, int | float) and default else ""
    return cell(f"`{name}`{said}: {about}")


if __name__ == "__main__":
    remake(PAGE, parts())
