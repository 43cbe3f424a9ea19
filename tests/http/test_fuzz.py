"""Requests that the OpenAPI document allows, and requests that it does not, drawn at random."""

from __future__ import annotations

import contextlib
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from kvshare_store.daemon.client import Client
from tests.support.page import BEARING, World

EXAMPLES = settings.default.max_examples * 3 // 20
"""Of each kind for each operation: 6 in the default profile, and more where a profile has more."""
_LIMITS = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
]


class Fuzzer:
    """Sends what is drawn and checks what comes back against the document."""

    def __init__(self, owned: World) -> None:
        self._owned = owned
        self._document = owned.ask("GET", "/api/openapi.json", headers=BEARING).json()
        self.seen: Counter[tuple[str, int]] = Counter()

    def all(self, mode: GenerationMode) -> None:
        """Some requests for each operation."""
        schema = schemathesis.openapi.from_dict(self._document)
        for found in schema.get_all_operations():
            drawn = found.ok().as_strategy(generation_mode=mode)

            @_LIMITS
            @given(drawn)
            def send(case: Case) -> None:
                self._send(mode, case)

            with contextlib.suppress(Unsatisfiable):  # some have nothing that could be wrong
                send()

    def _send(self, mode: GenerationMode, case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            self._name_what_is_there(case)
            if case.path in ("/api/purge", "/api/evict"):
                case.body["dry_run"] = True  # what is stored is there for the next request, too
        response = case.call(base_url=self._owned.url, headers=BEARING)
        self.seen[mode.value, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    def _name_what_is_there(self, case: Case) -> None:
        """Ids and digests that the schema allows name nothing."""
        known = {"node": self._owned.child, "digest": self._owned.space.digest,
                 "donor": self._owned.parent, "only": self._owned.parent,
                 "namespace": self._owned.space.digest}  # fmt: skip
        for fields in (case.path_parameters, case.query, case.body):
            if isinstance(fields, dict):
                for name in known.keys() & fields.keys():
                    fields[name] = known[name]


def test_every_answer_is_one_that_is_described(owned: World) -> None:
    fuzzer = Fuzzer(owned)
    for mode in GenerationMode:
        fuzzer.all(mode)
    assert fuzzer.seen["positive", 200] > fuzzer.seen["positive", 404], fuzzer.seen
    assert fuzzer.seen["negative", 422] > 50, fuzzer.seen
    with Client(owned.daemon.config.home_path) as client:
        stats = client.stats()
    assert (stats["nodes"], stats["errors"]) == (3, {}), "nothing is lost, nothing went wrong"
    assert "Traceback" not in owned.daemon.log()
