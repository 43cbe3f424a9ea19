"""What the page and the API show of scored answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest

from kvshare_store.http.chart import band
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.state import NodeState
from kvshare_store.quality import quality as judging
from kvshare_store.quality.ladder import Terms
from kvshare_store.quality.score import Score
from tests.save.test_scores import WHOLE, answer, given
from tests.save.test_scores import said as looked
from tests.save.test_second_looks import edited
from tests.support.oracle import Driver, prompt
from tests.support.page import EVIL, Page, seen

Open = Callable[..., Driver]
BOUND: dict[str, Any] = {"quality_bound": 0.02, "policy": "aggressive"}


@pytest.fixture
def engine(driver: Open) -> Driver:
    return driver(**BOUND)


def shown(engine: Driver, path: str = "/quality", **query: Any) -> Page:
    found = seen(engine.store, f"{path}?{urlencode(query)}")
    assert found.status_code == 200, found.text
    read = Page(found.text)
    assert len(read.ids) == len(set(read.ids))
    return read


def told(engine: Driver, **query: Any) -> Any:
    found = seen(engine.store, f"/api/quality?{urlencode(query)}")
    assert found.status_code == 200, found.text
    return found.json()


def known(engine: Driver, space: Namespace) -> str:
    """The digest of a namespace with a prompt, so that it has a name."""
    saved = Driver(engine.store, space, engine.book)
    saved.save(prompt(9, 20))
    return space.digest


def teach(
    engine: Driver,
    policy: str = "faithful",
    count: int = 400,
    *,
    bad: int = 0,
    digest: str = "",
    kind: str = "replace",
    family: str = "0a1b2c3d",
    control: bool = False,
) -> str:
    """Score so many answers of a class, of which the last `bad` ones diverge. Returns its name."""
    digest = digest or engine.namespace.digest
    traffic = f"{digest[:12]}/{family}/{kind}"
    for at in range(count):
        regrets = (0.0, 1.5 if at >= count - bad else 0.0)
        engine.store.quality.observe(
            Score(
                namespace=digest,
                traffic=traffic,
                policy="off" if control else policy,
                regrets=regrets,
                greedy=True,
                control=control,
            )
        )
    return traffic


def lines(read: Page) -> str:
    return re.sub(r"\s+", " ", read.text)


# --- what is known --------------------------------------------------------------------------------


def test_an_empty_store_has_nothing_to_say(engine: Driver) -> None:
    said = lines(shown(engine))
    assert "Bound: 2.0 %." in said
    assert "No edited answer was scored yet" in said
    assert "No control was scored yet" in said
    assert "none is known to be worse or not" in said, "nothing scored is no all-clear"
    found = told(engine)
    assert (found["classes"], found["floors"], found["worst"], found["total"]) == ([], [], [], 0)
    assert (found["policy"], found["bound"], found["confidence"]) == ("aggressive", 0.02, 0.95)


def test_a_class_is_there_before_its_first_score(engine: Driver) -> None:
    donor = prompt(1, 300)
    engine.save(donor)
    engine.serve([*donor[:100], *prompt(5, 3), *donor[103:]])
    said = lines(shown(engine))
    assert "Classes of traffic1" in said
    assert "of them with scores0" in said
    assert "No edited answer was scored yet" in said
    assert "exact rung" in said
    tried = (
        r"faithful tried by 2.0 % of requests -? ?not known yet0 of about 304, in 1,517 requests"
    )
    assert re.search(tried, said)
    assert "band: its limits; dashes: the bound" in said
    found = told(engine)
    (one,) = found["classes"]
    assert (found["total"], found["scored"], one["known"]["needed"]) == (1, 0, 304)
    of = {"namespace": engine.namespace.digest, "traffic": one["known"]["traffic"]}
    assert "No answer was scored under it yet: 0 of about 304, in 1,517 requests or more." in lines(
        shown(engine, "/quality/class", **of)
    )


def test_a_rate_of_few_scores_or_controls_is_not_shown(engine: Driver) -> None:
    traffic = teach(engine, count=3)
    teach(engine, count=1, bad=1, control=True)
    for path in ("/quality", "/quality/class"):
        of = {"namespace": engine.namespace.digest, "traffic": traffic}
        said = lines(shown(engine, path, **(of if path.endswith("class") else {})))
        assert "too few scores (3, 1 control)" in said
        assert "\N{MINUS SIGN}100.0 %" not in said


@pytest.mark.parametrize("policy", ["off", "exact"])
def test_a_policy_without_edited_rows_has_nothing_to_say(driver: Open, policy: str) -> None:
    engine = driver(quality_bound=0.02, policy=policy)
    teach(engine)
    teach(engine, control=True)
    assert told(engine)["classes"] == []
    assert "No edited answer was scored yet" in lines(shown(engine))


def test_without_a_bound_it_is_only_reported(driver: Open) -> None:
    engine = driver()
    known(engine, engine.namespace)
    traffic = teach(engine, "aggressive", 50, bad=50)
    for read in (shown(engine), shown(engine, "/quality/class", namespace=engine.namespace.digest,
                                      traffic=traffic)):  # fmt: skip
        said = lines(read)
        assert "No bound is set" in said
        assert "aggressive configured" in said
        assert "100.0 % (" in said
        assert "beyond" not in said.replace("Beyond the floor", "")


def test_each_class_says_its_rung_and_why(engine: Driver) -> None:
    known(engine, engine.namespace)
    good = teach(engine, "faithful")
    teach(engine, "aggressive", 40, bad=40, kind="insert")
    teach(engine, "faithful", 40, bad=40, kind="insert")
    teach(engine, count=300, control=True)
    teach(engine, "faithful", 2500, kind="delete")
    teach(engine, "faithful", 8, bad=8, kind="delete")  # all that was known is in doubt
    first, *_ = told(engine)["classes"]
    assert first["kind"] == "replace", "of the others less is known"
    assert (first["known"]["rung"], first["known"]["tried"]) == ("faithful", "balanced")
    said = lines(shown(engine))
    by_kind = dict(re.findall(r"(\w+) in family 0a1b2c3d(.*?)(?=\w+ in family|Floor)", said))
    assert "faithful rung 0.0 % (" in by_kind["replace"]
    assert "within" in by_kind["replace"]
    assert re.search(r"balanced tried by \d+\.\d % of requests", by_kind["replace"])
    assert by_kind["insert"].count("beyond") == 2
    assert "exact rung" in by_kind["insert"]
    assert "exact rung" in by_kind["delete"]
    assert "within the bound" in by_kind["delete"]
    assert told(engine)["floors"][0]["known"]["greedy"] == 300
    assert said.count("0.0 % (0.0 to 1.5 %)") == 1, "what the controls show"
    digest = engine.namespace.digest
    one = lines(shown(engine, "/quality/class", namespace=digest, traffic=good))
    assert "Its rungfaithful" in one
    assert "text was replaced" in one
    doubted = good.replace("replace", "delete")
    other = lines(shown(engine, "/quality/class", namespace=digest, traffic=doubted))
    assert "Its evidence began anew 1 time" in other


def test_a_class_that_is_silent_says_so(engine: Driver) -> None:
    known(engine, engine.namespace)
    traffic = teach(engine, "faithful")
    for _ in range(1000):
        engine.store.quality.rung(engine.namespace.digest, traffic, "aggressive")
    (one,) = told(engine)["classes"]
    assert (one["silent"], one["known"]["rung"]) == (True, "exact")
    page = shown(engine, "/quality/class", namespace=engine.namespace.digest, traffic=traffic)
    assert "requests came without a score" in lines(page)
    assert "not known" in lines(shown(engine))


def test_a_class_is_shown_apart_by_share_computed_and_by_distance(engine: Driver) -> None:
    known(engine, engine.namespace)
    digest = engine.namespace.digest
    traffic = teach(engine, "faithful", 3)
    for at in range(40):
        computed, distance, regret = (0.05, 5, 1.5) if at < 10 else (0.9, 4000, 0.0)
        score = Score(namespace=digest, traffic=traffic, policy="faithful", regrets=(regret,),
                      greedy=True, control=False, computed=computed, distance=distance)  # fmt: skip
        engine.store.quality.observe(score)
    (policy,) = told(engine)["classes"][0]["known"]["policies"]
    assert [(one["start"], one["stop"], one["greedy"]) for one in policy["distance"]] == [
        (0, 64, 10), (1024, None, 30)
    ]  # fmt: skip
    near, far = policy["distance"]
    assert (near["diverged"][0], far["diverged"][0], policy["greedy"]) == (1.0, 0.0, 43)
    said = lines(shown(engine, "/quality/class", namespace=digest, traffic=traffic))
    assert re.search(r"0 to 63 tokens\s?10\s?100\.0 %", said)
    assert re.search(r"1,024 or more tokens\s?30\s?0\.0 %", said)
    assert re.search(r"0 to 9 %\s?10", said)
    assert re.search(r"50 or more %\s?30", said)


# --- over time ------------------------------------------------------------------------------------


def test_the_last_day_is_drawn_and_told(engine: Driver) -> None:
    known(engine, engine.namespace)
    traffic = teach(engine, "faithful", 40, bad=1)
    read = shown(engine)
    (drawing,) = [found for tag, found in read.elements if tag == "svg"]
    assert "faithful, extra divergence since" in (drawing["aria-label"] or "")
    tags = [tag for tag, _ in read.elements]
    assert [tags.count(tag) for tag in ("polygon", "polyline", "line")] == [1, 1, 1]
    (plain,) = told(engine)["classes"]
    assert plain["known"]["policies"][0]["trend"] == []
    (full,) = told(engine, trends=True)["classes"]
    (policy,) = full["known"]["policies"]
    assert policy["trend"][-1][1:] == [40, policy["extra"]]
    whole = shown(engine, "/quality/class", namespace=engine.namespace.digest, traffic=traffic)
    assert "scored so far" in whole.text


def points(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def test_a_band_stays_within_its_drawing() -> None:
    trend = [(100.0, 1, (0.0, -1.0, 1.0)), (150.0, 20, (0.1, -0.2, 0.5)),
             (200.0, 99, (0.01, -0.01, 0.03))]  # fmt: skip
    drawn = band(trend, 0.02, 300.0, 600, 160)
    assert drawn is not None
    assert (drawn.start, drawn.stop) == (100.0, 300.0)
    assert drawn.top == pytest.approx(0.039)
    assert drawn.bound == pytest.approx(160 * (1 - 0.02 / 0.039))
    line, area = points(drawn.line), points(drawn.area)
    assert [x for x, _ in line] == [0, 150, 150, 300, 300, 600], "each is true until the next"
    assert [y for _, y in line][-1] == pytest.approx(160 * (1 - 0.01 / 0.039), abs=0.1)
    assert {y for _, y in area} >= {0.0, 160.0}, "what is above and below is cut off"
    assert all(0 <= x <= 600 and 0 <= y <= 160 for x, y in [*line, *area])


def test_a_band_of_one_moment_a_day_ago_or_just_now() -> None:
    for at in (100.0, 100.0 - 9e9, 200.0):
        drawn = band([(at, 1, (0.0, 0.0, 1.0))], 0.0, 100.0, 160, 36)
        assert drawn is not None
        assert drawn.bound is None
        assert all(0 <= x <= 160 for x, _ in points(drawn.area))
    assert band([], 0.1, 100.0, 160, 36) is None


# --- the worst answers ----------------------------------------------------------------------------


def test_the_worst_answers_lead_to_their_prompts(driver: Open) -> None:
    engine = driver(second_look_control=0.0)
    tokens = edited(engine)
    stored = answer(engine, tokens, request=EVIL[:100])
    engine.store.requests.declined("late", 1)
    look = given(engine)
    assert look is not None
    looked(engine, look, WHOLE)
    assert told(engine)["classes"][0]["example"] == stored.id
    (worst,) = told(engine)["worst"]
    assert (worst["node"], worst["request"], worst["diverged"]) == (stored.id, "", 2)
    assert worst["regret"] == pytest.approx(sum(WHOLE) / len(WHOLE))
    read = shown(engine)
    links = [found["href"] for tag, found in read.elements if tag == "a"]
    assert f"/nodes/{stored.id}?policy=aggressive" in links
    assert f"text was replaced, as in {stored.id[:12]}" in lines(read)
    node = seen(engine.store, f"/nodes/{stored.id}?policy=aggressive")
    assert "differs from full compute from token 3 on" in Page(node.text).text
    (one,) = {link for link in links if (link or "").startswith("/quality/class")}
    assert f"/nodes/{stored.id}" in seen(engine.store, str(one)).text
    engine.store.clear()
    assert told(engine)["worst"][0]["node"] == told(engine)["classes"][0]["example"] == ""
    assert "no longer stored" in lines(shown(engine))
    assert "text was replaced; no such prompt is known to be stored" in lines(shown(engine))


def verdict_on(engine: Driver, at: int, regret: float, *, greedy: bool = True) -> None:
    digest = engine.namespace.digest
    score = Score(namespace=digest, traffic=f"{digest[:12]}/0a/{at}", policy="faithful",
                  regrets=(regret,), greedy=greedy, control=False)  # fmt: skip
    engine.store.verdicts.scored(score, {f"edited {at}", f"exact {at}"}, f"request {at}")


def test_each_of_the_worst_is_listed_once_greedy_ones_first(engine: Driver) -> None:
    for at in range(30):
        verdict_on(engine, at, at / 10)
    verdict_on(engine, 99, 50.0, greedy=False)
    verdict_on(engine, 98, 0.0)
    found = told(engine)["worst"]
    assert [round(10 * one["regret"]) for one in found] == list(range(29, 9, -1))
    digest = engine.namespace.digest
    (sampled,) = told(engine, traffic=f"{digest[:12]}/0a/99")["worst"]
    assert (sampled["greedy"], sampled["regret"]) == (False, 50.0)
    assert told(engine, traffic=f"{digest[:12]}/0a/98")["worst"] == []


# --- explanations ---------------------------------------------------------------------------------


def explained(driver: Open, **settings: Any) -> str:
    """The page that explains an edited request of a source that is new."""
    engine = driver(log_prompts=True, **settings)
    donor = prompt(1, 300)
    engine.save(donor)
    engine.serve([*donor[:100], *prompt(5, 3), *donor[103:]], source=b"ann-hash")
    found = seen(engine.store, "/explain?request=1")
    assert found.status_code == 200
    return lines(Page(found.text))


def test_an_explanation_says_the_rung_and_whose_rows_are_taken(driver: Open) -> None:
    text = explained(driver, **BOUND, unconfirmed_share=0.5)
    assert re.search(r"Class \w+/\w+/replace is at exact under a quality_bound of 2.0 %", text)
    assert "2.0 % of its requests get faithful. Its quality" in text
    assert "found bysourcewhy" in text
    capped = explained(driver, unconfirmed_share=0.5)
    assert "quality_bound" not in capped
    assert "unconfirmed (150 tokens)" in capped
    assert "only one other source has sent" in capped


def test_a_prompt_is_shown_as_it_was_served_and_what_a_bound_says_now(driver: Open) -> None:
    engine = driver(policy="aggressive")
    donor = prompt(1, 300)
    engine.serve_and_save(donor)
    node = engine.serve_and_save([*donor[:100], *prompt(5, 3), *donor[103:]])
    engine.store.quality.reload(Terms(0.02, 0.05))

    def read(query: str = "") -> tuple[str, str]:
        found = seen(engine.store, f"/nodes/{node}{query}")
        chosen = re.search(r'<option value="(\w*)" selected>', found.text)
        return lines(Page(found.text)), chosen[1] if chosen else ""

    text, chosen = read()
    assert "under policy aggressive, which it was served under" in text
    assert re.search(r"another policy now: class \w+/\w+/replace is at exact under", text)
    assert ("recomputed 4" in text, chosen) == (True, "aggressive")
    now, chosen = read("?policy=")
    assert "under policy exact (it was served under aggressive)" in now
    assert ("recomputed 200" in now, chosen) == (True, "")


def test_a_request_that_is_planned_otherwise_says_so_first(driver: Open) -> None:
    """Here since its donor is gone."""
    engine = driver(log_prompts=True)
    first = engine.save(prompt(1, 300))
    engine.serve(prompt(1, 300))
    plan = "The plan Then: 299 tokens from "
    assert f"{plan}{str(first)[:12]}, 1 recomputed. Now the same:" in lines(
        Page(seen(engine.store, "/explain?request=1").text)
    )
    engine.store.clear()
    engine.save(prompt(2, 300))
    assert "Now another plan, since the store holds other prompts:" in lines(
        Page(seen(engine.store, "/explain?request=1").text)
    )


def test_a_logged_request_says_the_bound_also_without_its_text(driver: Open) -> None:
    engine = driver(**BOUND | {"quality_bound": 1e-9})
    donor = prompt(1, 300)
    engine.save(donor)
    engine.serve([*donor[:100], *prompt(5, 3), *donor[103:]])
    engine.serve([*prompt(5, 3), *donor[3:]])
    table = lines(Page(seen(engine.store, "/requests").text))
    assert "exact (quality_bound)" in table
    assert "miss: quality_bound" in table
    found = seen(engine.store, "/api/requests").json()
    assert [one["steering"]["rung"] for one in found] == ["exact", "exact"]
    for number in (1, 2):
        text = lines(Page(seen(engine.store, f"/explain?request={number}").text))
        assert re.search(r"Class \w+/\w+/replace is at exact under a quality_bound of 0.0 %", text)


# --- whose it is ----------------------------------------------------------------------------------


def test_names_are_shown_as_text(driver: Open) -> None:
    engine = driver(**BOUND)
    space = Namespace("org/<b>m</b>", engine.namespace.layout, tenant=EVIL)
    traffic = teach(engine, digest=known(engine, space))
    teach(engine, digest=space.digest, control=True)
    for read in (shown(engine), shown(engine, "/quality/class", namespace=space.digest,
                                      traffic=traffic)):  # fmt: skip
        assert EVIL in read.text
        assert "org/<b>m</b>" in read.text


def test_a_namespace_sees_its_own(engine: Driver) -> None:
    ours = known(engine, engine.namespace)
    theirs = known(engine, engine.namespace.for_tenant("alice"))
    mine = teach(engine, digest=ours)
    teach(engine, digest=theirs, kind="insert")
    teach(engine, digest=theirs, control=True, count=7)
    assert {one["space"]["tenant"] for one in told(engine)["classes"]} == {"", "alice"}
    found = told(engine, namespace=theirs[:20])
    assert [one["kind"] for one in found["classes"]] == ["insert"]
    assert (found["total"], found["floors_total"]) == (1, 1)
    assert told(engine, namespace=ours)["floors"] == []
    assert ours[:12] not in shown(engine, namespace=theirs).text
    for path in ("/quality?namespace=ffff", "/api/quality?namespace=ffff",
                 f"/quality/class?namespace={theirs}&traffic={mine}"):  # fmt: skip
        assert seen(engine.store, path).status_code == 404
    engine.store.purge(theirs)
    assert {one["space"]["tenant"] for one in told(engine)["classes"]} == {""}
    assert "alice" not in shown(engine).text


def classes_linked(path: str, engine: Driver) -> list[str]:
    """The classes that a page leads to, all of which can be looked at."""
    found = seen(engine.store, path)
    assert found.status_code == 200, found.text
    to = [at["href"] or "" for tag, at in Page(found.text).elements if tag == "a"]
    links = [link for link in to if link.startswith("/quality/class")]
    for link in links:
        assert seen(engine.store, link).status_code == 200, link
    return links


def test_the_class_of_a_prompt_on_rows_of_a_pool_is_that_of_its_namespace(engine: Driver) -> None:
    """Its name begins as the pool's digest does."""
    known(engine, engine.namespace.in_pool("shop"))
    stored, digest = engine.save(prompt(3, 60)), engine.namespace.digest
    assert stored is not None
    pool = engine.namespace.in_pool("shop").digest
    score = Score(namespace=digest, traffic=f"{pool[:12]}/0a/insert", policy="faithful",
                  regrets=(1.0,), greedy=True, control=False)  # fmt: skip
    engine.store.quality.observe(score)
    engine.store.verdicts.scored(score, {stored}, "")
    (link,) = classes_linked(f"/nodes/{stored}", engine)
    assert f"namespace={digest[:12]}" in link


