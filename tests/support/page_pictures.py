"""Screenshots of the page for the documents: `python -m tests.support.page_pictures docs/images`.

First a daemon serves two minutes of made-up traffic, so that there is something to see.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome
from kvshare_store.tensors.layout import KVLayout
from tests.support.browser import browser
from tests.support.daemons import ClientDriver, Daemon
from tests.support.page import byte_tokenizer, page_url, tokens_of
from tests.support.stores import SMALL

SECONDS, PAUSE_S = 125.0, 0.4
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


def main(out: Path) -> None:
    """Serve, open the page, write two pictures."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvshare-") as folder:
        space = Namespace("org/model", KVLayout(2, 1, 4, "float32"),
                          tokenizer=str(byte_tokenizer(Path(folder) / "tokenizer")))  # fmt: skip
        settings = SMALL | {"host_bytes": 64 << 20, "disk_bytes": 64 << 20, "policy": "balanced"}
        config = StoreConfig(home=f"{folder}/home", http="127.0.0.1:0", **settings)
        with Daemon(config) as daemon, Client(config.home_path) as client:
            node = serve(client, space, SECONDS)
            with browser(Path(folder)) as tab:
                for name, path in (("overview", "/"), ("prompt", f"/nodes/{node}")):
                    tab.look(1000, 640)
                    tab.open(page_url(daemon.config.home_path) + path)
                    tab.picture(out / f"page-{name}.png", whole=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
