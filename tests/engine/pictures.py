"""Pictures of the page for the documents, and the traffic that is worth one.

`make screenshots` names the folder in PAGE_PICTURES and runs the tests that drive the page with a
real engine. Those then serve minutes of traffic; in the whole suite they serve a few requests, and
the pictures are thrown away. Their prompts are these.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Engine
from tests.support.browser import Tab, browser, chromium
from tests.support.needs import need

FOLDER = os.environ.get("PAGE_PICTURES", "")
"""Where the pictures go; empty: nobody wants them."""
SCREEN = {"width": 1000, "height": 620}
MOST_BYTES = 100_000
_PAUSE_S, _SWING_S = 0.5, 12.0

RULES = "You answer for a bike shop. Today: {day} May. Be brief and name prices.\n"
CATALOGUE = "".join(
    f"{kind} {n}: {n * 137} francs, {n + 6} kg, {5 * n} in stock.\n"
    for n in range(1, 6)
    for kind in ("Road bike", "City bike")
)
QUESTIONS = ("Do you sell bells?", "Is the red one cheap?", "Which bike is light?", "And helmets?")

SUBJECTS = (
    "You answer for a bike shop. Today: {} May.",
    "How much does customer {} owe? Say the sum.",
)
"""Of prompts whose answers are scored: each is a class of traffic."""


def settings(others: dict[str, Any], **more: Any) -> dict[str, Any]:
    """KVShare's settings for an engine: those that others share, or for pictures the default policy
    and what else is to be seen."""
    return others | ({"policy": "balanced"} | more if FOLDER else {})


class Pictures:
    """Takes pictures of what a tab shows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, tab: Tab, name: str, first: str = "body") -> None:
        """Write `page-NAME.png`: what a screen shows from the `first` element on."""
        tab.look(**SCREEN)
        tab.run(f"document.querySelector({first!r}).scrollIntoView()")
        path = self._folder / f"page-{name}.png"
        tab.picture(path, whole=False)
        assert not FOLDER or path.stat().st_size <= MOST_BYTES


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return Pictures(Path(FOLDER) if FOLDER else tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    need(chromium() is not None, "the system's package chromium")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def prompts(chance: random.Random) -> Iterator[str]:
    """Prompts of a few days and a few questions, some about something else."""
    while True:
        if chance.random() < 0.25:
            yield f"Tell me about number {chance.randrange(10**6)}. " * 12
        else:
            yield RULES.format(day=chance.randint(1, 28)) + CATALOGUE + chance.choice(QUESTIONS)


def serve(engine: Engine, encode: Callable[[str], list[int]], seconds: float) -> int:
    """Serve and store such prompts for so long at a changing rate, at least three; how many."""
    texts, served = prompts(random.Random(5)), 0
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds or served < 3:
        engine.store(encode(next(texts)), max_tokens=2)
        engine.forget()  # as if others had filled vLLM's own cache meanwhile
        served += 1
        if seconds:
            time.sleep(_PAUSE_S * (1 + 0.7 * math.sin(passed / _SWING_S)))
    return served


def subject(at: int) -> str:
    """The prompt that comes so far down a list; they take turns with the subject."""
    head = SUBJECTS[at % len(SUBJECTS)]
    body = "".join(f"{len(head) * n}. {head[::-1]} {n}\n" for n in range(8))
    return head.format(at // len(SUBJECTS)) + body + random.Random(at).choice(QUESTIONS)
