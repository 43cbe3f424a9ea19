"""A damaged catalogue: the store starts, serves what is sound, says what is lost, and saves again.

`nodes` is a home with three prompts; each test damages its catalogue and opens it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import lancedb
import msgspec
import numpy as np
import pytest

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.rows import NamespaceRow, Row, Rows
from kvshare_store.catalog.table import Table
from kvshare_store.cli.main import main
from kvshare_store.config import StoreConfig
from kvshare_store.errors import CorruptRowError, HomeError, StorageError
from kvshare_store.maintenance.check import TreeReport, check_tree
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node, encode_node, node_id
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS, Vectors
from kvshare_store.plan.spans import Span
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import Driver, prompt

pytestmark = pytest.mark.fault

Open = Callable[..., Driver]
NAMESPACE = Namespace("m", KVLayout(1, 1, 4, "float32"))
UNIT = np.eye(VECTOR_DIMENSIONS, dtype=np.float32)[0]
PROMPTS = [prompt(seed, 40) for seed in (1, 2, 3)]


@pytest.fixture
def saved(driver: Open) -> Callable[[], Driver]:
    """A store that saved three prompts in three commits; call it to open the home again."""
    engine = driver()
    for tokens in PROMPTS:
        engine.save(tokens)
        engine.store.flush()
    engine.store.close()
    return driver


def served(engine: Driver) -> list[int]:
    """How many rows of each prompt are served as its exact prefix. Every row is checked."""
    return [engine.serve([*tokens, 5]).exact for tokens in PROMPTS]


def checked(engine: Driver, *, repair: bool = False) -> TreeReport:
    return check_tree(engine.store.repository, repair=repair)


def check(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of `kvshare check`, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(["check", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code, out.getvalue()


def table(home: Path, name: str = "nodes") -> Any:
    return lancedb.connect(str(home / "catalog")).open_table(name)


def rows_of(home: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(home).search().limit(None).to_list()
    return found


def rewrite(home: Path, node_id: str, **values: Any) -> None:
    """Change values in a node's row without breaking any file checksum."""
    table(home).update(where=f"id = '{node_id}'", values=values)


def data_files(home: Path, name: str = "nodes") -> list[Path]:
    """The data files of a table, oldest first."""
    return sorted(
        (home / "catalog" / f"{name}.lance" / "data").iterdir(),
        key=lambda file: file.stat().st_mtime_ns,
    )


def manifests(home: Path, name: str = "nodes") -> list[Path]:
    """The versions of a table, newest first."""
    return sorted((home / "catalog" / f"{name}.lance" / "_versions").glob("*.manifest"))


# --- rows ---------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_tokens_serves_nobody(saved: Open, home: Path) -> None:
    """Otherwise a prompt that was never computed would be served another prompt's rows."""
    row = next(row for row in rows_of(home) if np.int32(PROMPTS[0]).tobytes() in row["node"])
    other = [*PROMPTS[0][:10], PROMPTS[0][10] ^ 1, *PROMPTS[0][11:]]
    flipped = row["node"].replace(np.int32(PROMPTS[0]).tobytes(), np.int32(other).tobytes())
    rewrite(home, row["id"], node=flipped)
    engine = saved()
    assert engine.serve([*other, 5]).declined == "no_donor"
    assert served(engine) == [0, 40, 40]
    assert engine.store.stats()["errors"] == {"row": 1}


def test_one_unreadable_row_of_many(saved: Open, home: Path) -> None:
    bad = rows_of(home)[1]
    rewrite(home, bad["id"], node=bad["node"][:-3])
    engine = saved()
    assert served(engine) == [40, 0, 40]
    assert engine.store.stats()["errors"] == {"row": 1}
    (problem,) = checked(engine).problems
    assert (problem.kind, problem.about, problem.repaired) == ("row", bad["id"], False)
    (problem,) = checked(engine, repair=True).problems
    assert (problem.kind, problem.about, problem.repaired) == ("row", bad["id"], True)
    assert checked(engine).problems == ()
    assert len(rows_of(home)) == 2
    engine.save(PROMPTS[1])
    assert served(saved()) == [40, 40, 40]


def test_a_row_whose_id_is_no_text(saved: Open, home: Path) -> None:
    rewrite(home, rows_of(home)[0]["id"], id="it's \N{SNOWMAN}")
    engine = saved()
    assert served(engine) == [0, 40, 40]
    assert [p.repaired for p in checked(engine, repair=True).problems] == [True]
    assert len(rows_of(home)) == 2


