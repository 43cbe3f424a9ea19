"""The JSON API against a real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Explain, ListRequests, ShowNode
from kvshare_store.observability.exposition import CONTENT_TYPE, exposition
from kvshare_store.plan import LONGEST_PATIENCE_S, LONGEST_S
from tests.support.daemons import ClientDriver
from tests.support.exposition import Exposed
from tests.support.page import BEARING, CHILD, EVIL, PARENT, TENANT, World, owned_world


def got(page: World, path: str, **query: Any) -> Any:
    answer = page.ask("GET", path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- questions ------------------------------------------------------------------------------------


def test_stats_are_those_of_the_daemon(page: World) -> None:
    with Client(page.daemon.config.home_path) as client:
        ours = client.stats()
    theirs = got(page, "/api/stats")
    for of_the_moment in ("daemon", "seconds", "leases", "health", "queue"):
        ours.pop(of_the_moment), theirs.pop(of_the_moment)
    assert theirs == ours
    assert (ours["nodes"], ours["hits_edited"], ours["misses"]) == (3, 1, 1)


def test_metrics_are_what_the_daemon_has_counted(page: World) -> None:
    answer = page.ask("GET", "/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    exposed = Exposed(answer.text)
    with Client(page.daemon.config.home_path) as client:
        counted = Exposed(exposition(client.stats()).decode())
    assert exposed.value("kvshare_nodes") == 3
    assert exposed.by("kvshare_tokens_total", "kind") == counted.by("kvshare_tokens_total", "kind")


def test_tenants_with_use_and_quota(page: World) -> None:
    plain, alice = got(page, "/api/tenants")
    assert (plain["tenant"], plain["nodes"]) == ("", 2)
    assert (alice["tenant"], alice["nodes"]) == (TENANT, 1)
    (space,) = alice["namespaces"]
    assert space["digest"] == page.space.for_tenant(TENANT).digest
    assert space["bytes"] == len(PARENT.encode()) * page.space.layout.row_bytes
    assert (space["quota"], space["nodes_quota"]) == (0, 0)
    assert "<td>no limit</td>" in page.ask("GET", "/tenants", headers={"accept": "text/html"}).text
    assert plain["bytes"] > space["bytes"], "parent and child share rows, but not all"


def test_a_tree_is_walked_from_where_it_begins(page: World) -> None:
    roots = got(page, f"/api/namespaces/{page.space.digest}/nodes")
    assert [(node["id"], node["children"]) for node in roots["nodes"]] == [(page.parent, 1)]
    assert (roots["total"], roots["next"]) == (1, "")
    below = got(page, f"/api/nodes/{page.parent}/children")
    (child,) = below["nodes"]
    assert (child["id"], child["parent"], child["children"]) == (page.child, page.parent, 0)
    assert child["added"] > 0 < child["removed"]


def test_nodes_come_in_pages(page: World) -> None:
    path = f"/api/namespaces/{page.space.digest[:9]}/nodes"
    whole = got(page, path, whole=True)
    assert [node["id"] for node in whole["nodes"]] == [page.child, page.parent], "the last first"
    first = got(page, path, whole=True, limit=1)
    assert (first["nodes"], first["total"]) == (whole["nodes"][:1], 2)
    second = got(page, path, whole=True, limit=1, after=first["next"])
    assert (second["nodes"], second["next"]) == (whole["nodes"][1:], "")


def test_one_node(page: World) -> None:
    node = got(page, f"/api/nodes/{page.child[:10]}")
    with Client(page.daemon.config.home_path) as client:
        shown = client.call(ShowNode(page.child))
    assert node == {name: shown[name] for name in node}
    assert node["text"] == CHILD
    assert node["path"] == [page.parent, page.child]
    assert "".join(e["added"] for e in node["edits"] if e["kind"] != "keep") == "14lock"


def test_a_prompt_beside_its_parent(page: World) -> None:
    found = got(page, f"/api/nodes/{page.child}/spans")["explanation"]
    assert "".join(part["text"] for part in found["parts"]) == CHILD
    assert "".join(part["text"] for part in found["donor_parts"]) == PARENT
    kinds = {part["kind"] for part in found["parts"]}
    assert kinds == {"exact", "edited", "recomputed"}
    taken = sum(part["stop"] - part["start"] for part in found["donor_parts"]
                if part["kind"] != "unused")  # fmt: skip
    assert taken == found["tokens"] - found["by_kind"]["recomputed"]
    unused = [part["text"] for part in found["donor_parts"] if part["kind"] == "unused"]
    assert unused[0] == "3", "the day that the child has changed"


def test_a_prompt_without_a_parent_is_beside_nothing(page: World) -> None:
    answer = page.ask("GET", f"/api/nodes/{page.parent}/spans")
    assert answer.status_code == 400
    assert "has no parent" in answer.json()["message"]
    beside = got(page, f"/api/nodes/{page.parent}/spans", donor=page.child)["explanation"]
    assert [one["node"] for one in beside["candidates"]] == [page.child]


def test_the_log_of_requests(page: World) -> None:
    with Client(page.daemon.config.home_path) as client:
        assert got(page, "/api/requests") == client.call(ListRequests())
    slow, quick = got(page, "/api/requests", slow=True)
    assert (slow["request"], slow["outcome"], quick["outcome"]) == (
        f"chat-{EVIL}",
        "edited",
        "miss",
    )
    (missed,) = got(page, "/api/requests", declined=True)
    assert (missed["reason"], missed["tenant"]) == ("empty_store", TENANT)


# --- what is wrong with a question ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/api/nodes/ffff", 404, "node"),
        ("/api/nodes/UPPER", 422, "request"),
        ("/api/nodes/" + "a" * 70, 422, "request"),
        ("/api/namespaces/ffff/nodes", 404, "namespace"),
        ("/api/namespaces/{digest}/nodes?limit=0", 422, "request"),
        ("/api/namespaces/{digest}/nodes?after=yesterday", 404, "node"),
        ("/api/nodes/{child}/spans?policy=lax", 422, "request"),
        ("/api/requests?limit=many", 422, "request"),
        ("/api/nothing", 404, "request"),
        ("/api/purge", 405, "request"),
    ],
)
def test_bad_questions_are_told_why(page: World, path: str, status: int, kind: str) -> None:
    named = path.format(digest=page.space.digest, child=page.child)
    answer = page.ask("GET", named)
    assert (answer.status_code, answer.json()["error"]) == (status, kind)
    assert answer.json()["message"]


# --- what changes something, with the token -------------------------------------------------------


def sent(owned: World, path: str, **body: Any) -> httpx.Response:
    return owned.ask("POST", path, json=body, headers=BEARING)


@pytest.mark.parametrize(
    ("path", "field", "most"),
    [("/api/evict", "older_than", LONGEST_S), ("/api/purge", "patience", LONGEST_PATIENCE_S)],
)
def test_no_more_seconds_than_a_message_holds(
    owned: World, path: str, field: str, most: float
) -> None:
    for seconds, status in ((most, 200), (1.01 * most, 422)):
        body = {"tenant": TENANT, "dry_run": True, field: seconds}
        assert sent(owned, path, **body).status_code == status


def test_explain_by_text_and_by_tokens(owned: World) -> None:
    prompt = PARENT.replace("bells", "lamps")
    by_text = sent(owned, "/api/explain", text=prompt, namespace=owned.space.digest).json()
    by_tokens = sent(
        owned, "/api/explain", tokens=owned.tokens(prompt), namespace=owned.space.digest
    ).json()
    assert by_text == by_tokens
    explained = by_text["explanation"]
    assert "".join(part["text"] for part in explained["parts"]) == prompt
    assert explained["by_kind"]["exact"] == prompt.index("lamps")
    with Client(owned.daemon.config.home_path) as client:
        same = client.call(Explain(text=prompt, namespace=owned.space.digest))
    assert explained["candidates"] == same["explanation"]["candidates"]


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({}, 400, "name one prompt"),
        ({"text": "a", "tokens": [1]}, 400, "name one prompt"),
        ({"text": "a"}, 404, "2 namespaces are here"),
        ({"tokens": [-1]}, 422, "greater than or equal to 0"),
        ({"tokens": [2**31]}, 422, "less than or equal to"),
        ({"tokens": "1, 2"}, 422, "valid list"),
        ({"text": "a", "colour": "red"}, 422, "Extra inputs"),
        ({"request": "nobody"}, 404, "no logged request"),
    ],
)
def test_bad_prompts_are_told_why(
    owned: World, body: dict[str, Any], status: int, why: str
) -> None:
    answer = sent(owned, "/api/explain", **body)
    assert (answer.status_code, why in answer.json()["message"]) == (status, True), answer.text


def test_limits_of_tenants(owned: World) -> None:
    (_, alice) = owned.ask("GET", "/api/tenants", headers=BEARING).json()
    (space,) = alice["namespaces"]
    assert (space["nodes"], space["nodes_quota"]) == (1, 1000)
    assert (space["plans_per_second"], space["saves_per_second"]) == (5000.0, 2500.5)
    page = owned.ask("GET", "/tenants", headers=BEARING | {"accept": "text/html"})
    assert '<td class="number">1 of 1,000</td>' in page.text
    assert "<td>5,000 plans, 2,500.5 saves</td>" in page.text


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A daemon of this file alone, which changes it."""
    with owned_world(tmp_path_factory.mktemp("own")) as made:
        yield made


