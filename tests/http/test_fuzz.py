"""Requests that the OpenAPI document allows, and requests that it does not, drawn at random."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import pytest

from kvshare_store.daemon.client import Client
from tests.support.page import World, world

TOKEN = secrets.token_urlsafe(24)
REQUESTS = 600
ODD = [
    *("", " ", "0", "-1", "null", "\0", "ÿ", "\U0001f600", "../..", "%2e%2e", "<b>", "'\""),
    *("a" * 300, "9" * 40, "1e400", "NaN", "true", "[]", "{}"),
]
VALUES: list[Any] = [
    *(*ODD, None, True, 0, -1, 2**31, 2**63, 10**30, 1.5, -0.0),
    *([], [[]], {}, [None], ["a"], [1, 2, 3], {"a": 1}),
]


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A daemon whose token we have."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    with world(folder, http_token=str(folder / "token")) as made:
        yield made


class Fuzzer:
    """Draws requests for the operations of one document and checks each answer against it."""

    def __init__(self, made: World, client: httpx.Client, seed: int) -> None:
        self._made, self._client = made, client
        self._draw = random.Random(seed)
        self.document: dict[str, Any] = client.get("/api/openapi.json").json()
        self.operations = [
            (method, path, found)
            for path, methods in self.document["paths"].items()
            for method, found in methods.items()
        ]
        self.seen: dict[int, int] = {}

    def once(self) -> None:
        """One request."""
        method, path, operation = self._draw.choice(self.operations)
        query: dict[str, Any] = {}
        for parameter in operation.get("parameters", []):
            value = self._value(parameter["schema"], parameter["name"])
            if parameter["in"] == "path":
                path = path.replace(
                    "{" + parameter["name"] + "}", quote(str(value), safe="") or "-"
                )
            elif parameter["in"] == "query" and self._draw.random() < 0.6:
                query[parameter["name"]] = value
        body = self._body(operation)
        answer = self._client.request(method, path, params=query, content=body)
        self._check(method, path, operation, answer, body)

    def _check(
        self, method: str, path: str, operation: Any, answer: httpx.Response, body: bytes | None
    ) -> None:
        status, said = answer.status_code, (method, path, answer.text[:300], body)
        self.seen[status] = self.seen.get(status, 0) + 1
        assert status < 500 or status in (503, 504), said
        if path == "/metrics":
            return
        found = answer.json()
        answers = operation["responses"]
        described = answers.get(str(status)) or answers.get(f"{status // 100}XX")
        if status in (404, 405) or described is None:
            assert set(found) == {"error", "message"}, said
            return
        schema = described["content"]["application/json"]["schema"]
        if status == 422:
            schema = {"$ref": "#/components/schemas/Error"}
        jsonschema.validate(found, {**schema, "components": self.document["components"]})

    def _body(self, operation: Any) -> bytes | None:
        if "requestBody" not in operation:
            return None
        if self._draw.random() < 0.1:
            return self._draw.choice([b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"a":' * 200])
        schema = self._resolved(operation["requestBody"]["content"]["application/json"]["schema"])
        names = [name for name in schema["properties"] if self._draw.random() < 0.4]
        body = {name: self._value(schema["properties"][name], name) for name in names}
        if "dry_run" in schema["properties"]:
            body["dry_run"] = True  # what is stored must be there for the next request
        if self._draw.random() < 0.05:
            body[self._draw.choice(ODD)] = 1
        return json.dumps(body).encode()

    def _resolved(self, schema: Any) -> Any:
        while "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema

    def _value(self, schema: Any, name: str) -> Any:
        """Something that fits, three times in four."""
        if self._draw.random() < 0.25:
            return self._draw.choice(VALUES)
        known = {
            "node": self._made.child,
            "donor": self._made.parent,
            "only": self._made.parent,
            "digest": self._made.space.digest,
            "namespace": self._made.space.digest,
            "text": "bike shop",
            "tenant": "",
        }
        if name in known:
            return known[name]
        kinds = schema.get("anyOf", [schema])
        chosen = self._resolved(self._draw.choice(kinds))
        if "enum" in chosen:
            return self._draw.choice(chosen["enum"])
        return {
            "integer": self._draw.randint(0, 1000),
            "number": self._draw.random() * 100,
            "boolean": self._draw.random() < 0.5,
            "array": [self._draw.randint(0, 255) for _ in range(9)],
            "null": None,
        }.get(chosen.get("type"), "")


def test_every_answer_is_one_that_is_described(owned: World) -> None:
    with httpx.Client(
        base_url=owned.url, timeout=60.0, headers={"authorization": f"Bearer {TOKEN}"}
    ) as client:
        fuzzer = Fuzzer(owned, client, 8470)
        for _ in range(REQUESTS):
            fuzzer.once()
        assert fuzzer.seen[200] > REQUESTS / 10, fuzzer.seen
        assert fuzzer.seen[422] > REQUESTS / 10, fuzzer.seen
    with Client(owned.daemon.config.home_path) as asked:
        stats = asked.stats()
    assert (stats["nodes"], stats["errors"]) == (3, {}), (
        "nothing is lost, nothing went wrong inside"
    )
    log = Path(owned.daemon.config.home_path / "daemon.log").read_text()
    assert "Traceback" not in log