def test_check_and_repair_open_a_damaged_home_without_a_daemon(saved: Open, home: Path) -> None:
    bad = rows_of(home)[2]
    rewrite(home, bad["id"], node=b"no node at all")
    found = check("--home", home)
    assert (found[0], "row" in found[1], "1 problem" in found[1]) == (1, True, True)
    repaired = check("--repair", "--home", home)
    assert (repaired[0], "(repaired)" in repaired[1]) == (0, True)
    assert check("--home", home)[0] == 0
    assert served(saved()) == [40, 40, 0]


# --- files --------------------------------------------------------------------------------------


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = {"empty": _empty, "half": _half, "zeros": _zeros, "gone": Path.unlink}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_torn_file_of_rows(damage: Callable[[Path], None], saved: Open, home: Path) -> None:
    damage(data_files(home)[1])
    engine = saved()
    assert served(engine) == [40, 0, 40]
    assert engine.store.stats()["errors"] == {"torn": 1}
    engine.save(PROMPTS[1])
    engine.store.flush()
    assert engine.store.stats()["errors"] == {"torn": 1}, "it can be saved again"
    assert checked(engine).problems == ()
    again = saved()
    assert served(again) == [40, 40, 40]
    assert again.store.stats()["errors"] == {}


@damages
def test_the_newest_version_is_torn(
    damage: Callable[[Path], None], saved: Open, home: Path
) -> None:
    damage(manifests(home)[0])
    engine = saved()
    assert served(engine) == [40, 40, 0]
    gone = damage is Path.unlink  # nothing says that this version ever existed
    assert engine.store.stats()["errors"] == ({} if gone else {"torn": 1})
    engine.save(PROMPTS[2])
    assert served(saved()) == [40, 40, 40]


def test_no_version_can_be_read(saved: Open, home: Path) -> None:
    for name in ("nodes", "namespaces"):
        for file in manifests(home, name):
            _half(file)
    engine = saved()
    assert served(engine) == [0, 0, 0]
    assert engine.store.stats()["errors"]["torn"] > 2
    for tokens in PROMPTS:
        engine.save(tokens)
    assert served(saved()) == [40, 40, 40]


def test_what_marks_deleted_rows_is_torn(saved: Open, home: Path) -> None:
    """Every read of such a version fails, so the store uses the version before it."""
    table(home).add(table(home).search().limit(1).select(list(table(home).schema.names)).to_arrow())
    table(home).delete(f"id = '{rows_of(home)[1]['id']}'")
    table(home).delete("_rowid = 12884901888")
    for file in (home / "catalog" / "nodes.lance" / "_deletions").glob("*"):
        _empty(file)
    engine = saved()
    assert served(engine)[::2] == [40, 40]
    engine.save(prompt(4, 40))
    assert saved().serve([*prompt(4, 40), 5]).exact == 40


def test_a_damaged_record_of_a_namespace(saved: Open, home: Path) -> None:
    """Its nodes are not served until the next save writes the record again."""
    record = table(home, "namespaces").search().to_list()[0]["namespace"]
    table(home, "namespaces").update(where="true", values={"namespace": record[:-1] + b"\x07"})
    engine = saved()
    assert served(engine) == [0, 0, 0]
    assert engine.store.stats()["errors"] == {"row": 4}
    engine.save(PROMPTS[0])
    engine.store.flush()
    assert served(saved()) == [40, 40, 40]


def test_any_bytes_may_be_wrong(saved: Open, home: Path) -> None:
    """Whatever a bad disk does to the catalogue, every start succeeds and no wrong row is
    served."""
    chance = random.Random(5)
    whole = {f: f.read_bytes() for f in (home / "catalog").rglob("*") if f.is_file()}
    for _ in range(12):
        for file in (home / "catalog").rglob("*"):
            if file.is_file() and file not in whole:
                file.unlink()
        for file, data in whole.items():
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_bytes(data)
        for file in chance.sample(sorted(whole), 2):
            damaged = bytearray(whole[file])
            for _ in range(chance.choice((1, 3, 50))):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
        engine = saved()
        assert set(served(engine)) <= {0, 40}
        assert engine.save(prompt(9, 40)) is not None
        again = saved()
        assert again.serve([*prompt(9, 40), 5]).exact == 40
        again.store.close()