def test_pin_evict_unpin_purge(own: World) -> None:
    """In the order in which somebody would find out what each does."""
    pinned = sent(own, f"/api/nodes/{own.child[:12]}/pin")
    assert (pinned.status_code, pinned.json()) == (200, own.child)
    kept = sent(own, "/api/evict", nodes=[own.child]).json()
    assert (kept["nodes"], kept["pinned"]) == ([], [own.child])
    assert sent(own, f"/api/nodes/{own.child}/unpin").json() == own.child
    would = sent(own, "/api/evict", nodes=[own.child], dry_run=True).json()
    gone = sent(own, "/api/evict", nodes=[own.child]).json()
    assert would == gone
    assert gone["nodes"] == [own.child]
    assert sent(own, "/api/evict").json()["error"] == "config", "all is not evicted by mistake"
    both = sent(own, "/api/purge", namespace=own.space.digest, tenant=TENANT)
    assert both.status_code == 400
    assert sent(own, "/api/purge", lineage="ab", tenant=TENANT).status_code == 400
    assert sent(own, "/api/purge", lineage="f" * 32).json()["error"] == "node"
    (lineage,) = sent(own, "/api/purge", lineage=own.parent[:12], dry_run=True).json()
    assert (lineage["nodes"], lineage["ids"]) == (1, [own.parent])
    would = sent(own, "/api/purge", tenant=TENANT, dry_run=True).json()
    (purged,) = sent(own, "/api/purge", tenant=TENANT, patience=5.0).json()
    assert would[0]["nodes"] == purged["nodes"] == 1
    assert purged["remaining"] == []
    left = own.ask("GET", "/api/tenants", headers=BEARING).json()
    assert [(one["tenant"], one["nodes"]) for one in left] == [("", 1)]


