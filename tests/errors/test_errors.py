"""The shape of the error tree: handlers and wire codes depend on it."""

from __future__ import annotations

import copy
import pickle

import pytest

from kvshare_store import errors
from kvshare_store.errors import (
    ClaimedBlockError,
    ErrorKind,
    FullDiskError,
    KVShareError,
    MissError,
    ProtocolError,
    error_for,
)
from tests.support.documents import ROOT, tables_of

# Append-only: a kind that was released is never renamed.
KINDS = {
    "config": errors.ConfigError,
    "home": errors.HomeError,
    "busy": errors.BusyError,
    "namespace": errors.NamespaceError,
    "plan": errors.PlanError,
    "corrupt": errors.CorruptBlockError,
    "missing": errors.MissingBlockError,
    "no_space": errors.NoSpaceError,
    "storage": errors.StorageError,
    "lease": errors.LeaseError,
    "protocol": errors.ProtocolError,
    "unavailable": errors.UnavailableError,
    "timeout": errors.DeadlineError,
    "unsupported": errors.UnsupportedError,
    "internal": errors.InternalError,
    "short": errors.ShortBlockError,
    "node": errors.NodeError,
    "overload": errors.OverloadError,
    "row": errors.CorruptRowError,
    "newer": errors.NewerRowError,
    "torn": errors.TornTableError,
    "foreign": errors.ForeignError,
    "denied": errors.DeniedError,
    "limit": errors.LimitError,
}
MISSES = {"corrupt", "short", "missing", "lease", "row", "newer", "torn"}
RETRYABLE = {"limit", "no_space", "overload", "storage", "unavailable", "timeout"}
BUILTINS = {
    "config": ValueError,
    "home": OSError,
    "namespace": ValueError,
    "plan": ValueError,
    "missing": KeyError,
    "node": LookupError,
    "storage": OSError,
    "unavailable": ConnectionError,
    "timeout": TimeoutError,
}
every_kind = pytest.mark.parametrize(("kind", "cls"), KINDS.items(), ids=KINDS)


def classes(root: type[KVShareError] = KVShareError) -> set[type[KVShareError]]:
    return {root}.union(*(classes(child) for child in root.__subclasses__()))


def test_every_class_has_its_own_stable_kind() -> None:
    public = {cls for cls in classes() if cls.__module__ == errors.__name__}
    of_their_own = {cls for cls in public if "kind" in vars(cls)}
    assert public - of_their_own == {KVShareError, ClaimedBlockError, FullDiskError}, (
        "each travels as its base does"
    )
    concrete = of_their_own - {MissError}
    assert {cls.kind: cls for cls in concrete} == KINDS
    assert len(concrete) == len(KINDS)
    assert set(ErrorKind) == set(KINDS)


@every_kind
def test_kinds_come_back_from_the_wire(kind: str, cls: type[KVShareError]) -> None:
    rebuilt = error_for(kind, "what happened")
    assert type(rebuilt) is cls
    assert str(rebuilt) == "what happened"


def test_an_unknown_kind_is_a_protocol_error() -> None:
    rebuilt = error_for("from_the_future", "what happened")
    assert type(rebuilt) is ProtocolError
    assert "from_the_future" in str(rebuilt)
    assert "what happened" in str(rebuilt)


@every_kind
def test_errors_survive_pickling(kind: str, cls: type[KVShareError]) -> None:
    error = cls("what happened")
    for clone in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own
        assert type(clone) is cls
        assert str(clone) == "what happened"
        assert clone.kind == kind


@every_kind
def test_families(kind: str, cls: type[KVShareError]) -> None:
    assert issubclass(cls, KVShareError)
    assert issubclass(cls, MissError) == (kind in MISSES)
    assert cls.retryable == (kind in RETRYABLE)
    assert issubclass(cls, BUILTINS.get(kind, Exception))
    assert 1 <= cls.exit_code <= 125


NAMED = {
    errors.ConfigError: "a setting",
    errors.HomeError: "the home cannot be used",
    errors.BusyError: "belongs to another process",
    errors.NamespaceError: "no such namespace",
    errors.UnsupportedError: "not installed",
    errors.UnavailableError: "no daemon is there",
    errors.DeadlineError: "did not answer in time",
    errors.ForeignError: "somebody else's",
    errors.DeniedError: "role or certificate",
}
"""What docs/commands.md says of the errors with an exit code of their own."""


def test_every_exit_code_is_explained() -> None:
    (table,) = tables_of(ROOT / "docs" / "commands.md", "exit code", "meaning")
    explained = {int(code): meaning for code, meaning in table[1:]}
    assert set(explained) == {0, 1, 130} | {cls.exit_code for cls in KINDS.values()}
    assert set(NAMED) == {cls for cls in KINDS.values() if cls.exit_code != 1}
    for cls, words in NAMED.items():
        assert words in explained[cls.exit_code], cls


def test_exit_codes_tell_errors_apart() -> None:
    codes = [cls.exit_code for cls in KINDS.values() if cls.exit_code != 1]
    assert len(codes) == len(set(codes))