def test_a_namespace_without_prompts_keeps_what_was_learned_and_its_page(engine: Driver) -> None:
    digest = "ab" * 32
    traffic = teach(engine, digest=digest)
    assert traffic.replace("/", "%2F") in classes_linked("/quality", engine)[0]
    assert told(engine, namespace=digest)["total"] == 1
    assert f"/namespaces/{digest}" not in seen(engine.store, "/quality").text, "there is none"


@pytest.mark.parametrize(
    "query", ["namespace=UPPER", "start=-1", "limit=0", "limit=201", "traffic=" + "x" * 200]
)
def test_bad_questions_are_refused(engine: Driver, query: str) -> None:
    assert seen(engine.store, f"/api/quality?{query}").status_code == 422


# --- what it costs --------------------------------------------------------------------------------


def test_the_first_view_is_cheap(engine: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many classes and nodes there are: it looks at no node, and reports a page of
    classes."""
    for at in range(300):
        teach(engine, count=1 + at % 5, family=f"{at:08x}", digest=f"{at % 3}" * 64)
    for at in range(80):
        teach(engine, count=1, control=True, digest=f"{at:02x}" * 32)
    asked = []
    report = judging.report_class
    monkeypatch.setattr(
        judging,
        "report_class",
        lambda *of: asked.append(of[1]) or report(*of),  # type: ignore[func-returns-value]
    )

    def refuse(*_: Any) -> Any:
        raise AssertionError("every node was looked at")

    monkeypatch.setattr(DeltaTree, "__iter__", refuse)
    monkeypatch.setattr(NodeState, "of_namespace", refuse)
    said = lines(shown(engine))
    assert len(asked) == 25
    assert "These are the 25 of 300 classes" in said
    assert "The 50 of 80 namespaces" in said


def test_the_list_goes_on_until_its_end(engine: Driver) -> None:
    for at in range(60):
        teach(engine, count=1 + at % 5, family=f"{at:08x}")
    path, found = "/quality", list[str]()
    for _ in range(3):
        text = seen(engine.store, path).text
        found += re.findall(r"in family <span class=\"id\">(\w+)<", text)
        following = [f["href"] for tag, f in Page(text).elements
                     if tag == "a" and "start=" in (f["href"] or "")]  # fmt: skip
        path = f"/quality{following[0]}" if following else ""
    assert path == ""
    assert sorted(found) == [f"{at:08x}" for at in range(60)]
    assert "There are no more" in seen(engine.store, "/quality?start=99").text


def test_it_is_plain_json(engine: Driver) -> None:
    teach(engine, count=3)
    verdict_on(engine, 1, 0.5)
    found = told(engine, trends=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
