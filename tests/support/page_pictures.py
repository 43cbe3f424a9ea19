"""Screenshots of the page for the documents: `python -m tests.support.page_pictures docs/images`.

First a daemon serves two minutes of made-up traffic, so that there is something to see. Another one
serves traffic whose answers are scored, under a bound.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.tensors.layout import KVLayout
from tests.support.browser import browser
from tests.support.daemons import ClientDriver, Daemon
from tests.support.judged import GOOD, SETTINGS, Judged
from tests.support.page import byte_tokenizer, page_url, tokens_of
from tests.support.stores import SMALL

SECONDS, PAUSE_S, ANSWERS = 125.0, 0.4, 900
RULES = "You answer for a bike shop. Today: {day} May. Be brief and name prices.\n"
CATALOGUE = "".join(
    f"{kind} {n}: {n * 137} francs, {n + 6} kg, {5 * n} in stock.\n"
    for n in range(1, 9)
    for kind in ("Road bike", "City bike")
)
QUESTIONS = ("Do you sell bells?", "Is the red one cheap?", "Which bike is light?", "And helmets?")


def prompt(chance: random.Random) -> str:
    """A prompt of a few days and a few questions, sometimes with another part."""
    if chance.random() < 0.25:
        return f"Tell me about number {chance.randrange(10**6)}. " * 12
    return RULES.format(day=chance.randint(1, 28)) + CATALOGUE + chance.choice(QUESTIONS)


def serve(client: Client, space: Namespace, seconds: float) -> str:
    """Ask and save for `seconds`, at a changing rate; returns the id of an edited prompt."""
    chance, engine, edited = random.Random(5), ClientDriver(client, space), ""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        text = prompt(chance)
        tokens = tokens_of(space, text)
        plan = engine.plan(tokens)
        taken = Counter[str]()
        for span in plan.spans:
            taken[span.kind] += span.length
        if not plan.declined:
            left = plan.tokens - plan.reused
            made = Outcome(taken["exact"], taken["edited"], left, continued=taken["continued"])
            client.finish(plan.lease, made)
        saved = engine.save(tokens, plan)
        if saved and taken["edited"] and text.startswith("You"):
            edited = saved
        time.sleep(PAUSE_S * (1 + 0.7 * math.sin(passed / 12)))
    client.flush()
    return edited


RISKS: dict[str, dict[str, float]] = {
    "You answer for a bike shop. Today: {} May.": {},
    "Summarise the ticket of customer {}.": {"balanced": 0.02, "aggressive": 0.35},
    "How much does customer {} owe? Say the sum.": {"faithful": 0.6},
}
"""How often the answer depends on what was edited, by policy."""


def judged(client: Client, space: Namespace, count: int) -> None:
    """Requests of three classes whose answers are scored."""
    chance, engine = random.Random(5), Judged(client, space)

    def regrets(plan: ReusePlan) -> tuple[float, ...]:
        bad = plan.generation > 0 and chance.random() < risk.get(plan.policy, 0.0)
        return (*GOOD[:3], chance.uniform(0.2, 4.0), *GOOD[4:]) if bad else GOOD

    for at in range(count):
        head, risk = list(RISKS.items())[at % len(RISKS)]
        body = "".join(f"{len(head) * n}. {head[::-1]} {n}\n" for n in range(12))
        text = head.format(at // len(RISKS)) + body + chance.choice(QUESTIONS)
        answer = tokens_of(space, f" Answer {at}: that is so.")
        engine.answered(tokens_of(space, text), answer, regrets, request=f"chatcmpl-{at:04x}")
        if at % 100 == 0:
            client.flush()  # no more than so many may wait for the disk


def pictures(
    folder: Path, out: Path, settings: dict[str, Any],
    traffic: Callable[[Client, Namespace], dict[str, str]], height: int,
) -> None:  # fmt: skip
    """Serve, open the pages that the traffic names, and write a picture of each, so high."""
    space = Namespace("org/model", KVLayout(2, 1, 4, "float32"),
                      tokenizer=str(byte_tokenizer(folder / "tokenizer")))  # fmt: skip
    large = SMALL | {"host_bytes": 64 << 20, "disk_bytes": 64 << 20} | settings
    config = StoreConfig(home=str(folder / "home"), http="127.0.0.1:0", **large)
    with Daemon(config), Client(config.home_path) as client:
        paths = traffic(client, space)
        with browser(folder) as tab:
            for name, path in paths.items():
                tab.look(1000, height)
                tab.open(page_url(config.home_path) + path)
                tab.picture(out / f"page-{name}.png", whole=False)


def main(out: Path) -> None:
    """Write three pictures."""
    out.mkdir(parents=True, exist_ok=True)

    def plain(client: Client, space: Namespace) -> dict[str, str]:
        return {"prompt": f"/nodes/{serve(client, space, SECONDS)}", "overview": "/"}

    def scored(client: Client, space: Namespace) -> dict[str, str]:
        judged(client, space, ANSWERS)
        return {"quality": "/quality"}

    bound = SETTINGS | {"quality_bound": 0.2, "policy": "aggressive", "second_look_control": 0.3}
    for settings, traffic, height in (({"policy": "balanced"}, plain, 640), (bound, scored, 940)):
        with tempfile.TemporaryDirectory(prefix="kvshare-") as folder:
            pictures(Path(folder), out, settings, traffic, height)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
