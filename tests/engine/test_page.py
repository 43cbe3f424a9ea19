"""The daemon's page in a real browser, behind a real engine: a hit is seen, explained, and its
tenant purged."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.engine.harness import SHARED, Engine
from tests.engine.pictures import FOLDER, Pictures, pictures, serve, settings, tab
from tests.http.test_browser import DESK, follow, text
from tests.support.browser import Tab
from tests.support.page import page_url

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

__all__ = ["pictures", "tab"]

SETTINGS = SHARED | {"kvshare": settings(SHARED["kvshare"])}
SECONDS = 125.0 if FOLDER else 0.0
"""How long the engine serves requests before the overview is looked at."""
TENANT = "the bike shop"
CATALOGUE = "".join(f"Bike {n} costs {n * 37} francs and weighs {n} kg. " for n in range(5, 15))
EARLIER = f"You answer for a bike shop. Today: 3 May. {CATALOGUE}Do you sell bells?"
LATER = EARLIER.replace("3 May", "4 June").replace("sell bells", "repair lamps")
KINDS = ("exact", "continued", "edited", "recomputed")
COLUMNS = ("request", "ago", "outcome", "tokens", *KINDS[:3], "cached", KINDS[3])


def texts(tab: Tab, selector: str) -> list[str]:
    """What the elements say that a selector finds, without the space around it."""
    said: list[str] = tab.run(
        f"[...document.querySelectorAll({selector!r})].map(one => one.innerText.trim())"
    )
    return said


def legend(tab: Tab, section: str) -> dict[str, int]:
    """Tokens by kind in a section's legend."""
    items = texts(tab, f"[aria-labelledby={section}] .legend li")
    found = [re.fullmatch(r"(.+?) ([\d,]+)\b.*", item, re.DOTALL) for item in items]
    return {one[1]: int(one[2].replace(",", "")) for one in found if one}


def test_a_hit_is_seen_explained_and_its_tenant_purged(
    engine: Engine, encode: Callable[[str], list[int]], tab: Tab, pictures: Pictures
) -> None:
    engine.store(encode(EARLIER), salt=TENANT)
    engine.forget()
    answer = engine.store(encode(LATER), salt=TENANT)
    kinds = {kind: answer.said[kind] for kind in KINDS}
    assert kinds["edited"] > len(encode(LATER)) // 2
    tab.look(**DESK)
    tab.open(page_url(engine.home) + "/")
    assert "Stored prompts\n2" in text(tab)

    follow(tab, "Requests")
    newest = texts(tab, "tbody tr:first-child > *")
    row = dict(zip(COLUMNS, newest, strict=False))
    assert (row["outcome"], newest[-1]) == ("edited", TENANT)
    assert {kind: int(row[kind]) for kind in KINDS} == kinds

    follow(tab, row["request"])
    assert kinds.items() <= legend(tab, "logged").items()
    assert answer.said["donor"][:12] in text(tab)
    follow(tab, answer.said["donor"][:12])
    assert "Do you sell bells?" in text(tab)
    (child,) = texts(tab, "[aria-label=Children] tbody th a")
    follow(tab, child)
    assert legend(tab, "beside")["edited"] > kinds["edited"] // 2
    pictures.take(tab, "prompt", "#beside")
    tab.look(**DESK)

    follow(tab, "Tenants")
    follow(tab, f"Purge {TENANT}…")
    follow(tab, "Purge for good")
    assert "Removed for good" in text(tab)
    assert tab.complaints == []
    engine.forget()
    assert engine.ask(encode(LATER), salt=TENANT).said["reused"] == 0


def test_the_overview_shows_what_was_reused(
    engine: Engine, encode: Callable[[str], list[int]], tab: Tab, pictures: Pictures
) -> None:
    before = engine.client.stats()["lookups"]
    served = serve(engine, encode, SECONDS)
    stats = engine.stats()
    assert stats["lookups"] - before == served
    tab.look(**DESK)
    tab.open(page_url(engine.home) + "/")
    reused = sum(stats[f"tokens_reused_{kind}"] for kind in KINDS[:3])
    assert reused > 0
    assert f"Requests\n{stats['lookups']:,}" in text(tab)
    assert f"Tokens reused\n{reused:,}" in text(tab)
    assert tab.complaints == []
    pictures.take(tab, "overview")
