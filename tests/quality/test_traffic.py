"""Into which class a request falls, when it is planned and when its answer is scored."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest

from kvshare_store.lookup.align import align
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Edit, edit_script
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.plan.spans import Span
from kvshare_store.quality.score import Score
from kvshare_store.quality.traffic import PlannedTraffic, kind_of, traffic_of

DONOR = list(range(1000, 1100))
QUESTION = list(range(5000, 5012))
ANSWER = list(range(7000, 7020))


def script(request: list[int], donor: list[int]) -> tuple[Edit, ...]:
    ours, theirs = np.asarray(request, np.int32), np.asarray(donor, np.int32)
    return edit_script(align(ours, theirs), len(theirs), ours)


def make_node(tokens: list[int], parent: Node | None = None, namespace: str = "n") -> Node:
    array = np.asarray(tokens, np.int32)
    return Node(
        id=node_id(namespace, array, parent is None),
        namespace=namespace,
        token_bytes=array.tobytes(),
        parent=parent.id if parent else None,
        edits=script(tokens, parent.tokens.tolist()) if parent else (),
        segments=(Span(0, len(tokens), 0, 0, 0),),
        blocks=("ab" * 32,),
        exact_rows=0 if parent else len(tokens),
        generation=0 if parent is None else 1,
    )


def edited(at: int, removed: int, inserted: int) -> list[int]:
    return [*DONOR[:at], *range(9000, 9000 + inserted), *DONOR[at + removed :]]


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (DONOR, "append"),
        (DONOR + QUESTION, "append"),
        (DONOR[:60] + QUESTION, "append"),
        (edited(40, 0, 3), "insert"),
        (edited(40, 3, 0), "delete"),
        (edited(40, 3, 3), "replace"),
        (edited(0, 1, 1), "replace"),
        (edited(40, 3, 3) + QUESTION, "replace"),
        ([*edited(40, 2, 2)[:44], 9100, *DONOR[44:]], "replace"),
        ([*edited(40, 2, 2)[:60], 9100, *DONOR[60:]], "several"),
        (edited(95, 1, 1), "append"),
    ],
)  # fmt: skip
def test_the_kind_of_edit(request_: list[int], kind: str) -> None:
    assert kind_of(script(request_, DONOR), len(request_)) == kind


@pytest.mark.parametrize("donor", [DONOR, DONOR + QUESTION + ANSWER])
@pytest.mark.parametrize("change", [(40, 0, 3), (40, 3, 0), (40, 3, 3)])
def test_answers_on_both_sides_change_no_kind(donor: list[int], change: tuple[int, ...]) -> None:
    prompt = edited(*change) + QUESTION[:6] + [6000]
    node = prompt + ANSWER[:5] + [8000] + ANSWER[6:]
    planned = kind_of(script(prompt, DONOR + QUESTION), len(prompt))
    assert planned == kind_of(script(node, donor), len(prompt)) != "append"


def test_a_plan_and_its_score_are_of_one_class() -> None:
    tree, donor = DeltaTree(), make_node(DONOR + QUESTION)
    tree.add(donor)
    prompt = edited(50, 2, 2) + QUESTION
    planned = traffic_of(tree, donor, script(prompt, donor.tokens.tolist()), len(prompt))
    # meanwhile the donor grows by its answer, and the prompt by its own
    tree.remove(donor.id)
    longer = make_node(DONOR + QUESTION + ANSWER)
    node = make_node(prompt + ANSWER, longer)
    tree.add(longer)
    tree.add(node)
    assert PlannedTraffic().of(tree, node, len(prompt)) == planned
    assert planned.endswith("/replace")
    assert planned.isprintable()
    assert len(planned) < 40


def test_families_are_named_by_the_beginning_of_their_root() -> None:
    tree = DeltaTree()
    root, other = make_node(DONOR), make_node(DONOR[::-1])
    child = make_node(edited(50, 2, 2), root)
    for node in (root, other, child):
        tree.add(node)
    one = traffic_of(tree, root, (), 100)
    assert traffic_of(tree, child, (), 100) == one
    assert traffic_of(tree, other, (), 100) != one
    elsewhere = make_node(DONOR, namespace="m")
    family = traffic_of(DeltaTree(), elsewhere, (), 100).split("/")[1]
    assert family != one.split("/")[1]


def test_what_was_planned_goes_before_what_the_tree_says() -> None:
    tree, traffic = DeltaTree(), PlannedTraffic()
    node = make_node(edited(50, 2, 2) + ANSWER, make_node(DONOR))
    tree.add(node)  # its parent has left
    traffic.planned("m", node.tokens[:100], "another tenant's")
    own = traffic.of(tree, node, 100)
    assert own.endswith("/replace")
    traffic.planned("n", node.tokens[:100], "as planned")
    assert traffic.of(tree, node, 100) == "as planned"
    assert traffic.of(tree, node, 99) == own
    traffic.forget("m")
    assert traffic.of(tree, node, 100) == "as planned"
    traffic.forget("n")
    assert traffic.of(tree, node, 100) == own


def test_the_last_donor_of_a_class_is_remembered_until_a_purge() -> None:
    traffic = PlannedTraffic()
    tokens = make_node(DONOR).tokens
    assert traffic.donor("n", "t") == ""
    for donor in ("first", "last"):
        traffic.planned("n", tokens, "t", donor)
    traffic.planned("m", tokens, "t", "another tenant's")
    assert traffic.donor("n", "t") == "last"
    traffic.forget("n")
    assert (traffic.donor("n", "t"), traffic.donor("m", "t")) == ("", "another tenant's")


def test_remembered_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvshare_store.quality.traffic._REMEMBERED", 2)
    tree, traffic = DeltaTree(), PlannedTraffic()
    node = make_node(edited(50, 2, 2))
    traffic.planned("n", node.tokens, "first")
    for length in (98, 99):
        traffic.planned("n", node.tokens[:length], "later")
    assert traffic.of(tree, node, 100) != "first"
    assert traffic.of(tree, node, 99) == "later"


def test_the_first_divergence_counts_for_greedy_requests() -> None:
    score = Score(
        namespace="n", traffic="t", policy="balanced", regrets=(0.0, 0.5, 0.1), greedy=True,
        control=False,
    )  # fmt: skip
    assert score.diverged == 1
    assert score.regret == pytest.approx(0.2)
    assert msgspec.structs.replace(score, greedy=False).diverged is None
    assert msgspec.structs.replace(score, regrets=(0.0,)).diverged is None
    assert msgspec.structs.replace(score, regrets=()).regret == 0.0


@pytest.mark.parametrize("regrets", [[-0.1], [float("nan")], [float("inf")], [0.0] * 17])
def test_regrets_that_are_none_are_refused(regrets: list[float]) -> None:
    fields = {"namespace": "n", "traffic": "t", "policy": "p", "greedy": True, "control": False}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**fields, "regrets": regrets}, Score)


def test_a_template_stays_one_family_when_its_prompts_become_roots() -> None:
    """A date near the beginning and a question at the end are others in each."""
    chance = np.random.default_rng(5)
    template = chance.integers(0, 30_000, 300).tolist()
    families = Counter[str]()
    for _ in range(200):
        prompt = list(template)
        prompt[16:19] = chance.integers(0, 30_000, 3).tolist()
        prompt += chance.integers(0, 30_000, 12).tolist()
        root = make_node(prompt)
        families[traffic_of(DeltaTree(), root, (), len(prompt)).split("/")[1]] += 1
    assert families.most_common(1)[0][1] > 180