def test_a_pool_is_no_tenant(own: World) -> None:
    """It has no limits, and a purge of what has no tenant does not mean it."""
    with Client(own.daemon.config.home_path) as client:
        pool = ClientDriver(client, own.space.in_pool("house"))
        node = pool.save(list(range(100)))
    found = own.ask("GET", "/api/tenants", headers=BEARING).json()
    (listed,) = [one for one in found if one["pool"]]
    assert (listed["pool"], listed["tenant"], listed["nodes"]) == ("house", "", 1)
    assert listed["namespaces"][0]["nodes_quota"] == 0
    for path, told in (("/tenants", "pool house"), (f"/nodes/{node}", "<dt>Pool</dt>"),
                       (f"/namespaces/{pool.namespace.digest}", "pool house")):  # fmt: skip
        page = own.ask("GET", path, headers=BEARING | {"accept": "text/html"})
        assert told in page.text, path
    done = sent(own, "/api/purge", tenant="", patience=5.0).json()
    assert [one["namespace"] for one in done] == [own.space.digest]
    left = own.ask("GET", "/api/tenants", headers=BEARING).json()
    assert [one["pool"] for one in left] == ["house"]


def test_the_server_ends_with_its_daemon(own: World) -> None:
    """In good order and at once. The last test of this file."""
    with httpx.Client(base_url=own.url) as kept:
        assert kept.get("/healthz").json() == "ok"  # and the connection stays open
        assert own.daemon.end() == 0
        with pytest.raises(httpx.ConnectError):
            own.ask("GET", "/healthz")