def test_what_is_no_damage_gives_nothing_up(
    saved: Open, config: Callable[..., StoreConfig], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is out of descriptors, or lacks the right to read, must not drop a version."""
    versions = manifests(home)
    for code in (errno.EMFILE, errno.EACCES):
        with monkeypatch.context() as patch:
            patch.setattr(Table, "row_ids", _refused(code))
            with pytest.raises(HomeError, match="cannot be opened"):
                Store(config())
    assert manifests(home) == versions
    assert not (home / "catalog" / "torn").exists()
    assert served(saved()) == [40, 40, 40]


def _refused(code: int) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise StorageError(f"LanceError(IO): {os.strerror(code)} (os error {code})")

    return refuse


def test_rows_around_a_page_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Table, "read_rows", 10)
    catalog = Catalog(tmp_path)
    catalog.records.add([NAMESPACE])
    nodes = [node_of(np.arange(first, first + 20, dtype=np.int32)) for first in range(60)]
    catalog.add([(node, Vectors(UNIT, None)) for node in nodes])
    rows = Table.rows

    def page_25_is_bad(self: Table, *args: Any) -> Iterator[Any]:
        for batch in rows(self, *args):
            if 25 in batch.column("_rowid").to_pylist():
                raise StorageError("corrupt page")
            yield batch

    monkeypatch.setattr(Table, "rows", page_25_is_bad)
    kept = [node.id for node in nodes[:20] + nodes[30:]]
    assert [node.id for node, _ in catalog.load()] == kept
    assert [fault.error.kind for fault in catalog.take_faults()] == ["torn"]
    assert catalog.count() == 50, "what cannot be read is removed, else nothing could be compacted"


# --- what is verified of a row ------------------------------------------------------------------


def node_of(tokens: np.ndarray, **changes: Any) -> Node:
    """A node of 20 tokens."""
    fields: dict[str, Any] = {
        "id": node_id(NAMESPACE.digest, tokens, changes.get("generation", 0) == 0),
        "namespace": NAMESPACE.digest,
        "token_bytes": tokens.tobytes(),
        "segments": (Span(0, 16, 0, 0, 0), Span(16, 4, 16, 1, 0)),
        "blocks": ("ab" * 32, "cd" * 32),
        "block_bytes": (16 * 32, 4 * 32),
        "exact_rows": 20,
    }
    return Node(**(fields | changes))


def packed(**changes: Any) -> Row:
    """A node's row without encryption, as this release writes it."""
    node = node_of(np.arange(20, dtype=np.int32), **changes)
    row = reader().node_row(node, Vectors(UNIT, UNIT))
    return Row(row["id"], row["namespace"], row["node"], row["lexical"], row["semantic"])


def reader() -> Rows:
    rows = Rows(None)
    record = rows.namespace_row(NAMESPACE)
    rows.namespace(NamespaceRow(**record))
    return rows


def test_any_flipped_bit_of_a_row_is_noticed() -> None:
    row, rows = packed(), reader()
    assert rows.node(row)[0].length == 20
    marker = row.node.index(b"\xa5check")
    for at in range(len(row.node)):
        damaged = bytearray(row.node)
        damaged[at] ^= 1 << at % 8
        changed = row._replace(node=bytes(damaged))
        if (
            marker <= at < marker + 8
        ):  # looks like a row of the release before: everything else is right
            with contextlib.suppress(CorruptRowError):
                assert rows.node(changed)[0].tokens.tolist() == list(range(20))
            continue
        with pytest.raises(CorruptRowError):
            rows.node(changed)
    for at in range(VECTOR_DIMENSIONS):
        nearly = UNIT.copy()
        nearly[at] += 1e-6
        with pytest.raises(CorruptRowError):
            rows.node(row._replace(lexical=nearly))
        assert rows.node(row._replace(semantic=nearly))[1].semantic is None
    with pytest.raises(CorruptRowError):
        rows.node(row._replace(id="0" * 32))
    with pytest.raises(CorruptRowError):
        rows.node(row._replace(lexical=None))


BAD = [None, UNIT * 3, UNIT * np.float32("nan"), UNIT[:10], np.zeros((2, 384), np.float32)]


@pytest.mark.parametrize("bad", BAD, ids=["none", "long", "nan", "short", "two"])
def test_a_bad_text_vector_costs_the_vector_not_the_node(bad: Any) -> None:
    """On writing, the vector is left out; on reading, the node still serves as a donor."""
    node = node_of(np.arange(20, dtype=np.int32))
    row = Row(**without_stamp(reader().node_row(node, Vectors(UNIT, bad))))
    assert row.semantic is None
    found, vectors = reader().node(row)
    assert (found.id, vectors.semantic) == (node.id, None)
    found, vectors = reader().node(packed()._replace(semantic=bad))
    assert (found.id, vectors.semantic) == (node.id, None)
    assert np.array_equal(reader().node(packed())[1].semantic, UNIT)


def without_stamp(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "stamp"}


@pytest.mark.parametrize("semantic", [None, UNIT], ids=["without", "with"])
def test_a_check_over_both_vectors_still_holds(semantic: Any) -> None:
    """Rows without a hash of their text vector have one checksum over both vectors."""
    encoded = encode_node(node_of(np.arange(20, dtype=np.int32)))
    assert encoded[:3] == b"\xde\x00\x13", "a map of 19 fields"
    body = b"\xde\x00\x14" + encoded[3:] + b"\xa5check\xc4\x20"
    node = msgspec.msgpack.decode(encoded)
    text = b"-" if semantic is None else semantic.tobytes()
    whole = f"kvshare row:{node['id']}:{node['namespace']}:".encode() + UNIT.tobytes() + text + body
    row = Row(node["id"], node["namespace"], body + blake3.blake3(whole).digest(), UNIT, semantic)
    assert reader().node(row)[1].semantic is semantic
    with pytest.raises(CorruptRowError):
        reader().node(row._replace(semantic=None if semantic is not None else UNIT))


SELF_CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "an id that is not of its tokens": {"id": "ab" * 16},
    "a segment beyond its block": {
        "segments": (Span(0, 16, 0, 0, 1), Span(16, 4, 16, 1, 0)),
    },
    "segments with a gap": {"segments": (Span(0, 15, 0, 0, 0), Span(16, 4, 16, 1, 0))},
    "segments that end early": {"segments": (Span(0, 16, 0, 0, 0),)},
    "a block that it does not name": {"segments": (Span(0, 16, 0, 0, 0), Span(16, 4, 16, 2, 0))},
    "a block with no name": {"blocks": ("ab" * 32, "x" * 64)},
    "fewer sizes than blocks": {"block_bytes": (16 * 32,)},
    "exact, but not all of it": {"exact_rows": 19},
    "more exact rows than rows": {"exact_rows": 21, "generation": 1},
    "less than no generation": {"generation": -1},
}


