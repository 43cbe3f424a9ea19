"""What the daemon says of a node, and `kvshare show` of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest

from kvshare_store.cli import show
from kvshare_store.cli.explained import headline
from kvshare_store.daemon import describe, protocol, questions
from kvshare_store.daemon.describe import show_node
from kvshare_store.plan.contexts import Context, cut_contexts
from kvshare_store.save.staging import Buffer, packed
from tests.support.oracle import Driver, pick, positions_of, prompt
from tests.support.page import Page, seen

FIRST = prompt(1, 200)
EDITED = [*FIRST[:60], *prompt(2, 5), *FIRST[66:]]
NEXT = [*EDITED, *prompt(3, 30)]


@pytest.mark.parametrize("policy", ["aggressive", "balanced"])
def test_what_a_prompt_continues_and_under_which_policy(
    driver: Callable[..., Driver], policy: str
) -> None:
    """The next turn of an edited prompt has the contexts of that, and all of its rows but the last
    few are the rows of that."""
    engine = driver(policy=policy)
    ids = [engine.serve_and_save(tokens) for tokens in (FIRST, EDITED, NEXT)]
    first, edited, after = (show_node(engine.store, node or "") for node in ids)
    assert (first["contexts"], first["policy"], first["continued_rows"]) == ([], "", 0)
    assert (edited["policy"], edited["continued_rows"]) == (policy, 0)
    (context,) = edited["contexts"]
    assert after["contexts"] == edited["contexts"]
    assert after["policy"] == policy
    assert (after["parent"], after["generation"]) == (ids[1], 1)
    assert after["continued_rows"] == len(EDITED) - after["exact_rows"]
    table = show.summary_table(after)
    said = [str(cell) for column in table.columns[1:] for cell in column.cells]
    lines = f"{after['exact_rows']} exact from the start, {after['continued_rows']} continued"
    assert any(lines in line for line in said)
    assert f"{policy}, or stricter" in said
    behind = f"computed behind rows that were edited, up to token {context['stop']}"
    assert f"from token {context['start']} on: {behind}" in said


def test_an_answer_is_said_apart_from_its_prompt(driver: Callable[..., Driver]) -> None:
    engine = driver()
    told, answer = FIRST, prompt(4, 9)
    engine.save(told)
    staged = engine.store.stage([*told, *answer], engine.namespace, extends=len(told))
    rows = engine.book.computed([*told, *answer], len(told) + len(answer), "")
    fresh = packed(pick(rows, positions_of(staged.fresh)), staged.sizes, engine.namespace.layout)
    grown = engine.store.commit(staged.id, Buffer(fresh))
    other = engine.save(EDITED)
    assert grown
    assert other
    for node, said in ((grown, True), (other, False)):
        found = show_node(engine.store, node)
        assert found["answer_tokens"] == (len(answer) if said else 0)
        table = show.summary_table(found)
        cells = [str(cell) for column in table.columns for cell in column.cells]
        assert ("the last 9 tokens; those before are the prompt" in cells) is said
        page = Page(seen(engine.store, f"/nodes/{node}").text).text
        assert ("200 + 9" in page) is said
        asked = protocol.Explain(node=node)
        head = next(iter(headline(questions.explain(engine.store, asked)["explanation"])))
        assert ("(9 of them, at the end, are its answer)" in str(head)) is said
    old = {name: value for name, value in found.items() if name != "answer_tokens"}
    assert show.summary_table(old).row_count == table.row_count, "of the release before"


def test_rows_behind_another_edit_are_not_continued(driver: Callable[..., Driver]) -> None:
    """The same tokens, in another context than the parent has them in."""
    engine = driver(policy="aggressive")
    later = [*EDITED[:150], *prompt(4, 5), *EDITED[156:]]
    ids = [engine.serve_and_save(tokens) for tokens in (FIRST, EDITED, later)]
    found = show_node(engine.store, ids[2] or "")
    assert found["parent"] == ids[1]
    assert len(found["contexts"]) == 2
    assert found["continued_rows"] == 150 - found["exact_rows"]


def test_many_contexts_cost_no_more_than_one_look_at_each(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may have claimed one for each row."""
    engine = driver(policy="aggressive")
    ids = [engine.serve_and_save(tokens) for tokens in (FIRST, EDITED, NEXT)]
    _, parent, node = (engine.store.tree.get(name or "") for name in ids)
    assert parent is not None
    assert node is not None
    claimed = [
        tuple(Context(at, digest, at + 1) for at in range(node.exact_rows, parent.length))
        for digest in (b"a", b"b")
    ]
    looks: list[int] = []

    def counted(contexts: Sequence[Context], length: int) -> tuple[Context, ...]:
        looks.append(length)
        return cut_contexts(contexts, length)

    monkeypatch.setattr(describe, "cut_contexts", counted)
    replace = msgspec.structs.replace
    one, other = replace(node, contexts=claimed[0]), replace(parent, contexts=claimed[1])
    assert describe.continued_rows(one, other) == 0
    assert len(looks) <= 8


def test_a_daemon_of_the_release_before_says_less(driver: Callable[..., Driver]) -> None:
    engine = driver()
    found = show_node(engine.store, engine.serve_and_save(FIRST) or "")
    for name in ("contexts", "continued_rows"):
        del found[name]
    assert list(show.parts(found))


@pytest.mark.parametrize(
    ("later", "shown"),
    [
        (EDITED, ("… ", 60)),
        ([*FIRST, *prompt(5, 30)], ("… ", 200)),
        ([*prompt(6, 40), *FIRST], ("", 0)),
        ([*FIRST[:60], *FIRST[80:]], ("", 0)),
    ],
    ids=["replaced", "continued", "in front", "nothing new"],
)
def test_a_list_shows_what_tells_a_prompt_from_its_parent(
    driver: Callable[..., Driver], later: list[int], shown: tuple[str, int]
) -> None:
    """Chats and templates begin alike."""
    engine = driver(policy="aggressive")
    engine.serve_and_save(FIRST)
    node = engine.serve_and_save(later)
    found = {one["id"]: one["preview"] for one in describe.list_nodes(engine.store, 9)}
    dots, start = shown
    assert found[node or ""] == dots + " ".join(map(str, later[start : start + 24]))