@pytest.mark.parametrize("changes", SELF_CONTRADICTIONS.values(), ids=SELF_CONTRADICTIONS)
def test_a_row_that_contradicts_itself(changes: dict[str, Any]) -> None:
    """Also if the checksum holds, or if there is none: the release before wrote none."""
    row, rows = packed(**changes), reader()
    with pytest.raises(CorruptRowError):
        rows.node(row)
    plain = msgspec.msgpack.decode(row.node)
    del plain["check"]
    with pytest.raises(CorruptRowError):
        rows.node(row._replace(node=msgspec.msgpack.encode(plain)))


@pytest.mark.parametrize("scale", [0.5, float("nan"), 1e30])
def test_vectors_are_finite_and_of_length_one(scale: float) -> None:
    row = packed()
    plain = msgspec.msgpack.decode(row.node)
    del plain["check"]
    row = row._replace(node=msgspec.msgpack.encode(plain))
    assert reader().node(row)[1].lexical[0] == 1.0
    with pytest.raises(CorruptRowError, match="vector"):
        reader().node(row._replace(lexical=UNIT * scale))
    assert reader().node(row._replace(semantic=UNIT * scale))[1].semantic is None


def test_the_records_of_a_batch_are_one_commit(driver: Open) -> None:
    """One commit per record took as long as committing the rows of a whole batch."""
    engine = driver()
    catalog = engine.store.repository.catalog
    assert catalog is not None
    spaces = [engine.namespace.for_tenant(str(at)) for at in range(20)]
    before = sum(catalog.old_versions().values())
    go = threading.Event()
    engine.store.repository.queue.call(lambda: go.wait(30))
    rows = bytes(8 * engine.namespace.layout.row_bytes)
    for seed, space in enumerate(spaces):
        engine.store.save(prompt(seed, 8), space, rows)
    go.set()
    engine.store.flush()
    assert sum(catalog.old_versions().values()) <= before + 4, (
        "records and rows, of one batch or of two"
    )
    engine = driver()
    known = {space.digest for space in list(engine.store.nodes.namespaces)}
    assert known == {space.digest for space in spaces}
